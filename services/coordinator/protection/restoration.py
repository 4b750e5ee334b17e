"""How lost pages come back: what each sequence needs is decoded in order, and it takes part in steps again when that is
there. Cached pages follow later (`cached`).
"""

import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from services.coordinator.events import FindStripes, StripesFound
from services.coordinator.membership.members import Membership
from services.coordinator.outbox import Outside
from services.coordinator.protection.costs import Rates, Stripe, plan_restore, rebuilt, valid_tokens, wanted_keys
from services.coordinator.protection.ledger import PagePool
from services.coordinator.protection.stores import Stores
from services.coordinator.protection.tails import Tails
from services.coordinator.scheduling.scheduler import Scheduler, Sequence
from services.coordinator.views.timeline import Timeline
from shared.messages import RestoreDone, RestorePlan, StripeRestore
from shared.types import GroupConfig, ModelInfo, PageKey, round_pages

log = logging.getLogger(__name__)

PLANS_IN_FLIGHT = 4
"""While one is decoded, the parity of the next ones is on its way."""


@dataclass(slots=True)
class Batch:
    """A RestorePlan under way: the stripes in it, and the ranks' answers."""

    stripes: tuple[StripeRestore, ...]
    tail: bool
    answers: dict[int, RestoreDone] = field(default_factory=dict)


class Restoration:
    """Stripes that wait to be decoded, in order, and the plans under way. `tails`: where those are protected too."""

    def __init__(
        self,
        config: GroupConfig,
        model: ModelInfo,
        membership: Membership,
        scheduler: Scheduler,
        tails: Tails | None,
        stores: Stores,
        timeline: Timeline,
        rates: Rates,
        outside: Outside,
        *,
        always: bool,
    ):
        self._config = config
        self._page_bytes = model.page_bytes
        self._membership = membership
        self._scheduler = scheduler
        self._pool: PagePool = scheduler.pool
        self._stores = stores
        self._timeline = timeline
        self._rates = rates
        self._outside = outside
        self._always = always
        self._planned = False
        self._tails = tails
        self._queue: deque[StripeRestore] = deque()
        self._tail_queue: deque[StripeRestore] = deque()
        self._slots_back: set[int] = set()
        """Single tokens whose KV is there again, in this epoch."""
        self._batches: dict[int, Batch] = {}
        self._plans = 0

    # -- events ------------------------------------------------------------------------------------------------------

    def interrupted(self) -> None:
        """The epoch is over, and with it the plans under way."""
        self._planned = False
        self._queue.clear()
        self._tail_queue.clear()
        self._slots_back.clear()
        for batch in self._batches.values():
            self._unpin(batch)
        self._batches.clear()

    def plan(self) -> None:
        """Look up what the running sequences lack, while the ranks still connect."""
        running, epoch = self._scheduler.running, self._membership.epoch
        tails = self._tails.keys(running) if self._tails is not None else []
        keys = (*wanted_keys(self._pool, running), *tails)
        if keys and self._config.protection != "none":
            self._outside.ask(FindStripes("restore", epoch, keys, self._stores.infos()))
        else:
            self.planned(epoch, StripesFound({}))

    def planned(self, epoch: int, found: StripesFound) -> None:
        """The index has told: begin to restore, if the epoch that it was asked for lasts."""
        if epoch != self._membership.epoch or self._membership.state == "forming":
            return
        if found.trouble:
            log.warning("the stripe index can't be read: %s", found.trouble)
        stripes = found.stripes
        returns = plan_restore(
            self._pool,
            self._scheduler.running,
            stripes,
            self._rates,
            page_bytes=self._page_bytes,
            page_tokens=self._config.page_tokens,
            always=self._always,
            copies=self._config.protection == "replicate",
        )
        self._timeline.chosen(returns)
        for each in returns:
            log.info(
                "a request comes back",
                extra={
                    "request": each.sequence.request.request_id,
                    "way": each.way,
                    "pages": len(each.stripes),
                    "expected_restore_s": round(each.restore_s, 4),
                    "expected_recompute_s": round(each.recompute_s, 4),
                },
            )
            self._queue.extend(each.stripes)
        coming = {stripe.page for stripe in self._queue}
        for each in returns:
            self._tail_queue.extend(self._tail_stripes(each.sequence, coming, stripes))
        self._planned = True
        self._send()

    def _tail_stripes(
        self, sequence: Sequence, coming: Collection[int], stripes: Mapping[PageKey, Stripe]
    ) -> Iterator[StripeRestore]:
        """How to rebuild the tokens after the pages that are there or `coming`, as far as they have stripes."""
        if self._tails is None:
            return
        there = 0
        for page, key in zip(sequence.pages, sequence.keys, strict=False):
            if (self._pool.pages[page].missing and page not in coming) or self._pool.pages[page].key != key:
                break
            there += 1
        for token in self._tails.run(sequence, there * self._config.page_tokens):
            stripe = rebuilt(token.slot, token.key, self._pool.pages[token.page].missing, stripes)
            if stripe is None:
                return
            yield stripe

    def done(self, message: RestoreDone) -> None:
        """A rank's part in a plan is over; with the last one, what came back counts as there."""
        batch = self._batches.get(message.plan)
        if batch is None:
            return
        batch.answers[message.rank] = message
        if len(batch.answers) < self._config.size:
            return
        del self._batches[message.plan]
        failed = {key for answer in batch.answers.values() for key in answer.failed}
        if trouble := next((answer.reason for answer in batch.answers.values() if answer.failed), ""):
            log.warning("%d pages could not be restored: %s", len(failed), trouble)
        log.debug("a plan is done", extra={"plan": message.plan, "stripes": len(batch.stripes), "failed": len(failed)})
        good = [stripe for stripe in batch.stripes if stripe.key not in failed]
        for stripe in good:
            if batch.tail:
                self._slots_back.add(stripe.page)
            else:
                self._pool.restored(stripe.page, stripe.key)
        self._unpin(batch)
        if batch.tail:
            self._timeline.tail_decoded(len(good))
        elif self._membership.state != "serving":
            self._timeline.decoded(len(good), batch.answers.values())
        else:
            self._pool.forget(stripe.page for stripe in batch.stripes if stripe.key in failed)
        self._send()

    def add(self, stripes: Iterable[StripeRestore]) -> None:
        """Restore these too, after all others."""
        self._queue.extend(stripes)
        self._send()

    @property
    def idle(self) -> bool:
        """Whether nothing is to be restored."""
        return not self._queue and not self._tail_queue and not self._batches

    def settle(self, now: float) -> bool:
        """Let sequences take part in steps of which nothing more will come back. True when none is left."""
        if not self._planned:
            return False
        under_way = {stripe.page for stripe in self._queue}
        under_way.update(self._page(stripe, tail=True) for stripe in self._tail_queue)
        for batch in self._batches.values():
            under_way.update(self._page(stripe, tail=batch.tail) for stripe in batch.stripes)
        for sequence in [each for each in self._scheduler.running if each.lost]:
            if under_way.isdisjoint(sequence.pages):
                valid = self._with_tail(sequence, valid_tokens(self._pool, sequence, self._config.page_tokens))
                recomputed = self._scheduler.truncate(sequence, valid)
                self._timeline.returned(sequence, recomputed, now)
        return not any(each.lost for each in self._scheduler.running)

    def _with_tail(self, sequence: Sequence, valid: int) -> int:
        """The tokens that are valid, with those whose KV came back one by one."""
        size = self._config.page_tokens
        while valid < sequence.computed:
            index = valid // size
            end = min(sequence.computed, (index + 1) * size)
            slots = range(
                sequence.pages[index] * size + valid % size, sequence.pages[index] * size + (end - 1) % size + 1
            )
            back = next((i for i, slot in enumerate(slots) if slot not in self._slots_back), len(slots))
            if back:
                self._pool.mend(sequence.pages[index], whole=back == len(slots))
            valid += back
            if back < len(slots):
                return valid
        return valid

    def measured(self, now: float) -> None:
        """The running sequences' pages are all back: how fast that was counts for the next time."""
        recovery = self._timeline.current
        if recovery is not None:
            self._rates.saw_restore(recovery.restored_pages * self._page_bytes, now - recovery.joined)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Keep PLANS_IN_FLIGHT plans at the ranks, each of one round of exchange."""
        while (self._tail_queue or self._queue) and len(self._batches) < PLANS_IN_FLIGHT:
            tail = bool(self._tail_queue)
            queue = self._tail_queue or self._queue
            most = round_pages(self._page_bytes // self._config.page_tokens if tail else self._page_bytes)
            stripes = [queue.popleft() for _ in range(min(most, len(queue)))]
            stripes = [each for each in stripes if self._current(each, tail=tail)]
            if not stripes:
                continue
            for stripe in stripes:
                self._pool.pin(self._page(stripe, tail=tail))
            self._plans += 1
            self._batches[self._plans] = Batch(tuple(stripes), tail)
            self._outside.to_ranks(RestorePlan(self._membership.epoch, self._plans, tuple(stripes), tail))

    def _current(self, stripe: StripeRestore, *, tail: bool) -> bool:
        """Whether that is still to be done: its request may have ended meanwhile, and the page have been given away."""
        page = self._pool.pages[self._page(stripe, tail=tail)]
        known = page.holders > 0 if tail else page.key == stripe.key
        return known and tuple(sorted(page.missing)) == stripe.lost

    def _page(self, stripe: StripeRestore, *, tail: bool) -> int:
        return stripe.page // self._config.page_tokens if tail else stripe.page

    def _unpin(self, batch: Batch) -> None:
        for stripe in batch.stripes:
            self._pool.unpin(self._page(stripe, tail=batch.tail))
