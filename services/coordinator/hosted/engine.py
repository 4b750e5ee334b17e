"""The coordinator's side of a hosted engine: what it told of its pages and runs, and what it is told. Pure.

The engine owns its pages and requests; this mirrors as much of them as protection asks for. A loss leads through
`quiesce`, the engine's `EngineRuns`, `place`, what is restored, and `resume`. An engine that dials anew is quiesced
too: when its `EngineRuns` are there, it has told all pages that it has.
"""

import logging
from collections.abc import Iterable, Mapping

from services.coordinator.events import Peer
from services.coordinator.hosted.runs import HostedRun
from services.coordinator.membership.members import Formation, Held, Membership
from services.coordinator.outbox import Outbox
from services.coordinator.protection.host import EngineStatus, Host, IdlePages, Returned
from services.coordinator.protection.ledger import EXPOSED
from services.coordinator.protection.page_lists import PageLists
from services.coordinator.protection.protection import Protection
from services.coordinator.protection.rates import Work
from services.coordinator.protection.stores import Stores
from services.coordinator.views.metrics import Metrics
from shared.config import CoordinatorSettings
from shared.errors import ProtocolError
from shared.messages import (
    EngineHello,
    EngineLoad,
    EngineReady,
    EngineRuns,
    GivenUp,
    Heartbeat,
    Message,
    PagesDropped,
    PagesGone,
    PagesPinned,
    PagesSealed,
    PagesWhole,
    PinPages,
    Place,
    Quiesce,
    Resume,
    RunsRecomputed,
    UnpinPages,
)
from shared.tracing import Tracing
from shared.types import GroupConfig, PageKey, pack_ids, unpack_ids

log = logging.getLogger(__name__)

WORKERS_S = 10.0
"""How long an engine that has begun is waited with for the workers that it names."""


class HostedEngine(Host):
    """One life of an engine, and the protection of its pages."""

    keeps_open = False  # its requests come back by the keys of sealed pages

    def __init__(
        self,
        config: GroupConfig,
        settings: CoordinatorSettings,
        hello: EngineHello,
        ready: EngineReady,
        membership: Membership,
        stores: Stores,
        outbox: Outbox,
        metrics: Metrics,
        tracing: Tracing,
    ):
        self.hello = hello
        self.model = ready.model
        self.pages = ready.pages
        self.workers = ready.workers
        self.protection = Protection(
            config, settings, self, ready.pages, ready.model.page_bytes, ready.page_tokens, membership, stores, outbox,
            metrics, tracing, step_tokens=ready.step_tokens, alike=ready.alike, moves=ready.moves,
        )  # fmt: skip
        self._page_tokens = ready.page_tokens
        self._step_timeout_s = settings.step_timeout_s
        self._membership = membership
        self._outbox = outbox
        self._peer: Peer | None = None
        self._dialled_at = outbox.now
        self._load = EngineLoad(0, 0, 0, 0, 0, 0, 0)
        self._keys: list[PageKey] = [b""] * ready.pages  # by page; empty: it is not sealed
        self._order = PageLists(ready.pages, 1)  # of sealed pages, those sealed longest ago first
        self._in_order = self._order[1]
        self._stale: set[int] = set()  # of these, those that an engine that dialled anew has not told again
        self._behind = False  # it dialled anew, and does not know of all ranks who holds them now
        self._runs: dict[int, HostedRun] = {}  # since it was quiesced, until each has what it had
        self._quiesced: int | None = None  # in which epoch, while it is
        self._told_runs = False  # since it was quiesced
        self._telling: list[HostedRun] = []  # of these, while more are to come
        self._pins: dict[int, int] = {}  # page -> transfers under way
        self._kept: set[int] = set()  # pages that the engine keeps, or was asked to
        self._unpinned: list[int] = []  # to be told
        self._gone: list[int] = []  # to be told when it resumes
        self._withheld: dict[int, None] = {}
        self._alive: set[str] = set()  # its workers that are members
        self._steps: dict[str, tuple[int, float]] = {}  # worker in a step -> its last one done, and since when

    # -- the engine's connection -------------------------------------------------------------------------------------

    def dialled(self, peer: Peer, ready: EngineReady) -> None:
        """It has a connection, a first one or another, by which it tells all that it has (once more)."""
        self._peer, self.workers, self._dialled_at = peer, ready.workers, self._outbox.now
        placed = zip(self._membership.ranks, ready.workers, strict=True)
        self._stale = set(self._in_order)
        self._behind = self.protection.begun and any(name not in (None, told) for name, told in placed)
        self._withheld.clear()
        self._quiesced = None
        self.quiesce()

    def left(self) -> None:
        """Its connection is lost."""
        self._peer, self._told_runs = None, False

    def said(self, message: Message) -> None:
        """A message of the engine's. Raises ProtocolError for one that can't be."""
        match message:
            case PagesSealed(pages, keys):
                self._sealed(self._numbers(pages), keys)
            case PagesDropped(pages):
                self._dropped(self._numbers(pages))
            case PagesPinned(pages):
                self.protection.pinned(self._numbers(pages))
            case EngineRuns(epoch=epoch) if epoch == self._quiesced:
                self._stands_still(message)
            case RunsRecomputed(epoch=epoch, runs=runs) if epoch == self._membership.epoch:
                for number in unpack_ids(runs):
                    self._runs.pop(number, None)
                self.protection.progressed()
            case EngineLoad():
                self._load = message
                for each in message.steps:
                    self.protection.rates.saw_step(Work(each.tokens, each.pairs, each.context), each.seconds)
            case _:
                log.debug("the engine sent %s, of no use now", type(message).__name__)

    @property
    def quiet(self) -> bool:
        """Whether no request waits for this coordinator."""
        return self._quiesced is None

    def protected(self) -> None:
        """Nothing to do: it traces its requests itself."""

    def rank_said(self, worker: str, message: Message) -> None:
        """A rank's heartbeat tells whether it is in a step."""
        if not isinstance(message, Heartbeat):
            return
        if not message.in_flight:
            self._steps.pop(worker, None)
        elif worker not in self._steps or self._steps[worker][0] != message.step:
            self._steps[worker] = message.step, self._outbox.now

    def _numbers(self, packed: bytes) -> list[int]:
        try:
            numbers = unpack_ids(packed)
        except ValueError as error:
            raise ProtocolError(f"pages that can't be read: {error}") from error
        if not all(0 <= number < self.pages for number in numbers):
            raise ProtocolError(f"a page that is none of the {self.pages} that there are")
        return numbers

    def _sealed(self, pages: list[int], keys: tuple[PageKey, ...]) -> None:
        if len(pages) != len(keys):
            raise ProtocolError(f"{len(keys)} keys for {len(pages)} pages")
        for page, key in zip(pages, keys, strict=True):
            self._stale.discard(page)
            if self._keys[page] == key:
                continue
            if self._keys[page]:
                self._dropped([page])
            if (other := self.protection.ledger.find(key)) is not None:  # dropped while it had no connection
                self._dropped([other])
            if self._behind:  # a new rank lacks it, and it was given up or never known: so nothing brings it back
                self._gone.append(page)
                continue
            self._keys[page] = key
            self._order.move(page, 1)
            if self.protection.begun:
                self.protection.sealed(page, key)

    def _dropped(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._forget(page)
            self._withheld.pop(page, None)
        self.protection.dropped(pages)

    def _forget(self, page: int) -> None:
        self._keys[page] = b""
        self._order.move(page, 0)

    def _known(self) -> dict[int, PageKey]:
        return {page: self._keys[page] for page in self._in_order}

    def _stands_still(self, told: EngineRuns) -> None:
        self._dropped(list(self._stale))
        self._stale.clear()
        self._behind = False
        self._telling += (HostedRun.of(run, self._keys) for run in told.runs)
        if not told.more:
            self._runs = {run.number: run for run in self._telling}
            self._telling = []
            self._told_runs = True

    def _send(self, message: Message) -> None:
        if self._peer is not None:
            self._outbox.send(self._peer, message)

    # -- the host: pages ---------------------------------------------------------------------------------------------

    def runs(self) -> list[HostedRun]:
        """Those that it told of, until they have all that they had."""
        return list(self._runs.values())

    def idle(self) -> IdlePages:
        """All sealed pages: which of them its requests stand on, it tells only when it stands still."""
        return self._in_order

    def pin(self, page: int) -> None:
        """See `Host`. The engine is asked by `confirm`; while it stands still it gives no page away."""
        self._pins[page] = self._pins.get(page, 0) + 1

    def unpin(self, page: int) -> None:
        """See `Host`."""
        self._pins[page] -= 1
        if not self._pins[page]:
            del self._pins[page]
            if page in self._kept:
                self._kept.discard(page)
                self._unpinned.append(page)

    def confirm(self, pages: list[int]) -> bool:
        """See `Host`."""
        self._tell_unpinned()
        self._kept.update(pages)
        self._send(PinPages(pack_ids(pages), tuple(self._keys[page] for page in pages)))
        return False

    def whole(self, pages: Iterable[int]) -> None:
        """See `Host`. Of pages that it withholds it is told at once; those of runs count when it resumes."""
        if back := [page for page in pages if page in self._withheld]:
            for page in back:
                del self._withheld[page]
            self._send(PagesWhole(self._membership.epoch, pack_ids(back)))

    def gone(self, pages: Iterable[int]) -> None:
        """See `Host`."""
        lost = [page for page in pages if self._keys[page]]
        for page in lost:
            self._forget(page)
        withheld = [page for page in lost if page in self._withheld]
        for page in withheld:
            del self._withheld[page]
        self._gone.extend(page for page in lost if page not in withheld)
        self.protection.dropped(lost)
        if withheld:
            self._send(PagesGone(self._membership.epoch, pack_ids(withheld)))

    def inventory(self, worker: str, held: Held) -> Mapping[int, PageKey]:
        """A worker that the engine knows for its rank has all pages that the engine has; another one has none."""
        return self._known() if self.workers[held.rank] == worker else {}

    def adopt(self, pages: Iterable[tuple[int, PageKey]]) -> None:
        """They are the engine's own; it forgets the others, which no rank has."""
        left = {page for page, _ in pages}
        self.gone([page for page in self._in_order if page not in left])

    def returned(self, run: int, valid: int) -> Returned:
        """See `Host`. It goes on with the others, when the engine resumes; of open pages it keeps nothing."""
        of = self._runs[run]
        valid = min(valid, len(of.keys) * self._page_tokens)
        of.held, of.computed = False, valid
        return Returned(of.had - valid, of.had, max(1, of.had - valid))

    # -- the host: epochs --------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it stands still; at its beginning also whether the workers that it names are there."""
        members = self._membership.members
        if not self.protection.begun and self._outbox.now - self._dialled_at < WORKERS_S:
            return self._told_runs and all(name in members and members[name].ready for name in self.workers if name)
        return self._told_runs

    def still(self) -> bool:
        """See `Host`."""
        self.quiesce()
        return self._told_runs

    def busy_since(self) -> float | None:
        """See `Host`."""
        ranks = self._membership.ranks
        since = [began for name, (_, began) in self._steps.items() if name in ranks]
        return min(since, default=None) if self._membership.stepping else None

    def stuck(self) -> str:
        """See `Host`."""
        if self._quiesced is not None and self._membership.state == "serving" and not self.protection.moves.closing:
            return "it stands still for a rank that does not move"
        since = self.busy_since()
        if since is None or self._outbox.now - since <= self._step_timeout_s:
            return ""
        return f"a step made no progress for {self._step_timeout_s:.0f} s"

    def excuse(self, away_s: float) -> None:
        """See `Host`."""
        self._steps = {name: (step, since + away_s) for name, (step, since) in self._steps.items()}

    def quiesce(self) -> None:
        """See `Host`."""
        for run in self._runs.values():
            run.held, run.computed = True, run.had
        self._steps.clear()
        if self._quiesced is None:
            self._quiesced, self._told_runs, self._telling = self._membership.epoch, False, []
            self._kept.clear()  # it keeps them until it resumes
            self._unpinned.clear()
            self._send(Quiesce(self._quiesced))

    def place(self, formation: Formation) -> None:
        """See `Host`."""
        self.workers = formation.ranks
        self._send(Place(formation.epoch, formation.ranks))

    def resume(self) -> None:
        """See `Host`."""
        self._quiesced = None
        self.protection.dropped(self.protection.ledger.lost_open())
        self._withheld = dict.fromkeys(self.protection.ledger.lost_idle(self.pages))
        gone, self._gone = self._gone, []
        self._send(Resume(self._membership.epoch, pack_ids(gone), pack_ids(self._withheld)))

    def go_on(self) -> None:
        """See `Host`."""
        self._tell_unpinned()
        alive = {name for name in self._membership.members if name.startswith(f"{self.hello.name}.")}
        if given_up := self._alive - alive:
            self._send(GivenUp(tuple(sorted(given_up))))
        self._alive = alive

    def _tell_unpinned(self) -> None:
        if self._unpinned:
            unpinned, self._unpinned = self._unpinned, []
            self._send(UnpinPages(pack_ids(unpinned)))

    # -- views -------------------------------------------------------------------------------------------------------

    def status(self) -> EngineStatus:
        """See `Host`."""
        load, ledger = self._load, self.protection.ledger
        exposed = sum(ledger.count(parity) for parity in EXPOSED)
        return EngineStatus(
            kind=self.hello.kind,
            model=self.model,
            max_model_len=self.model.max_positions,
            running=load.running,
            waiting=load.waiting,
            pages_total=self.pages,
            pages_held=load.pages_in_use,
            pages_cached=load.pages_cached,
            runs_protected=not exposed,
            unprotected_tokens=exposed * self._page_tokens,
            prompt_tokens=load.prompt_tokens,
            generated_tokens=load.generated_tokens,
            preemptions=load.preemptions,
        )

    def check(self) -> None:
        """Raise AssertionError unless what is mirrored agrees with the ledger."""
        self.protection.check()
        if self.protection.begun:
            sealed = {page.number: page.key for page in self.protection.ledger.sealed_pages}
            assert sealed == self._known(), "the ledger has other pages than the engine told of"
        assert not any(run.held for run in self._runs.values()) or self._quiesced is not None, "a run is held for ever"
        assert self._kept <= self._pins.keys(), "the engine keeps pages for nobody"
