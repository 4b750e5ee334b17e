"""Recovery of pages: survivors send their slices, stores the parity, and a new rank decodes its own into its pool.

A plan is gone through in windows, each one round of exchange; the parity of the next ones is read meanwhile. What is
done for a window is done for all of its pages at once.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from kernels.codec import DecodePlan
from services.worker.device import Device
from services.worker.memory import Ids, Rows, write
from services.worker.shadow.coder import Coder
from services.worker.shadow.exchange import Came, Exchange
from services.worker.shadow.parity_reader import DAMAGED, ParityReader, Stored
from services.worker.shadow.stores import StoreClients
from services.worker.shadow.windows import Alike, Window, lost_pages, windows
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

    def prefetch(self, plan: RestorePlan, rank: int, length: int) -> None:
        """Begin to read what `rank` has lost, before its turn comes or the ranks are even connected."""
        for window in windows(plan, round_pages(length, self._device.round_bytes)):
            if mine := {group.number: self._share(group, rank) for group in _of(window, rank) if group.kind.shards}:
                self._parity.ask((plan.epoch, plan.plan, window.start), mine, length)

    def forget(self) -> None:
        """The epoch is over: give up what was begun; who waits for it is told so."""
        self._parity.forget()

    def restore(self, plan: RestorePlan, exchange: Exchange, report: Callable[[RestoreDone], None]) -> None:
        """Take part in a plan; a rank that decodes reports after each window.

        Raises CommunicatorAborted when the epoch ends; nothing is written to the pool any more then.
        """
        decodes = bool(lost_pages(plan, exchange.rank))
        for window in windows(plan, exchange.round_pages):
            done = self._window(plan, window, exchange)
            if decodes:
                report(done)

    def _window(self, plan: RestorePlan, window: Window, exchange: Exchange) -> RestoreDone:
        began = time.monotonic()
        came = self._gather(window, exchange)
        exchanged = time.monotonic()
        stored = self._parity.take((plan.epoch, plan.plan, window.start))
        fetched = time.monotonic()
        mine, unread = list(_of(window, exchange.rank)), _unread(window, exchange.rank, stored)
        wrong: Trouble = {}
        with exchange.writing():
            try:
                for group in mine:
                    wrong |= self._decode_all(group, stored, came, exchange)
            except Exception as error:  # the exchange goes on: what could not be decoded is recomputed
                log.exception("pages could not be decoded")
                wrong = {key: f"{type(error).__name__}: {error}" for group in mine for key in group.keys}
            exchange.communicator.check()  # else these may be bytes that never came
        failed = unread | wrong
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
            damaged=len(wrong) + sum(each.damaged for each in stored.values()),
        )

    def _gather(self, window: Window, exchange: Exchange) -> Came:
        """Bring the survivors' slices to the ranks that decode; see Exchange.gather."""
        return exchange.gather(window.pages, window.receivers(exchange.size))

    def _share(self, group: Alike, rank: int) -> Stored:
        """What `rank` reads of stripes."""
        kind = group.kind
        return Stored(group.keys, kind.shards, kind.addresses, group.shard_sums, len(kind.lost))

    def _decode_all(self, group: Alike, stored: Mapping[int, Stored], came: Came, exchange: Exchange) -> Trouble:
        """Restore this rank's slices of what is alike and read. Returns what came out wrong."""
        if not group.kind.shards:  # all ranks hold the same
            self._copy(group, came, exchange)
            return {}
        wrong: Trouble = {}
        if (read := stored.get(group.number)) is not None:
            for at in _equal(read.held):
                bad = self._decode(group, at, read, came, exchange).tolist()
                wrong |= {group.keys[place]: f"page {group.pages[place]}, decoded, {DAMAGED}" for place in bad}
        return wrong

    def _copy(self, group: Alike, came: Came, exchange: Exchange) -> None:
        source = next(rank for rank in range(exchange.size) if rank not in group.kind.lost)
        targets = exchange.targets(group.pages)
        for place, row in zip(targets, came.of(source, group.at), strict=True):
            write(place, row)
        exchange.pool.wrote(group.pages, targets)

    def _decode(self, group: Alike, at: Ids, read: Stored, came: Came, exchange: Exchange) -> Ids:
        """Decode stripes, which have the same rows, straight into the pool. Returns those that came out wrong."""
        present = {rank: came.of(rank, group.at[at]) for rank in range(exchange.size) if rank not in group.kind.lost}
        for rows, held in zip(read.rows, read.held[:, at[0]].tolist(), strict=True):
            present[read.shards[held]] = Rows(rows, at)
        plan: DecodePlan = self._coder.codec.plan(present.keys(), [exchange.rank])
        targets = exchange.targets(group.pages[at])
        sums = self._coder.decode(plan, [present[source] for source in plan.sources], targets)
        good: np.ndarray[Any, np.dtype[np.bool_]] = sums == group.slice_sums[at, group.kind.lost.index(exchange.rank)]
        exchange.pool.wrote(group.pages[at][good], targets.take(np.flatnonzero(good)))
        wrong: Ids = at[~good]
        return wrong


def _of(window: Window, rank: int) -> Iterator[Alike]:
    return (group for group in window.groups if rank in group.kind.lost)


def _unread(window: Window, rank: int, stored: Mapping[int, Stored]) -> Trouble:
    """What a rank lacks and can't decode, since too few rows of it could be had."""
    unread: Trouble = {}
    for group in _of(window, rank):
        if not group.kind.shards:
            continue
        if (read := stored.get(group.number)) is None:
            unread |= dict.fromkeys(group.keys, "its parity was not asked for")
        else:
            lacks = np.flatnonzero((read.held < 0).any(axis=0)).tolist()
            unread |= {group.keys[at]: read.trouble.get(at, "no shard is left to try") for at in lacks}
    return unread


def _equal(held: Ids) -> Iterator[Ids]:
    """The stripes that lack no row, each time those that have the same ones."""
    whole = np.flatnonzero((held >= 0).all(axis=0))
    while len(whole):
        same = (held[:, whole] == held[:, whole[:1]]).all(axis=0)
        yield whole[same]
        whole = whole[~same]
