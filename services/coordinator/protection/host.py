"""The contract between protection and an engine: what each may ask of the other. Pure.

An engine owns the pages: who holds them, when one is written, which requests stand on them. Protection owns what it
takes to bring their bytes back. The engine calls `Protection`; protection calls a `Host`.

| the engine tells `Protection` | meaning |
| --- | --- |
| `sealed(page, key)` | the page is full, and whole on every rank: the step that filled it came back |
| `dropped(pages)` | they are free, evicted or about to be written again: forget them, and release their parity |
| `unused(page)` | no request stands on a sealed page any more |
| `step_done(step, spans)` | steps up to this one are in the pool on every rank, and wrote these tokens of open pages |
| `rewound(page, offset)` | an open page is written again from this token on |

What a lost step may have touched is never told as sealed: a page counts when its step has come back.
"""

from collections.abc import Collection, Iterable, Mapping, Reversible, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.coordinator.membership.members import Formation, Held
from shared.types import ModelInfo, PageKey


class Run(Protocol):
    """The pages that one running request stands on, in the order of its tokens."""

    @property
    def number(self) -> int:
        """Names the run; never used twice in the life of an engine."""
        ...

    @property
    def request_id(self) -> str:
        """The request, as its client knows it."""
        ...

    @property
    def pages(self) -> Sequence[int]:
        """Sealed ones first, then those that are open."""
        ...

    @property
    def keys(self) -> Sequence[PageKey]:
        """Those of the sealed pages, in their order."""
        ...

    @property
    def computed(self) -> int:
        """How many tokens have their KV on these pages."""
        ...

    @property
    def held(self) -> bool:
        """Whether it takes part in no step since slices were lost, until `Host.returned`."""
        ...


class IdlePages(Collection[int], Reversible[int], Protocol):
    """Pages in the order in which they are given up; the keys of a dictionary, say."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start .. end - 1 of an open page, which a step wrote."""

    page: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Returned:
    """A run that goes on: so many tokens are recomputed, and it has all its KV again at `goal` tokens."""

    recomputed: int
    goal: int
    remaining: int
    """Tokens that are known and have no KV yet; 0: it waits for nothing."""


@dataclass(frozen=True, slots=True)
class Blame:
    """What was found to be to blame for a failed step: workers, which are given up; or a request, which has ended."""

    workers: tuple[str, ...] = ()
    ended: bool = False


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine shows of itself."""

    kind: str
    model: ModelInfo
    max_model_len: int
    running: int
    waiting: int
    pages_total: int
    pages_held: int
    pages_cached: int
    runs_protected: bool
    """Whether all sealed pages of running requests have their parity."""
    unprotected_tokens: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int


class Host(Protocol):
    """An engine, as protection sees it."""

    keeps_open: bool = True
    """Whether a run that has `returned` goes on with what is on its open pages; else nothing of them is wanted."""

    def runs(self) -> Collection[Run]:
        """The running requests' pages, in the order in which they are wanted back."""
        ...

    def idle(self) -> IdlePages:
        """The sealed pages that no request stands on, those that are given up first, first."""
        ...

    def pin(self, page: int) -> None:
        """Its bytes are read or written from now on: neither free it nor write to it before as many `unpin`."""
        ...

    def unpin(self, page: int) -> None:
        """See `pin`."""
        ...

    def confirm(self, pages: list[int]) -> bool:
        """Whether these pinned pages are kept already; if not, `Protection.pinned` is called when they are."""
        ...

    def whole(self, pages: Iterable[int]) -> None:
        """They count on every rank again."""
        ...

    def gone(self, pages: Iterable[int]) -> None:
        """They won't come back under their keys: what they held is to be recomputed."""
        ...

    def inventory(self, worker: str, held: Held) -> Mapping[int, PageKey]:
        """The sealed pages, page -> key, that a worker has which held its rank under an earlier coordinator."""
        ...

    def adopt(self, pages: Iterable[tuple[int, PageKey]]) -> None:
        """Of what there was under an earlier coordinator, these sealed pages are left on some rank."""
        ...

    def returned(self, run: int, valid: int) -> Returned:
        """Nothing more of this run comes back: KV is there for its first `valid` tokens, and it may go on."""
        ...

    # -- epochs ------------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether an epoch can begin, for all that the engine knows."""
        ...

    def still(self) -> bool:
        """Called while a rank moves and no step is to begin: whether none is in flight any more."""
        ...

    def busy_since(self) -> float | None:
        """Since when a step has been in flight; None if none is."""
        ...

    def stuck(self) -> str:
        """Why the step in flight is to be given up; empty while it is not."""
        ...

    def step_failed(self, step: int, workers: Collection[str], reason: str) -> Blame:
        """A step raised errors on these ranks, and no process is lost: it counts no more, and may be tried again."""
        return Blame()

    def excuse(self, away_s: float) -> None:
        """This process was away for so long: no step was late meanwhile."""
        ...

    def quiesce(self) -> None:
        """The epoch is over: no further step; those in flight end without effect."""
        ...

    def place(self, formation: Formation) -> None:
        """These workers are the ranks from now on. Runs are held from here until each has `returned`."""
        ...

    def resume(self) -> None:
        """Every run has returned."""
        ...

    def go_on(self) -> None:
        """After each event: what may begin begins, a step, say."""
        ...

    # -- views -------------------------------------------------------------------------------------------------------

    def status(self) -> EngineStatus:
        """What it shows of itself."""
        ...
