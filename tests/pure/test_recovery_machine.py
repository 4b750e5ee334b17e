"""Membership, pages and the restore plan through random interleavings of events, with duplicates and late arrivals.

What each worker really has is kept beside them: a page counts as there on a rank only where its worker has it.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.coordinator.membership.members import Formation, Held, Member, Membership
from services.coordinator.protection.costs import Stripe, restorable
from services.coordinator.protection.ledger import PagePool, Shadow
from shared.messages import ParityShard
from shared.types import PageKey, next_page_key

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
    """One group of two ranks; sequences are page tables of sealed pages, each followed by one that is being written."""

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
        self.pool = PagePool(PAGES, protect=True)
        self.adopted = False
        self.tables: list[list[int]] = []

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
    @precondition(lambda self: self.pool.keys)
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
            self.pool.lose(formation.fresh)
            for rank, pages in inventories.items():
                self.pool.reclaim(rank, pages)
        else:
            self.pool.adopt(inventories, SIZE)
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
            taken = self.pool.allocate(1)
            if taken is None:
                return
            key = next_page_key(b"", [salt])
            for name in self.members.ranks:
                self.workers[str(name)].has[taken[0]] = key
            self.tables.append([self.pool.seal(taken[0], key)])
            self.seen.append(key)

    @rule(which=st.lists(pick, max_size=3))
    def sequences_end(self, which: list[int]) -> None:
        for number in which:
            if self.tables:
                self.pool.release(self.tables.pop(number % len(self.tables)))

    @rule(which=pick, whole=st.booleans())
    @precondition(lambda self: self.seen)
    def a_page_is_found(self, which: int, whole: bool) -> None:
        found = self.pool.match([self.seen[which % len(self.seen)]], whole=whole)
        self.tables.append(found)
        assert not whole or not any(self.pool.pages[number].missing for number in found)

    @rule(which=pick, comes_back=st.booleans())
    def a_lost_page_is_restored_or_forgotten(self, which: int, comes_back: bool) -> None:
        lost = [page for page in self.pool.pages if page.missing and page.key is not None]
        if not lost or self.members.state == "forming":
            return
        page = lost[which % len(lost)]
        stripes = {key: Stripe((ParityShard(SIZE, "here", 0),), (0,) * SIZE) for key in self.stored}
        plan = restorable(page, stripes)
        if plan is None or not comes_back:
            self.pool.forget([page.number])
            return
        assert plan.key in self.stored
        assert len(plan.lost) == 1
        assert self._has(1 - plan.lost[0], page.number) == plan.key
        self.pool.restored(plan.page, b"what was there before")
        assert self.pool.pages[plan.page].missing
        self.workers[str(self.members.ranks[plan.lost[0]])].has[page.number] = plan.key
        self.pool.restored(plan.page, plan.key)

    # -- protection --------------------------------------------------------------------------------------------------

    @rule(limit=st.integers(1, 3))
    @precondition(serving)
    def protection_starts(self, limit: int) -> None:
        for page in self.pool.start_protection(limit, PAGES):
            assert page.key is not None
            assert not page.missing

    @rule(which=pick, protected=st.booleans(), times=st.integers(1, 2))
    @precondition(lambda self: self.seen)
    def protection_ends(self, which: int, protected: bool, times: int) -> None:
        key = self.seen[which % len(self.seen)]
        pending = any(page.key == key and page.shadow is Shadow.PENDING for page in self.pool.pages)
        for _ in range(times):
            if pending and protected:
                self.stored.add(key)
            self.pool.end_protection([key], 0, protected=protected, reason="none")
        self.stored.difference_update(self.pool.take_released())

    @rule()
    def the_store_is_lost(self) -> None:
        self.stored.clear()
        self.pool.protection_lost()

    @rule(which=pick)
    @precondition(lambda self: self.seen)
    def a_stripe_is_lost(self, which: int) -> None:
        key = self.seen[which % len(self.seen)]
        self.stored.discard(key)
        self.pool.shards_lost([key])

    @rule()
    def the_index_is_read(self) -> None:
        self.pool.found_protected([key for key in self.pool.unprotected() if key in self.stored])

    @rule()
    def protection_is_tried_again(self) -> None:
        self.pool.protect_again(Shadow.UNPROTECTED, Shadow.PENDING)

    # -- what holds --------------------------------------------------------------------------------------------------

    def _has(self, rank: int, number: int) -> PageKey | None:
        return self.workers[str(self.members.ranks[rank])].has.get(number)

    @invariant()
    def all_agrees(self) -> None:
        self.stored.difference_update(self.pool.take_released())
        self.members.check()
        self.pool.check(self.tables)
        for page in self.pool.pages:
            if page.shadow is Shadow.PROTECTED:
                assert page.key in self.stored, f"{page} is protected by nothing"
            if page.key is not None and self.members.state != "forming":
                for rank in set(range(SIZE)) - page.missing:
                    assert self._has(rank, page.number) == page.key, f"rank {rank} has not {page}"


TestRecovery = Recovery.TestCase
TestRecovery.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
