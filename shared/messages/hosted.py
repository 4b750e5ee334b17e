"""A hosted engine: one that schedules by itself, and has its pages protected and its ranks replaced by the coordinator.

The engine says EngineHello, and EngineReady once its ranks have their KV caches, with all pages that are sealed. From
then on PagesSealed and PagesDropped keep the ledger; PinPages asks for pages to be kept while they are encoded.

At a loss: Quiesce -> EngineRuns -> Place, and ranks are assigned and join -> Resume. Page numbers are the engine's own.

Who may touch a page. Ranks read or write a page for protection only while the engine keeps it: because it pinned it,
or because it stands still, from its EngineRuns to Resume. So the engine may give away at any time, without asking, any
page that is not pinned, a withheld one too: it says PagesDropped first, in order with all else, and only then lets
somebody write. PinPages names sealed or withheld pages; the engine pins those that still have the key named, and
answers with exactly these. A pin ends with UnpinPages or Resume, with nothing else: neither with PagesWhole or
PagesGone, which only say what becomes of a withheld page, nor with the connection, because ranks that have not joined a
new epoch may still be at work. An engine without a connection goes on stepping, but gives no pinned page away, and
seals and drops as it likes: what it had to say then is not kept, for when it dials again it tells all that it has, and
what it does not tell is dropped. It is quiesced then, like after a loss, whatever the connection before had left open:
the answers, pins and epochs of that one mean nothing any more. An engine that stands still stays so until Resume, on
this connection or a later one. Where a Place has changed a worker, no page counts as whole until Resume, and an engine
that dials anew before it tells no page as sealed. What it tells holds for the `workers` of its EngineReady only: where
a Place got lost, and a rank is another's by now, the coordinator goes by what it knew of a page, and otherwise lists it
as gone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from shared.messages.base import Message
from shared.types import ModelInfo, PageKey, pack_ids

ENTRIES_AT_ONCE = 1 << 16
"""Pages in one message that comes in parts: far below the largest frame."""
ENTRIES_OF_A_RUN = 64
"""A run takes as much room as so many pages, besides its pages: most of it the name of its request."""

# -- engine to coordinator -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineHello(Message):
    """A hosted engine dials. `name` is of one process and never used again; its workers are called `name`.SOMETHING."""

    name: str
    host: str
    pid: int
    kind: str
    """What it is, in words: vLLM 0.32.0."""


@dataclass(frozen=True, slots=True)
class EngineReady(Message):
    """The ranks have their KV caches. Sent again whenever the engine has dialled anew, and then all sealed pages.

    Withheld pages are not told. A page counts only where it is whole on all of `workers`: since a Place that changed
    one, and until Resume, none is.

    `pages`: the number of pages, of `page_tokens` tokens each. `step_tokens`: a step computes no more. `workers`: who
    holds which rank, by name; "" for one that is lost. `alike`: all ranks hold equal bytes, so that a lost page is
    copied from another. `moves`: it keeps spares to which a rank can move; the worker that it moves from is ended when
    it is placed no more.
    """

    model: ModelInfo
    pages: int
    page_tokens: int
    step_tokens: int
    workers: tuple[str, ...]
    alike: bool = False
    moves: bool = False


@dataclass(frozen=True, slots=True)
class PagesSealed(Message):
    """These pages are full, and their KV is whole on every rank. No other page has one of the keys."""

    pages: bytes
    keys: tuple[PageKey, ...]

    @classmethod
    def parts(cls, sealed: Mapping[int, PageKey]) -> Iterator["PagesSealed"]:
        """As many messages as it takes."""
        entries = iter(sealed.items())
        while part := dict(islice(entries, ENTRIES_AT_ONCE)):
            yield cls(pack_ids(part), tuple(part.values()))


@dataclass(frozen=True, slots=True)
class PagesDropped(Message):
    """These pages are about to be given away, or written again; none is pinned. Harmless for one that is not sealed."""

    pages: bytes


@dataclass(frozen=True, slots=True)
class PagesPinned(Message):
    """Of the pages in a PinPages, these are kept until UnpinPages; the others had been given away."""

    pages: bytes


@dataclass(frozen=True, slots=True)
class EngineRun(Message):
    """The pages that one running request stands on, of one KV cache group. Not sent alone: part of EngineRuns.

    Sealed pages first, as PagesSealed told of them, then open ones. `computed`: tokens whose KV is on them.
    """

    number: int
    request_id: str
    pages: bytes
    computed: int


@dataclass(frozen=True, slots=True)
class EngineRuns(Message):
    """The engine stands still, as Quiesce of this epoch asked. `runs` in the order in which they are wanted back.

    Pages that lost steps may have touched have been told as dropped before. `more`: others follow, in a message that
    goes on where this one ends.
    """

    epoch: int
    runs: tuple[EngineRun, ...]
    more: bool = False

    @classmethod
    def parts(cls, epoch: int, runs: Sequence[EngineRun]) -> Iterator["EngineRuns"]:
        """As many messages as it takes."""
        part: list[EngineRun] = []
        entries = 0
        for run in runs:
            count = ENTRIES_OF_A_RUN + len(run.pages) // 4
            if part and entries + count > ENTRIES_AT_ONCE:
                yield cls(epoch, tuple(part), more=True)
                part, entries = [], 0
            part.append(run)
            entries += count
        yield cls(epoch, tuple(part))


@dataclass(frozen=True, slots=True)
class RunsRecomputed(Message):
    """These runs have all the KV again that they had when the engine was quiesced, or have ended."""

    epoch: int
    runs: bytes


@dataclass(frozen=True, slots=True)
class StepFailed(Message):
    """A step failed. `culprits`: the workers that are to blame, by name: they are lost. None: all may try again.
    `device_failed`: the reason is that of their devices, which counts whenever it comes.
    """

    epoch: int
    reason: str
    culprits: tuple[str, ...] = ()
    device_failed: bool = False


@dataclass(frozen=True, slots=True)
class StepTime(Message):
    """What a step took. Not sent alone: part of EngineLoad.

    `pairs`: of a token that it computed and one that this attends to. `context`: tokens that its requests have.
    """

    tokens: int
    pairs: int
    context: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineLoad(Message):
    """How busy the engine is, for the status; about once a second. Counts since its start."""

    running: int
    waiting: int
    pages_in_use: int
    pages_cached: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    steps: tuple[StepTime, ...] = ()
    """The last one of each size, since this was told before."""


# -- coordinator to engine -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GivenUp(Message):
    """These workers, by name, are lost to the coordinator: end them. One that is stopped can't be told itself."""

    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PinPages(Message):
    """Keep these pages, if they still have these keys: they are to be encoded, or, withheld ones, restored.

    Answered by PagesPinned.
    """

    pages: bytes
    keys: tuple[PageKey, ...]


@dataclass(frozen=True, slots=True)
class UnpinPages(Message):
    """These pages need not be kept any more. Harmless for one that is not pinned."""

    pages: bytes


@dataclass(frozen=True, slots=True)
class Quiesce(Message):
    """This epoch is over: begin no step; those in flight end without effect. Answered by EngineRuns."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Place(Message):
    """These workers, by name, are the ranks in a new epoch. The engine connects those that are new with the others."""

    epoch: int
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resume(Message):
    """Step again. `gone`: pages that won't come back: forget their keys. `withheld`: pages that may yet come back.

    Withheld pages belong to nobody and are found by nobody, until PagesWhole or PagesGone names them, or the engine
    needs their room and drops them. `withheld` is all of them; those withheld before and not again are free. All pins
    end: the ranks have joined the new epoch, so no transfer of the one before reads or writes any more.
    """

    epoch: int
    gone: bytes
    withheld: bytes


@dataclass(frozen=True, slots=True)
class PagesWhole(Message):
    """These withheld pages are whole on every rank again: they may be found by their keys."""

    epoch: int
    pages: bytes


@dataclass(frozen=True, slots=True)
class PagesGone(Message):
    """These withheld pages won't come back: they are free."""

    epoch: int
    pages: bytes
