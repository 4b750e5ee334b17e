"""What to restore from parity and what to recompute after a loss. Pure: runs, stripes and rates come in."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from services.coordinator.protection.host import Run
from services.coordinator.protection.ledger import Ledger
from shared.messages import ParityShard, StripeRestore
from shared.types import PageKey

Redundancy = Literal["parity", "copies", "alike"]
"""From what a lost slice comes back: parity and the other slices, a raw copy in a store, or any other rank's page."""


@dataclass(frozen=True, slots=True)
class StoredStripe:
    """What the index says of a stripe's parity, as far as its store is alive in the incarnation that has the bytes."""

    parity: tuple[ParityShard, ...]
    data_checksums: tuple[int, ...]


@dataclass(slots=True)
class Rates:
    """Speeds that the choice between restoring and recomputing rests on, updated as they are measured."""

    prefill_tokens_s: float = 400.0
    restore_bytes_s: float = 200e6
    restore_start_s: float = 0.02
    """A restore's fixed cost: index look-up, plan, first exchange."""

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """Take a step of at least 64 tokens into account."""
        if tokens >= 64 and seconds > 0:
            self.prefill_tokens_s += 0.3 * (tokens / seconds - self.prefill_tokens_s)

    def saw_restore(self, restored_bytes: int, seconds: float) -> None:
        """Take a finished restore of at least 1 MB into account."""
        if restored_bytes >= 1_000_000 and seconds > 0:
            self.restore_bytes_s += 0.3 * (restored_bytes / seconds - self.restore_bytes_s)

    def restore_seconds(self, pages: int, page_bytes: int) -> float:
        """What decoding `pages` pages is expected to take."""
        return self.restore_start_s + pages * page_bytes / self.restore_bytes_s

    def recompute_seconds(self, tokens: int) -> float:
        """What a prefill of `tokens` tokens is expected to take."""
        return tokens / self.prefill_tokens_s


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
    redundancy: Redundancy = "parity",
) -> list[Choice]:
    """How each run comes back, those with the least to restore first.

    Of each the pages from its start that are recoverable are restored, if that pays by `rates`, or `always`. A page
    after one that can't be is left out: recomputing the gap goes through it anyway.
    """
    missing = {run.number: sum(bool(ledger.missing(page)) for page in run.pages) for run in runs}
    planned: set[PageKey] = set()
    choices = []
    for run in sorted(runs, key=lambda each: missing[each.number]):
        first: list[StripeRestore] = []
        for number, key in zip(run.pages, run.keys, strict=False):
            if not (lost := ledger.missing(number)) or key in planned:
                continue
            stripe = restorable(number, key, lost, stripes, redundancy) if ledger.key(number) == key else None
            if stripe is None:
                break
            first.append(stripe)
        restore_s = rates.restore_seconds(len(first), page_bytes)
        recompute_s = rates.recompute_seconds(len(first) * page_tokens)
        if not (always or restore_s < recompute_s):
            first = []
        planned.update(stripe.key for stripe in first)
        choices.append(Choice(run, tuple(first), restore_s, recompute_s, missing[run.number]))
    return choices


def restorable(
    place: int,
    key: PageKey,
    missing: Collection[int],
    stripes: Mapping[PageKey, StoredStripe],
    redundancy: Redundancy = "parity",
) -> StripeRestore | None:
    """How to rebuild what the ranks `missing` lack of a page, or slot; None if too little of it is left."""
    lost = tuple(sorted(missing))
    if redundancy == "alike":
        return StripeRestore(place, key, lost, (), ()) if lost else None
    stripe = stripes.get(key)
    shards = _enough(stripe, lost, redundancy) if stripe is not None and lost else None
    return StripeRestore(place, key, lost, shards, stripe.data_checksums) if stripe is not None and shards else None


def _enough(stripe: StoredStripe, lost: tuple[int, ...], redundancy: Redundancy) -> tuple[ParityShard, ...] | None:
    """The stored shards from which the lost slices come back: each one's own copy, or all parity. None: too few.

    All, since a row that is found damaged is made up for by another.
    """
    if redundancy == "copies":
        size = len(stripe.data_checksums)
        wanted = {size + rank for rank in lost}
        shards = tuple(shard for shard in stripe.parity if shard.shard in wanted)
    else:
        shards = stripe.parity
    return shards if len(shards) >= len(lost) else None
