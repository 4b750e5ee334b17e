"""Recovery of pages: survivors send their slices, stores the parity, and a new rank decodes its own into its pool.

A plan is gone through in windows, each one round of exchange; the parity of the next ones is read meanwhile.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from kernels.codec import DecodePlan
from services.worker.device import Device
from services.worker.memory import Memory, write
from services.worker.shadow.coder import Coder
from services.worker.shadow.exchange import Exchange
from services.worker.shadow.parity_reader import DAMAGED, ParityReader, Stored
from services.worker.shadow.stores import StoreClients
from shared.messages import RestoreDone, RestorePlan, StripeRestore
from shared.types import round_pages

log = logging.getLogger(__name__)

Trouble = dict[bytes, str]
"""Why stripes could not be decoded, by page key."""


class Restorer:
    """One rank's part in restoring: a sender where it survived, a decoder where it is new."""

    def __init__(self, group: str, coder: Coder, stores: StoreClients, loop: asyncio.AbstractEventLoop, device: Device):
        self._coder = coder
        self._device = device
        self._parity = ParityReader(group, stores, loop, device)

    def prefetch(self, plan: RestorePlan, rank: int, length: int) -> None:
        """Begin to read what `rank` has lost, before its turn comes or the ranks are even connected."""
        window = round_pages(length, self._device.round_bytes)
        for start in range(0, len(plan.stripes), window):
            stripes = plan.stripes[start : start + window]
            if mine := {stripe.key: self._share(stripe, rank) for stripe in stripes if rank in stripe.lost}:
                self._parity.ask((plan.epoch, plan.plan, start), mine, length)

    def forget(self) -> None:
        """The epoch is over: give up what was begun; who waits for it is told so."""
        self._parity.forget()

    def restore(self, plan: RestorePlan, exchange: Exchange, report: Callable[[RestoreDone], None]) -> None:
        """Take part in a plan; a rank that decodes reports after each window.

        Raises CommunicatorAborted when the epoch ends; nothing is written to the pool any more then.
        """
        decodes = any(exchange.rank in stripe.lost for stripe in plan.stripes)
        for start in range(0, len(plan.stripes), exchange.round_pages):
            done = self._window(plan, start, exchange)
            if decodes:
                report(done)

    def _window(self, plan: RestorePlan, start: int, exchange: Exchange) -> RestoreDone:
        stripes = plan.stripes[start : start + exchange.round_pages]
        began = time.monotonic()
        slices = self._gather(stripes, exchange)
        exchanged = time.monotonic()
        stored = self._parity.take((plan.epoch, plan.plan, start))
        fetched = time.monotonic()
        failed: Trouble = {}
        ready: list[tuple[StripeRestore, dict[int, Memory], Stored]] = []
        for index, by_rank in slices.items():
            rows = stored.get(stripes[index].key)
            if rows is None:
                failed[stripes[index].key] = "its parity was not asked for"
            elif rows.missing:
                failed[stripes[index].key] = rows.trouble
            else:
                ready.append((stripes[index], by_rank, rows))
        with exchange.writing():
            try:
                decoded_wrong = self._decode(ready, exchange)
            except Exception as error:  # the exchange goes on: what could not be decoded is recomputed
                log.exception("pages could not be decoded")
                decoded_wrong = {stripe.key: f"{type(error).__name__}: {error}" for stripe, _, _ in ready}
            exchange.communicator.check()  # else these may be bytes that never came
        failed |= decoded_wrong
        return RestoreDone(
            epoch=plan.epoch,
            plan=plan.plan,
            rank=exchange.rank,
            upto=start + len(stripes),
            failed=tuple(failed),
            reason=next(iter(failed.values()), ""),
            bytes_restored=(len(slices) - len(failed)) * exchange.pool.page_bytes,
            fetch_s=fetched - exchanged,
            exchange_s=exchanged - began,
            decode_s=time.monotonic() - fetched,
            seconds=time.monotonic() - began,
            damaged=len(decoded_wrong) + sum(each.damaged for each in stored.values()),
        )

    def _gather(self, stripes: Sequence[StripeRestore], exchange: Exchange) -> dict[int, dict[int, Memory]]:
        """Bring the survivors' slices to the ranks that decode; see Exchange.gather."""
        return exchange.gather([stripe.page for stripe in stripes], [stripe.lost for stripe in stripes])

    def _share(self, stripe: StripeRestore, rank: int) -> Stored:
        """What `rank` reads of a stripe."""
        return Stored(deque(stripe.parity), len(stripe.lost) if stripe.parity else 0)

    def _decode(
        self, ready: Sequence[tuple[StripeRestore, Mapping[int, Memory], Stored]], exchange: Exchange
    ) -> Trouble:
        """Decode this rank's slices straight into its pool, those of one kind in one call. Returns what was wrong."""
        batches: dict[tuple[int, ...], tuple[DecodePlan, list[StripeRestore], list[list[Memory]], list[Memory]]] = {}
        places = exchange.targets([stripe.page for stripe, _, _ in ready])
        for (stripe, by_rank, stored), place in zip(ready, places, strict=True):
            if not stripe.parity:  # all ranks hold the same
                write(place, next(iter(by_rank.values())))
                exchange.pool.wrote(stripe.page, place)
                continue
            present = {**by_rank, **stored.rows}
            plan = self._coder.codec.plan(present.keys(), [exchange.rank])
            _, stripes, sources, targets = batches.setdefault(plan.sources, (plan, [], [], []))
            stripes.append(stripe)
            sources.append([present[source] for source in plan.sources])
            targets.append(place)
        wrong: Trouble = {}
        for plan, stripes, sources, targets in batches.values():
            sums = self._coder.decode(plan, sources, targets)
            for stripe, target, told in zip(stripes, targets, sums, strict=True):
                if told == stripe.data_checksums[exchange.rank]:
                    exchange.pool.wrote(stripe.page, target)
                else:
                    wrong[stripe.key] = f"page {stripe.page}, decoded, {DAMAGED}"
        return wrong
