"""How lost pages come back: what each run needs is decoded in order, and it goes on when that is there.

Where their parity is, is looked up part by part, while the ranks are at what was found before. They do the work: a plan
names pages in order, they go through it window by window and say after each how far they are. Idle pages follow later
(`background`).
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from services.coordinator.events import FindStripes, StripesFound
from services.coordinator.membership.members import Membership
from services.coordinator.outbox import Outbox
from services.coordinator.protection.costs import Choice, StoredStripe, Ways, redundancy_of, restorable
from services.coordinator.protection.host import Host, Run
from services.coordinator.protection.ledger import Ledger
from services.coordinator.protection.rates import Rates
from services.coordinator.protection.stores import Stores
from services.coordinator.protection.tails import Tails
from services.coordinator.views.timeline import Timeline
from shared.messages import RestoreDone, RestorePlan, StripeRestore
from shared.types import GroupConfig, PageKey

log = logging.getLogger(__name__)

PLAN_STRIPES = 2048
"""In one plan: a frame of far less than the channel's limit."""
LOOKED_UP = 4096
"""So many stripes are looked up at a time."""
LOOKUPS_IN_FLIGHT = 2
PLANS_IN_FLIGHT = 2
"""While the ranks are at the end of one, they have the next."""


@dataclass(slots=True)
class Batch:
    """A RestorePlan under way: how many of its stripes each rank that decodes is done with, and which failed."""

    stripes: tuple[StripeRestore, ...]
    tail: bool
    progress: dict[int, int]
    settled: int = 0
    failed: set[PageKey] = field(default_factory=set)


class Restoration:
    """Stripes that wait to be decoded, in order, and the plans under way. `tails`: where those are protected too."""

    def __init__(
        self,
        config: GroupConfig,
        page_bytes: int,
        page_tokens: int,
        membership: Membership,
        host: Host,
        ledger: Ledger,
        tails: Tails | None,
        stores: Stores,
        timeline: Timeline,
        rates: Rates,
        outbox: Outbox,
        *,
        always: bool,
        alike: bool = False,
    ):
        self._config = config
        self._page_bytes = page_bytes
        self._page_tokens = page_tokens
        self._membership = membership
        self._host = host
        self._ledger = ledger
        self._tails = tails
        self._stores = stores
        self._timeline = timeline
        self._rates = rates
        self._outbox = outbox
        self._always = always
        self.redundancy = redundancy_of(config, alike=alike)
        self._ways: Ways | None = None
        """While it is not known of all runs how they come back."""
        self._lookups: deque[tuple[PageKey, ...]] = deque()
        """Keys that are to be looked up; of the first LOOKUPS_IN_FLIGHT that has been asked."""
        self._found: dict[PageKey, StripesFound] = {}
        """Answers that came before an earlier one, by their first key."""
        self._planned = False
        self._chosen: set[int] = set()  # runs of which it is known what comes back for them
        self._tail_parity: dict[PageKey, StoredStripe] = {}
        self._pages_chosen: set[int] = set()  # sealed pages that are restored; kept where tails are protected
        self._queue: deque[StripeRestore] = deque()
        self._tail_queue: deque[StripeRestore] = deque()
        self._coming: dict[int, int] = {}
        """Page -> stripes of it, of the whole page or of single tokens, that are on their way."""
        self._wait_for: dict[int, list[int]] = {}  # page that is coming -> runs that need it
        self._left: dict[int, int] = {}  # run -> pages that are coming for it
        self._slots_back: set[int] = set()  # single tokens whose KV is there again, in this epoch
        self._batches: dict[int, Batch] = {}
        self._plans = 0

    # -- events ------------------------------------------------------------------------------------------------------

    def interrupted(self) -> None:
        """The epoch is over, and with it the plans under way."""
        self._planned, self._ways = False, None
        self._lookups.clear()
        self._found.clear()
        self._chosen.clear()
        self._tail_parity.clear()
        self._pages_chosen.clear()
        self._queue.clear()
        self._tail_queue.clear()
        self._coming.clear()
        self._slots_back.clear()
        self._wait_for.clear()
        self._left.clear()
        for batch in self._batches.values():
            for stripe in batch.stripes[batch.settled :]:
                self._host.unpin(self._page(stripe, tail=batch.tail))
        self._batches.clear()

    def plan(self) -> None:
        """Look up what the running requests lack, while the ranks still connect."""
        self._ways = Ways(
            self._ledger,
            self._host.runs(),
            self._rates,
            page_bytes=self._page_bytes,
            page_tokens=self._page_tokens,
            always=self._always,
            redundancy=self.redundancy,
        )
        keys = (*(self._tails.keys() if self._tails is not None else ()), *self._ways.keys())
        self._lookups.extend(keys[start : start + LOOKED_UP] for start in range(0, len(keys), LOOKED_UP))
        if not keys or self._config.protection == "none" or not self.redundancy.stored:
            self._lookups.clear()
            self._look_at(keys, StripesFound({}))
            self._send()
        for part in list(self._lookups)[:LOOKUPS_IN_FLIGHT]:
            self._look_up(part)

    def _look_up(self, keys: tuple[PageKey, ...]) -> None:
        self._outbox.ask(FindStripes("restore", self._membership.epoch, keys, self._stores.infos()))

    def found(self, question: FindStripes, found: StripesFound) -> None:
        """The index has told: begin to restore, if the epoch that it was asked for lasts."""
        if question.epoch != self._membership.epoch or self._ways is None:
            return
        self._found[question.keys[0]] = found
        while self._lookups and (answer := self._found.pop(self._lookups[0][0], None)) is not None:
            keys = self._lookups.popleft()
            if len(self._lookups) >= LOOKUPS_IN_FLIGHT:
                self._look_up(self._lookups[LOOKUPS_IN_FLIGHT - 1])
            self._look_at(keys, answer)
        self._send()

    def _look_at(self, keys: tuple[PageKey, ...], found: StripesFound) -> None:
        """Decide what comes back, as far as these keys let it be known."""
        if found.trouble:
            log.warning("the stripe index can't be read: %s", found.trouble)
        if self._tails is not None:
            self._tail_parity.update((key, stripe) for key, stripe in found.stripes.items() if self._tails.knows(key))
        assert self._ways is not None
        runs = {run.number for run in self._host.runs()}
        for choice in self._ways.found(keys, found.stripes, runs=runs, now=self._outbox.now):
            self._choose(choice)
        if not self._lookups:
            self._planned, self._ways = True, None
            for run in self._host.runs():
                if run.number not in self._chosen:
                    self._wait(run)

    def _choose(self, choice: Choice) -> None:
        """So much of a run comes back. What it recomputes may come back for another: it does not go on before all is
        known.
        """
        self._timeline.chosen(choice)
        self._queue.extend(choice.stripes)
        self._expect(stripe.page for stripe in choice.stripes)
        if self._tails is not None:
            self._pages_chosen.update(stripe.page for stripe in choice.stripes)
        if not choice.last:
            return
        log.info(
            "a request comes back",
            extra={
                "request": choice.run.request_id,
                "way": choice.way,
                "pages": choice.pages,
                "expected_restore_s": round(choice.restore_s, 4),
                "expected_recompute_s": round(choice.recompute_s, 4),
            },
        )
        tail = list(self._tail_stripes(choice.run))
        self._tail_queue.extend(tail)
        self._expect(self._page(stripe, tail=True) for stripe in tail)
        if choice.way != "recompute":
            self._wait(choice.run)

    def _wait(self, run: Run) -> None:
        """It is known what comes back for a run: it goes on when that is there."""
        self._chosen.add(run.number)
        coming = [page for page in run.pages if page in self._coming]
        self._left[run.number] = len(coming)
        for page in coming:
            self._wait_for.setdefault(page, []).append(run.number)

    def _tail_stripes(self, run: Run) -> Iterator[StripeRestore]:
        """How to rebuild the tokens after the pages that are there or come back, as far as they have stripes."""
        if self._tails is None:
            return
        there = 0
        for page, key in zip(run.pages, run.keys, strict=False):
            if (self._ledger.missing(page) and page not in self._pages_chosen) or self._ledger.key(page) != key:
                break
            there += 1
        for token in self._tails.after(run, there * self._page_tokens):
            stripe = restorable(token.slot, token.key, self._ledger.missing(token.page), self._tail_parity)
            if stripe is None:
                return
            yield stripe

    def done(self, message: RestoreDone) -> None:
        """A rank has come so far in a plan; what all that decode a page are done with counts as there."""
        batch = self._batches.get(message.plan)
        if batch is None or message.rank not in batch.progress:
            return
        batch.progress[message.rank] = max(batch.progress[message.rank], message.upto)
        batch.failed.update(message.failed)
        if message.failed:
            log.warning("%d pages could not be restored: %s", len(message.failed), message.reason)
        if not batch.tail and self._membership.state != "serving":
            self._timeline.decoded(message)
        upto = min(min(batch.progress.values()), len(batch.stripes))
        for stripe in batch.stripes[batch.settled : upto]:
            self._settle_stripe(stripe, batch)
        batch.settled = max(batch.settled, upto)
        if batch.settled == len(batch.stripes):
            del self._batches[message.plan]
            log.debug("a plan is done", extra={"plan": message.plan, "stripes": len(batch.stripes)})
        self._send()

    def _settle_stripe(self, stripe: StripeRestore, batch: Batch) -> None:
        good = stripe.key not in batch.failed
        page = self._page(stripe, tail=batch.tail)
        if batch.tail and good:
            self._slots_back.add(stripe.page)
            self._timeline.tail_decoded(1)
        elif good:
            self._ledger.restored(page, stripe.key)
            if self._membership.state != "serving":
                self._timeline.page_restored()
        elif not batch.tail and self._membership.state == "serving":
            self._ledger.forget((page,))
        self._host.unpin(page)
        self._arrived(page)

    def add(self, stripes: Iterable[StripeRestore]) -> None:
        """Restore these too, after all others."""
        stripes = list(stripes)
        self._expect(stripe.page for stripe in stripes)
        self._queue.extend(stripes)
        self._send()

    @property
    def idle(self) -> bool:
        """Whether nothing is to be restored."""
        return not self._queue and not self._tail_queue and not self._batches

    def settle(self, now: float) -> bool:
        """Let runs go on for which nothing more will come back. True when none is left."""
        chosen = self._chosen
        for run in [each for each in self._host.runs() if each.held and each.number in chosen]:
            if self._left.get(run.number):
                continue
            valid = self._with_tail(run, self._ledger.valid_tokens(run, self._page_tokens))
            self._ledger.forget(run.pages[-(-valid // self._page_tokens) :])
            self._timeline.returned(run.number, self._host.returned(run.number, valid), now)
        return self._planned and not any(run.held for run in self._host.runs())

    def _with_tail(self, run: Run, valid: int) -> int:
        """The tokens that are valid, with those whose KV came back one by one."""
        size = self._page_tokens
        while valid < run.computed:
            index = valid // size
            if index < len(run.keys) and self._ledger.key(run.pages[index]) != run.keys[index]:
                return valid  # it is open, or another's, by now
            end = min(run.computed, (index + 1) * size)
            slots = range(run.pages[index] * size + valid % size, run.pages[index] * size + (end - 1) % size + 1)
            back = next((i for i, slot in enumerate(slots) if slot not in self._slots_back), len(slots))
            if back:
                self._ledger.tokens_restored(run.pages[index], whole=back == len(slots))
            valid += back
            if back < len(slots):
                return valid
        return valid

    def measured(self, now: float) -> None:
        """The running requests' pages are all back: how fast that was counts for the next time."""
        recovery = self._timeline.current
        if recovery is not None:
            self._rates.saw_restore(recovery.restored_pages * self._page_bytes, now - recovery.joined, now)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Keep PLANS_IN_FLIGHT plans at the ranks."""
        while (self._tail_queue or self._queue) and len(self._batches) < PLANS_IN_FLIGHT:
            tail = bool(self._tail_queue)
            queue = self._tail_queue or self._queue
            taken = [queue.popleft() for _ in range(min(PLAN_STRIPES, len(queue)))]
            stripes = []
            for stripe in taken:
                if self._current(stripe, tail=tail):
                    self._host.pin(self._page(stripe, tail=tail))
                    stripes.append(stripe)
                else:
                    self._arrived(self._page(stripe, tail=tail))
            if not stripes:
                continue
            self._plans += 1
            decoding = {rank: 0 for stripe in stripes for rank in stripe.lost}
            self._batches[self._plans] = Batch(tuple(stripes), tail, decoding)
            self._outbox.to_ranks(RestorePlan.of(self._membership.epoch, self._plans, stripes, tail))

    def _current(self, stripe: StripeRestore, *, tail: bool) -> bool:
        """Whether that is still to be done: its request may have ended meanwhile, and the page have been given away."""
        page = self._page(stripe, tail=tail)
        known = tail or self._ledger.key(page) == stripe.key
        return known and tuple(sorted(self._ledger.missing(page))) == stripe.lost

    def _expect(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._coming[page] = self._coming.get(page, 0) + 1

    def _arrived(self, page: int) -> None:
        """A stripe that was on its way is there, or won't be."""
        self._coming[page] -= 1
        if self._coming[page] <= 0:
            del self._coming[page]
            for run in self._wait_for.pop(page, ()):
                self._left[run] -= 1

    def _page(self, stripe: StripeRestore, *, tail: bool) -> int:
        return stripe.page // self._page_tokens if tail else stripe.page
