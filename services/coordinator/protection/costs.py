"""What to restore from parity and what to recompute after a loss. Pure: runs, stripes and rates come in."""

from collections.abc import Collection, Iterator, Mapping
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

    Both ways' expected seconds are those of all its pages that can be restored, as far as that is known; of which there
    may be none.
    """

    run: Run
    stripes: tuple[StripeRestore, ...]
    """Those that were not in an earlier choice of this run."""
    pages: int
    """How many are restored in all."""
    restore_s: float
    recompute_s: float
    missing: int
    """Pages of it that have a slice missing."""
    last: bool = True
    """Whether no more of it will be."""

    @property
    def way(self) -> Literal["restore", "recompute", "kept"]:
        """In a word: of a run that shares another's pages, it says what is done for this one besides."""
        return "restore" if self.pages else "recompute" if self.missing else "kept"


class Ways:
    """How runs come back, those with the least to restore first: told as it is found where their parity is.

    Of each the pages from its start that are recoverable are restored, if that pays by `rates`, or `always`; one run
    may be restored though it does not quite, to learn how fast that is. A page after one that can't be restored is left
    out: recomputing the gap goes through it anyway. What pays of a run's first pages need not wait for the rest.
    """

    def __init__(
        self,
        ledger: Ledger,
        runs: Collection[Run],
        rates: Rates,
        *,
        page_bytes: int,
        page_tokens: int,
        always: bool = False,
        redundancy: Redundancy = PARITY,
    ):
        self._ledger = ledger
        self._rates = rates
        self._page_bytes = page_bytes
        self._page_tokens = page_tokens
        self._always = always
        self._redundancy = redundancy
        self._missing = {run.number: sum(bool(ledger.missing(page)) for page in run.pages) for run in runs}
        self._runs = sorted(runs, key=lambda each: self._missing[each.number])
        self._stripes: dict[PageKey, StoredStripe | None] = {}
        """By key, of those that were looked for; None: there is no parity."""
        self._planned: set[PageKey] = set()
        self._explored = False
        self._turn = 0
        """Of the run that is looked at; what follows is about it."""
        self._place = 0
        self._whole = 0
        """Pages before the first one that is lost."""
        self._pages = 0
        """How many can be restored, of those before `_place`."""
        self._next: list[StripeRestore] = []
        """Those of them for which it is not decided yet."""
        self._chosen = 0
        """How many of the others are restored."""

    def keys(self) -> list[PageKey]:
        """Keys of the sealed pages that have a slice missing, each once, in order of need."""
        wanted: dict[PageKey, None] = {}
        for run in self._runs:
            for page, key in zip(run.pages, run.keys, strict=False):
                if self._ledger.missing(page):
                    wanted[key] = None
        return list(wanted)

    def found(
        self,
        looked_for: Collection[PageKey],
        stripes: Mapping[PageKey, StoredStripe],
        *,
        runs: Collection[int],
        now: float = 0.0,
    ) -> Iterator[Choice]:
        """These keys' parity is known now: what can be said of those `runs` that have not ended, in order."""
        self._stripes.update(dict.fromkeys(looked_for))
        self._stripes.update(stripes)
        while self._turn < len(self._runs):
            run = self._runs[self._turn]
            if run.number in runs:
                last = self._walk(run)
                if (choice := self._choice(run, last=last, now=now)) is not None:
                    yield choice
                if not last:
                    return
            self._turn += 1
            self._place = self._whole = self._pages = self._chosen = 0
            self._next = []

    def _walk(self, run: Run) -> bool:
        """Go on through a run's pages. Whether that is its end: no more of them can be restored."""
        for place in range(self._place, min(len(run.pages), len(run.keys))):
            number, key = run.pages[place], run.keys[place]
            if not (lost := self._ledger.missing(number)) or key in self._planned:
                continue
            if self._redundancy.stored and key not in self._stripes:
                self._place = place
                return False
            if self._ledger.key(number) != key:
                break
            stripe = restorable(number, key, lost, self._stripes, self._redundancy)
            if stripe is None:
                break
            self._whole = self._whole if self._pages else place
            self._pages += 1
            self._next.append(stripe)
        return True

    def _choice(self, run: Run, *, last: bool, now: float) -> Choice | None:
        """What is decided of a run now, if anything is."""
        restore_s = self._rates.restore_seconds(self._pages * self._page_bytes)
        recompute_s = self._rates.recompute_seconds(self._whole * self._page_tokens, self._pages * self._page_tokens)
        pays = self._always or self._chosen > 0 or restore_s < recompute_s
        if last and not pays and not self._explored:
            pays = self._explored = self._rates.explores(restore_s, recompute_s, now)
        stripes = tuple(self._next) if pays else ()
        if not last and not stripes:
            return None
        self._next = self._next[len(stripes) :]
        self._chosen += len(stripes)
        self._planned.update([stripe.key for stripe in stripes])
        return Choice(run, stripes, self._chosen, restore_s, recompute_s, self._missing[run.number], last)


def restorable(
    place: int,
    key: PageKey,
    missing: Collection[int],
    stripes: Mapping[PageKey, StoredStripe | None],
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
