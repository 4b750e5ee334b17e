"""The parity stores that are alive, and what the index says of the parity that they hold."""

import logging
from collections.abc import Iterable

from services.coordinator.recovery import Stripe
from shared.channel import Channel
from shared.messages import Message, ParityShard
from shared.stripe_index import StripeIndex
from shared.types import PageKey, StoreInfo

log = logging.getLogger(__name__)


class Stores:
    """Stores by id, each with its control channel."""

    def __init__(self, index: StripeIndex, group: str):
        self._index = index
        self._group = group
        self._alive: dict[str, tuple[StoreInfo, Channel]] = {}
        self._draining: set[str] = set()

    def join(self, store: StoreInfo, channel: Channel) -> None:
        """A store offers its memory; one of the same id before it is gone."""
        self._alive[store.store_id] = (store, channel)
        self._draining.discard(store.store_id)

    def leave(self, store_id: str, channel: Channel) -> bool:
        """A store's channel closed. False if another has taken its place already."""
        known = self._alive.get(store_id)
        if known is None or known[1] is not channel:
            return False
        del self._alive[store_id]
        return True

    def drain(self, store_id: str) -> None:
        """A store takes no more shards; those that it has can still be read."""
        self._draining.add(store_id)

    def open(self) -> tuple[StoreInfo, ...]:
        """The stores that take shards."""
        return tuple(store for store, _ in self._alive.values() if store.store_id not in self._draining)

    def infos(self) -> tuple[StoreInfo, ...]:
        """The stores alive."""
        return tuple(store for store, _ in self._alive.values())

    def send(self, message: Message) -> None:
        """Send to all stores."""
        for _, channel in self._alive.values():
            if not channel.closed:
                channel.send(message)

    async def look_up(self, keys: list[PageKey], among: Iterable[StoreInfo]) -> dict[PageKey, Stripe]:
        """The stripes whose parity lies in these stores, in their present life. Raises PeerLost without Redis."""
        stores = {store.store_id: store for store in among}
        incarnations = {store_id: store.incarnation for store_id, store in stores.items()}
        stripes = {}
        for key, entry in (await self._index.get_many(self._group, keys)).items():
            if shards := entry.alive(incarnations):
                parity = tuple(
                    ParityShard(shard.number, stores[shard.store_id].bulk_address, shard.checksum) for shard in shards
                )
                stripes[key] = Stripe(parity, shards[0].data_checksums)
        return stripes
