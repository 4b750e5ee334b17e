"""What to restore from parity and what to recompute after a loss. Pure: runs, stripes and rates come in."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from services.coordinator.protection.host import Run
from services.coordinator.protection.ledger import Ledger
from services.coordinator.protection.rates import Rates
from shared.messages import ParityShard, StripeRestore
from shared.types import GroupConfig, PageKey


@dataclass(frozen=True, slots=True)
class Redundancy:
    """From what a lost slice comes back: parity and the other slices, a raw copy in a store, or any other rank's page.

    `size`: of the group.
    """

    kind: Literal["parity", "copies", "alike"]
    size: int

    @property
    def stored(self) -> bool:
        """Whether it takes something from a store."""
        return self.kind != "alike"


PARITY = Redundancy("parity", 0)


def redundancy_of(config: GroupConfig, *, alike: bool) -> Redundancy:
    """That of a group; `alike`: all its ranks hold equal bytes."""
    kind: Literal["copies", "parity"] = "copies" if config.protection == "replicate" else "parity"
    return Redundancy("alike" if alike else kind, config.size)


@dataclass(frozen=True, slots=True)
class StoredStripe:
    """What the index says of a stripe's parity, as far as its store is alive in the incarnation that has the bytes."""

    parity: tuple[ParityShard, ...]
    data_checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """How a run gets its KV back: these pages from the stores, what follows them as a prefill.

    Both ways' expected seconds are those of the pages that can be restored, of which there may be none.
    """

    run: Run
    stripes: tuple[StripeRestore, ...]
    restore_s: float
    recompute_s: float
    missing: int
    """Pages of it that have a slice missing."""

    @property
    def way(self) -> Literal["restore", "recompute", "kept"]:
        """In a word: of a run that shares another's pages, it says what is done for this one besides."""
        return "restore" if self.stripes else "recompute" if self.missing else "kept"


def wanted_keys(ledger: Ledger, runs: Iterable[Run]) -> list[PageKey]:
    """Keys of the sealed pages of runs that have a slice missing, each once, in order of need."""
    wanted: dict[PageKey, None] = {}
    for run in runs:
        for page, key in zip(run.pages, run.keys, strict=False):
            if ledger.missing(page):
                wanted[key] = None
    return list(wanted)


def choose(
    ledger: Ledger,
    runs: Collection[Run],
    stripes: Mapping[PageKey, StoredStripe],
    rates: Rates,
    *,
    page_bytes: int,
    page_tokens: int,
    always: bool = False,
    redundancy: Redundancy = PARITY,
    now: float = 0.0,
) -> list[Choice]:
    """How each run comes back, those with the least to restore first.

    Of each the pages from its start that are recoverable are restored, if that pays by `rates`, or `always`; one run
    may be restored though it does not quite, to learn how fast that is. A page after one that can't be restored is left
    out: recomputing the gap goes through it anyway.
    """
    missing = {run.number: sum(bool(ledger.missing(page)) for page in run.pages) for run in runs}
    planned: set[PageKey] = set()
    choices, explored = [], False
    for run in sorted(runs, key=lambda each: missing[each.number]):
        first: list[StripeRestore] = []
        whole = 0  # pages before the first one that is lost
        for place, (number, key) in enumerate(zip(run.pages, run.keys, strict=False)):
            if not (lost := ledger.missing(number)) or key in planned:
                continue
            stripe = restorable(number, key, lost, stripes, redundancy) if ledger.key(number) == key else None
            if stripe is None:
                break
            whole = whole if first else place
            first.append(stripe)
        restore_s = rates.restore_seconds(len(first) * page_bytes)
        recompute_s = rates.recompute_seconds(whole * page_tokens, len(first) * page_tokens)
        if not (always or restore_s < recompute_s):
            if not explored and rates.explores(restore_s, recompute_s, now):
                explored = True
            else:
                first = []
        planned.update(stripe.key for stripe in first)
        choices.append(Choice(run, tuple(first), restore_s, recompute_s, missing[run.number]))
    return choices


def restorable(
    place: int,
    key: PageKey,
    missing: Collection[int],
    stripes: Mapping[PageKey, StoredStripe],
    redundancy: Redundancy = PARITY,
) -> StripeRestore | None:
    """How to rebuild what the ranks `missing` lack of a page, or slot; None if too little of it is left."""
    lost = tuple(sorted(missing))
    if redundancy.kind == "alike":
        return StripeRestore(place, key, lost, (), ()) if 0 < len(lost) < redundancy.size else None
    stripe = stripes.get(key)
    shards = _enough(stripe, lost, redundancy) if stripe is not None and lost else None
    return StripeRestore(place, key, lost, shards, stripe.data_checksums) if stripe is not None and shards else None


def _enough(stripe: StoredStripe, lost: tuple[int, ...], redundancy: Redundancy) -> tuple[ParityShard, ...] | None:
    """The stored shards from which the lost slices come back: each one's own copy, or all parity. None: too few.

    All, since a row that is found damaged is made up for by another.
    """
    if redundancy.kind == "copies":
        size = len(stripe.data_checksums)
        wanted = {size + rank for rank in lost}
        shards = tuple(shard for shard in stripe.parity if shard.shard in wanted)
    else:
        shards = stripe.parity
    return shards if len(shards) >= len(lost) else None
