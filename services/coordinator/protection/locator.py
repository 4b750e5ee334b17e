"""Where the parity of stripes lies: the index says it; where it does not answer, or has forgotten, the stores do."""

import asyncio
import itertools
import logging
from collections.abc import Collection, Mapping, Sequence

from services.coordinator.events import FindStripes, StripesFound
from services.coordinator.protection.costs import StoredStripe
from shared.channel import Channel
from shared.errors import GhostError
from shared.messages import FindShards, HeldShard, ParityShard, ShardsFound
from shared.stripe_index import StripeIndex
from shared.types import PageKey, StoreInfo

log = logging.getLogger(__name__)

STORES_DEADLINE_S = 2.0
"""A recovery does not wait longer for what a store has to say."""
KEYS_AT_ONCE = 4096


class Locator:
    """Asks the index and the stores about the stripes of one group."""

    def __init__(self, index: StripeIndex, group: str):
        self._index = index
        self._group = group
        self._channels: dict[str, Channel] = {}  # by store id
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[tuple[HeldShard, ...]]] = {}

    def joins(self, store_id: str, channel: Channel) -> None:
        """A store can be asked from now on."""
        self._channels[store_id] = channel

    def leaves(self, channel: Channel) -> None:
        """A channel is closed: if it was a store's, that can't be asked any more."""
        self._channels = {store_id: known for store_id, known in self._channels.items() if known is not channel}

    def told(self, message: ShardsFound) -> None:
        """A store's answer."""
        asked = self._asked.get(message.question)
        if asked is not None and not asked.done():
            asked.set_result(message.shards)

    async def find(self, question: FindStripes) -> StripesFound:
        """What there is of these stripes' parity. `trouble` is told only where nobody can say it of all of them."""
        found: dict[PageKey, StoredStripe] = {}
        trouble = ""
        try:
            found = await self._in_index(question)
        except GhostError as error:
            trouble = str(error)
        unknown = [key for key in question.keys if key not in found]
        if question.purpose == "recognise" or not unknown:
            return StripesFound(found, trouble)  # a page is protected when the index says so
        in_stores, all_answered = await self._in_stores(unknown, question.stores)
        if trouble:
            log.warning("the stripe index can't be read, so the stores were asked: %s", trouble)
        return StripesFound(found | in_stores, "" if all_answered else trouble)

    async def _in_index(self, question: FindStripes) -> dict[PageKey, StoredStripe]:
        stores = {store.store_id: store for store in question.stores}
        incarnations = {store_id: store.incarnation for store_id, store in stores.items()}
        found = {}
        for key, entry in (await self._index.get_many(self._group, question.keys)).items():
            if shards := entry.alive(incarnations):
                parity = tuple(
                    ParityShard(shard.number, stores[shard.store_id].bulk_address, shard.checksum) for shard in shards
                )
                found[key] = StoredStripe(parity, shards[0].data_checksums)
        return found

    async def _in_stores(
        self, keys: Sequence[PageKey], stores: Collection[StoreInfo]
    ) -> tuple[dict[PageKey, StoredStripe], bool]:
        """What the stores have of these stripes, and whether all of them answered."""
        asked = {store.bulk_address: self._ask(store.store_id, keys) for store in stores}
        answers = await asyncio.gather(*asked.values())
        shards: dict[PageKey, dict[int, ParityShard]] = {}
        checksums: dict[PageKey, tuple[int, ...]] = {}
        for address, answer in zip(asked, answers, strict=True):
            for held in answer or ():
                shards.setdefault(held.key, {})[held.shard] = ParityShard(held.shard, address, held.checksum)
                checksums[held.key] = held.data_checksums
        found = {key: StoredStripe(_ordered(parity), checksums[key]) for key, parity in shards.items()}
        return found, None not in answers

    async def _ask(self, store_id: str, keys: Sequence[PageKey]) -> list[HeldShard] | None:
        """One store's answer; None if it gives none in time."""
        channel = self._channels.get(store_id)
        if channel is None or channel.closed:
            return None
        numbers = []
        try:
            for start in range(0, len(keys), KEYS_AT_ONCE):
                number = next(self._numbers)
                numbers.append(number)
                self._asked[number] = asyncio.get_running_loop().create_future()
                channel.send(FindShards(number, self._group, tuple(keys[start : start + KEYS_AT_ONCE])))
            async with asyncio.timeout(STORES_DEADLINE_S):
                parts = [await self._asked[number] for number in numbers]
        except (GhostError, TimeoutError) as error:
            log.warning("store %s does not say what it has: %s", store_id, str(error) or "no answer in time")
            return None
        finally:
            for number in numbers:
                self._asked.pop(number, None)
        return [held for part in parts for held in part]


def _ordered(parity: Mapping[int, ParityShard]) -> tuple[ParityShard, ...]:
    return tuple(parity[number] for number in sorted(parity))
