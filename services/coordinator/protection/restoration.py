"""How lost pages come back: what each run needs is decoded in order, and it goes on when that is there.

The ranks do the work: a plan names pages in order, they go through it window by window and say after each how far they
are. Idle pages follow later (`background`).
"""

import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from services.coordinator.events import FindStripes, StripesFound
from services.coordinator.membership.members import Membership
from services.coordinator.outbox import Outbox
from services.coordinator.protection.costs import StoredStripe, choose, redundancy_of, restorable, wanted_keys
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
        self._planned = False
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
        self._planned = False
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
        epoch = self._membership.epoch
        tails = self._tails.keys() if self._tails is not None else []
        keys = (*wanted_keys(self._ledger, self._host.runs()), *tails)
        if keys and self._config.protection != "none" and self.redundancy.stored:
            self._outbox.ask(FindStripes("restore", epoch, keys, self._stores.infos()))
        else:
            self.planned(epoch, StripesFound({}))

    def planned(self, epoch: int, found: StripesFound) -> None:
        """The index has told: begin to restore, if the epoch that it was asked for lasts."""
        if epoch != self._membership.epoch or self._membership.state == "forming":
            return
        if found.trouble:
            log.warning("the stripe index can't be read: %s", found.trouble)
        choices = choose(
            self._ledger,
            self._host.runs(),
            found.stripes,
            self._rates,
            page_bytes=self._page_bytes,
            page_tokens=self._page_tokens,
            always=self._always,
            redundancy=self.redundancy,
            now=self._outbox.now,
        )
        self._timeline.chosen(choices)
        for choice in choices:
            log.info(
                "a request comes back",
                extra={
                    "request": choice.run.request_id,
                    "way": choice.way,
                    "pages": len(choice.stripes),
                    "expected_restore_s": round(choice.restore_s, 4),
                    "expected_recompute_s": round(choice.recompute_s, 4),
                },
            )
            self._queue.extend(choice.stripes)
        self._expect(stripe.page for stripe in self._queue)
        sealed = frozenset(self._coming)
        for choice in choices:
            self._tail_queue.extend(self._tail_stripes(choice.run, sealed, found.stripes))
        self._expect(self._page(stripe, tail=True) for stripe in self._tail_queue)
        for run in self._host.runs():
            coming = [page for page in run.pages if page in self._coming]
            self._left[run.number] = len(coming)
            for page in coming:
                self._wait_for.setdefault(page, []).append(run.number)
        self._planned = True
        self._send()

    def _tail_stripes(
        self, run: Run, coming: Collection[int], stripes: Mapping[PageKey, StoredStripe]
    ) -> Iterator[StripeRestore]:
        """How to rebuild the tokens after the pages that are there or `coming`, as far as they have stripes."""
        if self._tails is None:
            return
        there = 0
        for page, key in zip(run.pages, run.keys, strict=False):
            if (self._ledger.missing(page) and page not in coming) or self._ledger.key(page) != key:
                break
            there += 1
        for token in self._tails.after(run, there * self._page_tokens):
            stripe = restorable(token.slot, token.key, self._ledger.missing(token.page), stripes)
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
        """Let runs go on of which nothing more will come back. True when none is left."""
        if not self._planned:
            return False
        for run in [each for each in self._host.runs() if each.held and not self._left.get(each.number)]:
            valid = self._with_tail(run, self._ledger.valid_tokens(run, self._page_tokens))
            self._ledger.forget(run.pages[-(-valid // self._page_tokens) :])
            self._timeline.returned(run.number, self._host.returned(run.number, valid), now)
        return not any(run.held for run in self._host.runs())

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
