"""Recovery of pages: survivors send their slices, stores the parity, and a new rank decodes its own into its pool.

A plan is gone through in windows, each one round of exchange; the parity of the next ones is read meanwhile. What is
done for a window is done for all of its pages at once.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np

from services.worker.device import Device
from services.worker.memory import Ids, Rows, Sums, write
from services.worker.shadow.coder import Coder
from services.worker.shadow.exchange import Came, Exchange
from services.worker.shadow.parity_reader import DAMAGED, ParityReader, Stored
from services.worker.shadow.stores import StoreClients
from services.worker.shadow.windows import Alike, Window, lost_pages, windows
from shared.errors import CommunicatorAborted, DeadlineExceeded
from shared.messages import RestoreDone, RestorePlan
from shared.types import PageKey, round_pages

log = logging.getLogger(__name__)

Trouble = dict[PageKey, str]
"""Why stripes could not be decoded."""


class Restorer:
    """One rank's part in restoring: a sender where it survived, a decoder where it is new."""

    def __init__(self, group: str, coder: Coder, stores: StoreClients, loop: asyncio.AbstractEventLoop, device: Device):
        self._coder = coder
        self._device = device
        self._parity = ParityReader(group, stores, loop, device)
        self._windows: dict[tuple[int, int], list[Window]] = {}
        """Of plans that are prefetched, by epoch and number."""

    def prefetch(self, plan: RestorePlan, rank: int, length: int) -> None:
        """Begin to read what `rank` has lost, before its turn comes or the ranks are even connected."""
        found = self._windows[plan.epoch, plan.plan] = list(
            windows(plan, round_pages(length, self._device.round_bytes))
        )
        for window in found:
            if mine := {group.number: self._share(group, rank) for group in _of(window, rank) if group.kind.shards}:
                self._parity.ask((plan.epoch, plan.plan, window.start), mine, length)

    def forget(self) -> None:
        """The epoch is over: give up what was begun; who waits for it is told so."""
        self._windows.clear()
        self._parity.forget()

    def restore(self, plan: RestorePlan, exchange: Exchange, report: Callable[[RestoreDone], None]) -> None:
        """Take part in a plan; a rank that decodes reports after each window.

        Raises CommunicatorAborted when the epoch ends; nothing is written to the pool any more then.
        """
        decodes = bool(lost_pages(plan, exchange.rank))
        for window in self._windows.pop((plan.epoch, plan.plan), None) or windows(plan, exchange.round_pages):
            done = self._window(plan, window, exchange)
            if decodes:
                report(done)

    def _window(self, plan: RestorePlan, window: Window, exchange: Exchange) -> RestoreDone:
        began = time.monotonic()
        came = self._gather(window, exchange)
        exchanged = time.monotonic()
        stored = self._parity.take((plan.epoch, plan.plan, window.start))
        fetched = time.monotonic()
        mine, failed, wrong = list(_of(window, exchange.rank)), dict[PageKey, str](), 0
        for group in mine:
            read = stored.get(group.number)
            came_wrong = self._bring_back(group, read, came, exchange)
            wrong += len(came_wrong)
            failed |= _unread(group, read) | came_wrong
        return RestoreDone(
            epoch=plan.epoch,
            plan=plan.plan,
            rank=exchange.rank,
            upto=window.start + len(window.pages),
            failed=tuple(failed),
            reason=next(iter(failed.values()), ""),
            bytes_restored=(sum(len(group.keys) for group in mine) - len(failed)) * exchange.pool.page_bytes,
            fetch_s=fetched - exchanged,
            exchange_s=exchanged - began,
            decode_s=time.monotonic() - fetched,
            seconds=time.monotonic() - began,
            damaged=wrong + sum(each.damaged for each in stored.values()),
        )

    def _gather(self, window: Window, exchange: Exchange) -> Came:
        """Bring the survivors' slices to the ranks that decode; see Exchange.gather."""
        return exchange.gather(window.pages, window.receivers(exchange.size))

    def _share(self, group: Alike, rank: int) -> Stored:
        """What `rank` reads of stripes."""
        kind = group.kind
        return Stored(group.keys, kind.shards, kind.addresses, group.shard_sums, len(kind.lost))

    def _bring_back(self, group: Alike, read: Stored | None, came: Came, exchange: Exchange) -> Trouble:
        """Restore this rank's slices of what is alike, as far as it was read. Returns what came out wrong."""
        try:
            if not group.kind.shards:  # all ranks hold the same
                self._copy(group, came, exchange)
                return {}
            if read is None:
                return {}
            wrong = self._decode(group, np.arange(len(group.keys)), read, came, exchange)
            while len(wrong) and self._parity.replace(read, wrong.tolist(), lambda: exchange.ended):
                wrong = self._decode(group, wrong, read, came, exchange)
            return {group.keys[at]: f"page {group.pages[at]}, decoded, {DAMAGED}" for at in wrong.tolist()}
        except (CommunicatorAborted, DeadlineExceeded):
            raise
        except Exception as error:  # the exchange goes on: what could not be decoded is recomputed
            log.exception("pages could not be decoded")
            return dict.fromkeys(group.keys, f"{type(error).__name__}: {error}")

    def _copy(self, group: Alike, came: Came, exchange: Exchange) -> None:
        source = next(rank for rank in range(exchange.size) if rank not in group.kind.lost)
        with exchange.writing():
            targets = exchange.targets(group.pages)
            for place, row in zip(targets, came.of(source, group.at), strict=True):
                write(place, row)
            exchange.pool.wrote(group.pages, targets)
            exchange.communicator.check()  # else these may be bytes that never came

    def _decode(self, group: Alike, stripes: Ids, read: Stored, came: Came, exchange: Exchange) -> Ids:
        """Decode those of these stripes that lack no row, straight into the pool. Returns what came out wrong."""
        wrong = []
        for at in _equal(read.held, stripes):
            pages = group.pages[at]
            with exchange.writing():
                targets = exchange.targets(pages)
                sums, told = self._decode_alike(group, at, read, came, targets, exchange)
                good = sums == told
                exchange.pool.wrote(pages[good], targets.take(np.flatnonzero(good)))
                exchange.communicator.check()  # else these may be bytes that never came
            wrong.append(at[~good])
        return np.concatenate(wrong) if wrong else stripes[:0]

    def _decode_alike(
        self, group: Alike, at: Ids, read: Stored, came: Came, targets: Rows, exchange: Exchange
    ) -> tuple[Sums, Sums]:
        """Decode stripes of which the same rows are there. Returns their checksums, and the recorded ones."""
        present = {rank: came.of(rank, group.at[at]) for rank in range(exchange.size) if rank not in group.kind.lost}
        for rows, held in zip(read.rows, read.held[:, at[0]].tolist(), strict=True):
            present[read.shards[held]] = Rows(rows, at)
        plan = self._coder.codec.plan(present.keys(), [exchange.rank])
        sums = self._coder.decode(plan, [present[source] for source in plan.sources], targets)
        return sums, group.slice_sums[at, group.kind.lost.index(exchange.rank)]


def _of(window: Window, rank: int) -> Iterator[Alike]:
    return (group for group in window.groups if rank in group.kind.lost)


def _unread(group: Alike, read: Stored | None) -> Trouble:
    """What can't be decoded, since too few rows of it could be had."""
    if not group.kind.shards:
        return {}
    if read is None:
        return dict.fromkeys(group.keys, "its parity was not asked for")
    lacks = np.flatnonzero((read.held < 0).any(axis=0)).tolist()
    return {group.keys[at]: read.trouble.get(at, "no shard is left to try") for at in lacks}


def _equal(held: Ids, stripes: Ids) -> Iterator[Ids]:
    """Those of these stripes that lack no row, each time those that have the same ones."""
    whole = stripes[(held[:, stripes] >= 0).all(axis=0)]
    while len(whole):
        same = (held[:, whole] == held[:, whole[:1]]).all(axis=0)
        yield whole[same]
        whole = whole[~same]
