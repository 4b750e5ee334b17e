"""The stripe index after Redis has forgotten it: each store writes the entries of what it holds again."""

import asyncio
import logging

from services.parity_store.index_writer import IndexWriter
from services.parity_store.shards import Shard, ShardTable
from shared.errors import GhostError, PeerLost
from shared.stripe_index import StripeIndex

log = logging.getLogger(__name__)

LOOK_S = 0.5
_BATCH = 2048  # shards whose entries are queued at once


async def keep_index(
    index: StripeIndex, table: ShardTable, writer: IndexWriter, store_id: str, incarnation: str
) -> None:
    """Look whether Redis still knows this life of the store, and tell it all entries if not; for ever.

    The mark is set after the entries are written, so that what is forgotten meanwhile is told again.
    """
    while True:
        try:
            if not await index.knows(store_id, incarnation):
                count = await _write_all(table, writer)
                await index.know(store_id, incarnation)
                if count:
                    log.warning("the stripe index had been forgotten: %d entries are written again", count)
        except GhostError as error:
            log.debug("the stripe index is not looked at now: %s", error)
        await asyncio.sleep(LOOK_S)


async def _write_all(table: ShardTable, writer: IndexWriter) -> int:
    """Queue the entries of all shards held, and wait until they are written. Raises PeerLost, or Fenced."""
    count = 0
    for group in table.groups:
        keys = table.keys(group)
        shards = [shard for key in keys for shard in table.stripe(key) if shard.group == group]
        for start in range(0, len(shards), _BATCH):
            await _write(writer, group, table.epochs[group], shards[start : start + _BATCH])
        count += len(shards)
    return count


async def _write(writer: IndexWriter, group: str, epoch: int, shards: list[Shard]) -> None:
    written: asyncio.Future[GhostError | None] = asyncio.get_running_loop().create_future()
    held = [shard for shard in shards if shard.state == "held"]  # others left while the batch before was written
    if not held:
        return
    writer.put(group, epoch, held, lambda error: None if written.done() else written.set_result(error))
    if (error := await written) is not None:
        raise PeerLost(f"the index refused entries: {error}")
