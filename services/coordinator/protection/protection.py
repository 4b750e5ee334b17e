"""Protection of one engine's pages, as that engine, the epochs and the operator see it. Pure.

`sealed` and `step_done` lead to parity in the stores; after a loss `formed`, `plan` and `advance` lead back to whole
pages.
"""

import logging
from collections.abc import Iterable

from services.coordinator.events import FindStripes, StripesFound
from services.coordinator.membership.members import Formation, Membership
from services.coordinator.outbox import Outbox
from services.coordinator.protection.background import Background
from services.coordinator.protection.encoding import Encoding
from services.coordinator.protection.host import Host, Span
from services.coordinator.protection.ledger import Ledger
from services.coordinator.protection.moves import Moves
from services.coordinator.protection.rates import Rates
from services.coordinator.protection.restoration import Restoration
from services.coordinator.protection.stores import Stores
from services.coordinator.protection.tails import Tails
from services.coordinator.views.metrics import Metrics
from services.coordinator.views.timeline import Timeline, tell_recovery
from shared.config import CoordinatorSettings
from shared.messages import PagesCopied, Prepared, ProtectDone, RestoreDone
from shared.tracing import Tracing
from shared.types import GroupConfig, PageKey, RecoveryRecord

log = logging.getLogger(__name__)


class Protection:
    """The ledger of one host's pages, and all that becomes of them."""

    def __init__(
        self,
        config: GroupConfig,
        settings: CoordinatorSettings,
        host: Host,
        pages: int,
        page_bytes: int,
        page_tokens: int,
        membership: Membership,
        stores: Stores,
        outbox: Outbox,
        metrics: Metrics,
        tracing: Tracing,
        *,
        step_tokens: int,
        alike: bool = False,
        moves: bool = True,
    ):
        """`step_tokens`: a step computes no more. `alike`: all ranks hold equal bytes. `moves`: a rank can move."""
        protect = config.protection != "none"
        self.ledger = Ledger(host, pages, protect=protect, acks=config.encoders, alike=alike)
        self.ledger.now = outbox.now
        self.timeline = Timeline()
        self.rates = Rates(step_tokens=step_tokens)
        self._rows = config.shards // config.encoders  # of a stripe, that one rank puts
        self._warm: set[int] = set()
        """Ranks that have protected something: the first time opens connections, and tells nothing of rates."""
        self._tails = None
        if settings.protect_tail and config.protection == "parity":
            self._tails = Tails(host, self.ledger, page_tokens)
        self.encoding = Encoding(config, membership, host, self.ledger, self._tails, stores, outbox)
        self.restoration = Restoration(
            config, page_bytes, page_tokens, membership, host, self.ledger, self._tails, stores, self.timeline,
            self.rates, outbox, always=settings.restore == "always", alike=alike,
        )  # fmt: skip
        self.background = Background(page_bytes, membership, host, self.ledger, stores, self.restoration, outbox)
        self.moves = Moves(membership, host, self.ledger, page_bytes, outbox, possible=moves)
        self._size = config.size
        self._host = host
        self._membership = membership
        self._stores = stores
        self._outbox = outbox
        self._metrics = metrics
        self._tracing = tracing

    @property
    def begun(self) -> bool:
        """Whether it is known which pages there are."""
        return self.encoding.begun

    # -- the engine --------------------------------------------------------------------------------------------------

    def sealed(self, page: int, key: PageKey) -> None:
        """A page is full and whole on every rank. No other page has its key."""
        self.ledger.sealed(page, key)

    def dropped(self, pages: Iterable[int]) -> None:
        """These pages are given away, or about to be written again."""
        for page in pages:
            self.ledger.dropped(page)
            self.background.dropped(page)
            self.moves.dropped(page)
            if self._tails is not None:
                self._tails.page_dropped(page)

    def pinned(self, pages: Iterable[int]) -> None:
        """These pages are kept, as `Host.confirm` asked."""
        pages = list(pages)
        self.encoding.pinned(pages)
        self.background.pinned(pages)

    def unused(self, page: int) -> None:
        """No request stands on a sealed page any more: of its single tokens none is wanted back."""
        if self._tails is not None:
            self._tails.page_dropped(page)

    def rewound(self, page: int, offset: int) -> None:
        """What is on an open page from this token on is written again."""
        if self._tails is not None:
            self._tails.page_dropped(page, offset)

    def step_done(self, step: int, spans: Iterable[Span]) -> None:
        """All ranks have the KV of this step; it wrote these tokens of open pages."""
        self.encoding.step_done(step, spans)

    # -- ranks -------------------------------------------------------------------------------------------------------

    def protect_done(self, done: ProtectDone) -> None:
        """A rank tells what became of the stripes that it encoded."""
        self._metrics.protect_done(done)
        if not done.failed and done.rank in self._warm:
            self.rates.saw_protect(done.parity_bytes // self._rows, done.seconds)
        self._warm.add(done.rank)
        self.encoding.done(done)

    def restore_done(self, done: RestoreDone) -> None:
        """A rank has come further in a restore."""
        self._metrics.restore_done(done)
        self.restoration.done(done)
        self.advance()

    def prepared(self, message: Prepared) -> None:
        """The successor of a rank that moves has its weights."""
        self.moves.prepared(message)

    def copied(self, message: PagesCopied) -> None:
        """The successor of a rank that moves has pages."""
        self.moves.copied(message, self._outbox.now)

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """What waits for its time goes on."""
        now = self._outbox.now
        if self._membership.stepping:
            self.encoding.retry(now)
        if self._membership.state == "serving" and self.timeline.current is None:
            self.moves.tick(now)
        self.background.tick()

    # -- loss and return ---------------------------------------------------------------------------------------------

    def interrupted(self) -> None:
        """The epoch is over: nothing under way counts any more."""
        self.restoration.interrupted()
        self.background.interrupted()
        self.moves.interrupted()
        self.encoding.interrupted()

    def formed(self, formation: Formation, born: float) -> None:
        """An epoch begins: lost slices are missing from now on, but for those that workers that returned have.

        `born`: when this coordinator started; what ranks have from before it is adopted.
        """
        if not self.encoding.begun:
            returned = {
                rank: self._host.inventory(formation.ranks[rank], held) for rank, held in formation.returned.items()
            }
            self.ledger.adopt(returned, self._size)
            if any(held.epoch for held in formation.returned.values()):  # a hosted engine begins with ranks of no epoch
                recovery = self.timeline.interrupted("the coordinator was restarted", formation.epoch, born)
                recovery.lost.update(formation.fresh - returned.keys())
                log.info("ranks %s are back with %d pages", sorted(returned), len(self.ledger.keys))
            return
        self.ledger.lose(formation.fresh)
        self._warm -= formation.fresh
        for rank, held in formation.returned.items():
            self.ledger.reclaim(rank, held.pages)
        self.moves.formed(formation)

    def plan(self) -> None:
        """Look up what running requests lack, while the ranks connect."""
        self.restoration.plan()

    def found(self, question: FindStripes, found: StripesFound) -> None:
        """The index, or the stores, told where parity lies."""
        match question.purpose:
            case "restore":
                self.restoration.found(question, found)
                self.advance()
            case "cached":
                self.background.found(question.epoch, found)
            case "recognise":
                self.encoding.looked_up(question, found)

    def advance(self) -> None:
        """Let runs go on whose KV is back as far as it will be; with the last one, serve as usual again."""
        if not self._membership.stepping:
            return
        now = self._outbox.now
        if self.restoration.settle(now) and self._membership.state == "restoring":
            self.restoration.measured(now)
            self._membership.restored()
            self.encoding.resumed()
            for way in self.timeline.restored(now):
                self._metrics.recovered.labels(way).inc()
            log.info("serving", extra={"idle_pages_lost": self.ledger.lost})
            self._host.resume()
            if self.timeline.current is None:
                self.background.begin()
            self._outbox.changed = True
        self.progressed()

    def progressed(self) -> None:
        """Close the recovery's record when every run has the KV it had; then the idle pages' turn has come."""
        if self.timeline.current is None:
            return
        computed = {run.number: run.computed for run in self._host.runs()}
        record = self.timeline.progressed(computed, self._membership.epoch, self._outbox.now)
        if record is not None:
            self._recovered(record)
            self.background.begin()
            self._outbox.changed = True

    def _recovered(self, record: RecoveryRecord) -> None:
        self._metrics.recovery_ended(record)
        tell_recovery(self._tracing, record)
        if record.planned:
            log.info("a rank was moved", extra={"stall_s": round((record.ended or 0.0) - record.started, 4)})
            return
        phases = {f"{phase}_s": round(seconds, 4) for phase, seconds in record.phases()}
        log.info("recovered", extra={"lost_ranks": record.lost_ranks, "streams": record.sequences} | phases)

    def check(self) -> None:
        """Raise AssertionError unless the ledger agrees with itself."""
        self.ledger.check()
