"""A run goes on with what came back for it, and with nothing that has become another's meanwhile."""

from types import SimpleNamespace
from typing import Any, cast

from services.coordinator.events import FindStripes, StripesFound
from services.coordinator.protection.costs import StoredStripe
from services.coordinator.protection.host import Span
from services.coordinator.protection.rates import Rates
from services.coordinator.protection.restoration import Restoration
from services.coordinator.protection.tails import Tails
from services.coordinator.views.timeline import Timeline
from shared.messages import Message, ParityShard, RestoreDone, RestorePlan
from shared.types import PageKey, next_page_key, root_key
from tests.pure.dictionary_host import EmbeddedPages
from tests.pure.driven_host import PAGE_TOKENS
from tests.pure.plans import stripes_of

RANKS = 3
KEY = next_page_key(root_key("m", ""), [1])


class OnePage:
    """A run on a full page that is protected token by token, and two tokens of another; then rank 0 is lost."""

    def __init__(self) -> None:
        self.host = EmbeddedPages(4)
        self.ledger = self.host.ledger
        self.tails = Tails(self.host, self.ledger, PAGE_TOKENS)
        self.sent: list[Message] = []
        self.asked: list[FindStripes] = []
        self.restoration = Restoration(
            cast(Any, SimpleNamespace(protection="parity", size=2)),
            page_bytes=1,
            page_tokens=PAGE_TOKENS,
            membership=cast(Any, SimpleNamespace(epoch=2, state="restoring")),
            host=self.host,
            ledger=self.ledger,
            tails=self.tails,
            stores=cast(Any, SimpleNamespace(infos=tuple)),
            timeline=Timeline(),
            rates=Rates(),
            outbox=cast(Any, SimpleNamespace(to_ranks=self.sent.append, ask=self.asked.append, now=0.0)),
            always=True,
        )
        run = self.host.begin(2)
        assert run is not None
        self.run = run
        self.host.fill(run, KEY)
        run.computed = PAGE_TOKENS + 2
        spans = [Span(run.pages[0], 0, PAGE_TOKENS), Span(run.pages[1], 0, 2)]
        for token in self.tails.computed(1, 1, spans):
            self.tails.ended(token.key, protected=True)
        self.ledger.lose({0})
        run.held = True

    def plan(self) -> RestorePlan:
        stripe = StoredStripe((ParityShard(RANKS, "tcp://x:1", 0),), (0,) * RANKS)
        self.restoration.plan()
        (question,) = self.asked
        self.restoration.found(question, StripesFound(dict.fromkeys(self.tails.keys(), stripe)))
        (plan,) = self.sent
        assert isinstance(plan, RestorePlan)
        return plan

    def done(self, plan: RestorePlan, upto: int, failed: tuple[PageKey, ...] = ()) -> None:
        self.restoration.done(RestoreDone(2, plan.plan, 0, upto, failed, "", 0, 0, 0, 0, 0))


def test_a_run_waits_for_its_last_token_and_then_goes_on_with_all() -> None:
    group = OnePage()
    plan = group.plan()
    assert len(plan.keys) == PAGE_TOKENS + 2
    group.done(plan, PAGE_TOKENS + 1)
    assert not group.restoration.settle(0.0)
    group.done(plan, PAGE_TOKENS + 2)
    assert group.restoration.settle(0.0)
    assert (group.run.computed, group.run.keys) == (PAGE_TOKENS + 2, [KEY])
    assert group.ledger.lost == 0
    group.host.check()


def test_a_run_whose_last_tokens_are_not_back_keeps_those_before() -> None:
    group = OnePage()
    plan = group.plan()
    group.done(plan, len(plan.keys), failed=plan.keys[2:])
    assert group.restoration.settle(0.0)
    assert (group.run.computed, group.run.keys) == (2, [])
    assert len(group.run.pages) == 1
    assert group.ledger.lost == 0
    group.host.check()


def test_a_page_whose_name_another_has_taken_is_not_taken_for_a_sealed_one() -> None:
    """While the run waits for its last tokens, a newcomer computes the same page anew."""
    group = OnePage()
    plan = group.plan()
    group.done(plan, PAGE_TOKENS)
    newcomer = group.host.begin(1)
    assert newcomer is not None
    group.host.fill(newcomer, KEY)
    group.done(plan, len(plan.keys))
    assert group.restoration.settle(0.0)
    assert [group.host.key(page) for page in group.run.pages[: len(group.run.keys)]] == group.run.keys
    group.host.check()


def test_an_open_page_of_which_some_tokens_are_back_has_one_writer() -> None:
    """Two runs stood on it while it was sealed: one of them recomputes all of it on a page of its own."""
    group = OnePage()
    other = group.host.begin(0, [KEY], whole=False)
    assert other is not None
    other.held = True
    plan = group.plan()
    group.done(plan, len(plan.keys), failed=tuple(stripe.key for stripe in stripes_of(plan) if stripe.page % 4 > 1))
    assert group.restoration.settle(0.0)
    assert (group.run.computed, group.run.keys) == (2, [])
    assert not set(group.run.pages) & set(other.pages)
    group.host.check()
