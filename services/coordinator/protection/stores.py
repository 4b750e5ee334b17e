"""The parity stores that are alive."""

from services.coordinator.events import Peer
from services.coordinator.outbox import Outbox
from shared.messages import Message
from shared.types import StoreInfo


class Stores:
    """Stores by id, each with its connection."""

    def __init__(self, outbox: Outbox):
        self._outbox = outbox
        self._alive: dict[str, tuple[StoreInfo, Peer]] = {}
        self._draining: set[str] = set()

    def join(self, store: StoreInfo, peer: Peer) -> None:
        """A store offers its memory; one of the same id before it is gone."""
        self._alive[store.store_id] = (store, peer)
        self._draining.discard(store.store_id)

    def leave(self, store_id: str, peer: Peer) -> bool:
        """A store's channel closed. False if another has taken its place already."""
        known = self._alive.get(store_id)
        if known is None or known[1] != peer:
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
        self._outbox.to_all((peer for _, peer in self._alive.values()), message)
