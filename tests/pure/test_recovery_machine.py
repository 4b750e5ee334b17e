"""Membership, the ledger and the restore plan through random interleavings of events, with duplicates and late ones.

What each worker really has is kept beside them: a page counts as there on a rank only where its worker has it.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.coordinator.membership.members import Formation, Held, Member, Membership
from services.coordinator.protection.costs import StoredStripe, restorable
from services.coordinator.protection.ledger import Parity
from shared.messages import ParityShard
from shared.types import PageKey, next_page_key
from tests.pure.dictionary_host import DictionaryHost, EmbeddedPages
from tests.pure.driven_host import Driven

SIZE, PAGES = 2, 6
pick = st.integers(0, 1 << 16)


@dataclass
class Worker:
    """A process. `has` is what is in its pool: page -> key."""

    name: str
    rank: int | None = None
    epoch: int = 0
    has: dict[int, PageKey] = field(default_factory=dict)


class Recovery(RuleBasedStateMachine):
    """One group of two ranks over the pages of a host; runs stand on sealed pages."""

    host_type: type[Driven]

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.journal = 0
        self.serial = 0
        self.workers: dict[str, Worker] = {}
        self.stored: set[PageKey] = set()
        self.seen: list[PageKey] = []
        self.coordinator_starts()
        for _ in range(SIZE):
            self._comes(None)
        self.forms(0.0, joins=True)

    def coordinator_starts(self) -> None:
        self.members = Membership(SIZE, heartbeat_timeout_s=1, join_timeout_s=1, epoch=self.journal, return_grace_s=1)
        self.host = self.host_type(PAGES)
        self.ledger = self.host.ledger
        self.adopted = False

    # -- workers -----------------------------------------------------------------------------------------------------

    @rule(returns=st.booleans(), which=pick)
    @precondition(lambda self: len(self.members.members) < SIZE + 2)
    def a_worker_comes(self, returns: bool, which: int) -> None:
        away = [worker for worker in self.workers.values() if worker.name not in self.members.members]
        self._comes(away[which % len(away)] if returns and away else None)

    def _comes(self, worker: Worker | None) -> None:
        if worker is None:
            self.serial += 1
            worker = self.workers[f"w{self.serial}"] = Worker(f"w{self.serial}")
        self.members.hello(Member(worker.name, "host", "host", 1, "cpu", self.now))
        held = None if worker.rank is None else Held(worker.epoch, worker.rank, dict(worker.has))
        self.members.ready(worker.name, self.now, held if self.members.state == "forming" else None)

    @rule(which=pick, dies=st.booleans(), replaced=st.booleans())
    @precondition(lambda self: self.members.members)
    def a_worker_is_lost(self, which: int, dies: bool, replaced: bool) -> None:
        name = sorted(self.members.members)[which % len(self.members.members)]
        self.members.gone(name, "lost")
        assert self.members.gone(name, "once more") is None
        if dies:
            del self.workers[name]
        if replaced:
            self._comes(None)
            self.forms(2.0, joins=True)

    @rule(
        away=st.sets(st.integers(0, SIZE + 1), max_size=2), spares=st.integers(0, 2), later=st.sampled_from([0.0, 2.0])
    )
    @precondition(lambda self: self.ledger.keys)
    def the_coordinator_dies(self, away: set[int], spares: int, later: float) -> None:
        self.coordinator_starts()
        for number, worker in enumerate(list(self.workers.values())):
            if number not in away:
                self._comes(worker)
        for _ in range(spares):
            self._comes(None)
        self.forms(later, joins=True)

    @rule()
    @precondition(lambda self: self.members.state != "forming")
    def the_epoch_breaks(self) -> None:
        self.members.restart("broken")

    # -- an epoch ----------------------------------------------------------------------------------------------------

    @rule(later=st.sampled_from([0.0, 2.0]), joins=st.booleans())
    def forms(self, later: float, joins: bool) -> None:
        self.now += later
        if self.members.can_form(self.now):
            self.journal = max(self.journal, self.members.newest_epoch) + 1
            self._begins(self.members.form(self.journal, self.now))
            if joins:
                self.the_ranks_join(0, 1)

    def _begins(self, formation: Formation) -> None:
        for rank, name in enumerate(formation.ranks):
            worker = self.workers[name]
            if worker.rank != rank:
                worker.has.clear()
            worker.rank, worker.epoch = rank, formation.epoch
        for name in self.members.members.keys() - set(formation.ranks):
            self.workers[name].rank = None
            self.workers[name].has.clear()
        inventories = {rank: held.pages for rank, held in formation.returned.items()}
        if self.adopted:
            self.ledger.lose(formation.fresh)
            for rank, pages in inventories.items():
                self.ledger.reclaim(rank, pages)
        else:
            self.ledger.adopt(inventories, SIZE)
            self.adopted = True

    @rule(of=st.integers(-1, 0), times=st.integers(1, 2))
    def the_ranks_join(self, of: int, times: int) -> None:
        epoch = self.members.epoch + of
        for _ in range(times):
            self.members.rendezvous(epoch)
            for name in [name for name in self.members.ranks if name is not None]:
                if self.members.joined(epoch, name):
                    assert of == 0
                    self.members.restored()

    # -- pages -------------------------------------------------------------------------------------------------------

    def serving(self) -> bool:
        return self.members.state == "serving"

    @rule(salts=st.lists(st.integers(0, 3), min_size=1, max_size=3))
    @precondition(serving)
    def pages_are_computed(self, salts: list[int]) -> None:
        for salt in salts:
            table = self.host.begin(1)
            if table is None:
                return
            key = next_page_key(b"", [salt])
            for name in self.members.ranks:
                self.workers[str(name)].has[table.pages[0]] = key
            self.host.fill(table, key)
            self.seen.append(key)

    @rule(which=st.lists(pick, max_size=3))
    def runs_end(self, which: list[int]) -> None:
        for number in which:
            if self.host.tables:
                self.host.end(self.host.tables[number % len(self.host.tables)])

    @rule(which=pick, whole=st.booleans())
    @precondition(lambda self: self.seen)
    def a_page_is_found(self, which: int, whole: bool) -> None:
        found = self.host.begin(0, [self.seen[which % len(self.seen)]], whole=whole)
        assert found is not None
        assert not whole or not any(self.ledger.missing(number) for number in found.pages)

    @rule(which=pick, comes_back=st.booleans())
    def a_lost_page_is_restored_or_forgotten(self, which: int, comes_back: bool) -> None:
        lost = [(page, page.key) for page in self.ledger if page.missing and page.key is not None]
        if not lost or self.members.state == "forming":
            return
        page, key = lost[which % len(lost)]
        stripes = {key: StoredStripe((ParityShard(SIZE, "here", 0),), (0,) * SIZE) for key in self.stored}
        plan = restorable(page.number, key, page.missing, stripes)
        if plan is None or not comes_back:
            self.ledger.forget([page.number])
            return
        assert plan.key in self.stored
        assert len(plan.lost) == 1
        assert self._has(1 - plan.lost[0], page.number) == plan.key
        self.ledger.restored(plan.page, b"what was there before")
        assert self.ledger.missing(plan.page)
        self.workers[str(self.members.ranks[plan.lost[0]])].has[page.number] = plan.key
        self.ledger.restored(plan.page, plan.key)

    # -- protection --------------------------------------------------------------------------------------------------

    @rule(limit=st.integers(1, 3))
    @precondition(serving)
    def protection_starts(self, limit: int) -> None:
        for page in self.ledger.start_protection(limit, PAGES):
            assert self.ledger.key(page) is not None
            assert self.ledger.is_whole(page)

    @rule(which=pick, protected=st.booleans(), times=st.integers(1, 2))
    @precondition(lambda self: self.seen)
    def protection_ends(self, which: int, protected: bool, times: int) -> None:
        key = self.seen[which % len(self.seen)]
        page = self.ledger.find(key)
        pending = page is not None and self.ledger.parity(page) is Parity.PENDING
        for _ in range(times):
            if pending and protected:
                self.stored.add(key)
            self.ledger.end_protection([key], 0, protected=protected, reason="none")
        self.stored.difference_update(self.ledger.take_released())

    @rule()
    def the_store_is_lost(self) -> None:
        self.stored.clear()
        self.ledger.protection_lost()

    @rule(which=pick)
    @precondition(lambda self: self.seen)
    def a_stripe_is_lost(self, which: int) -> None:
        key = self.seen[which % len(self.seen)]
        self.stored.discard(key)
        self.ledger.shards_lost([key])

    @rule()
    def the_index_is_read(self) -> None:
        self.ledger.found_protected([key for key in self.ledger.unprotected() if key in self.stored])

    @rule()
    def protection_is_tried_again(self) -> None:
        self.ledger.protect_again(Parity.UNPROTECTED, Parity.PENDING)

    # -- what holds --------------------------------------------------------------------------------------------------

    def _has(self, rank: int, number: int) -> PageKey | None:
        return self.workers[str(self.members.ranks[rank])].has.get(number)

    @invariant()
    def all_agrees(self) -> None:
        self.stored.difference_update(self.ledger.take_released())
        self.members.check()
        self.host.check()
        for page in self.ledger:
            if page.parity is Parity.PROTECTED:
                assert page.key in self.stored, f"{page} is protected by nothing"
            if page.key is not None and self.members.state != "forming":
                for rank in set(range(SIZE)) - page.missing:
                    assert self._has(rank, page.number) == page.key, f"rank {rank} has not {page}"


class OverDictionaries(Recovery):
    """The host that is nothing but dictionaries."""

    host_type = DictionaryHost


class OverThePrefixCache(Recovery):
    """The embedded engine's pages."""

    host_type = EmbeddedPages


TestOverDictionaries = OverDictionaries.TestCase
TestOverThePrefixCache = OverThePrefixCache.TestCase
TestOverDictionaries.settings = TestOverThePrefixCache.settings = settings(max_examples=150, stateful_step_count=50)
