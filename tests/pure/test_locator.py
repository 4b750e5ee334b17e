"""Where parity lies, when the index does not say it: the stores are asked, and none of them is waited for long."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from services.coordinator.events import FindStripes
from services.coordinator.protection.costs import StoredStripe
from services.coordinator.protection.locator import Locator
from shared.errors import PeerLost
from shared.messages import FindShards, HeldShard, Message, ParityShard, ShardsFound
from shared.stripe_index import ShardEntry, StripeEntry
from shared.types import PageKey, StoreInfo

KEYS = tuple(bytes([number]) * 16 for number in range(4))
STORES = tuple(StoreInfo(f"s{n}", f"life-{n}", f"tcp://s{n}", "", 1) for n in range(2))
K = 3


class Index:
    """What Redis says, or that it is away."""

    def __init__(self, known: Sequence[PageKey] = (), *, away: bool = False):
        self._known, self._away = known, away

    async def get_many(self, group: str, keys: Sequence[PageKey]) -> dict[PageKey, StripeEntry]:
        assert group == "g"
        if self._away:
            raise PeerLost("Redis: gone")
        return {key: StripeEntry(key, (_entry(key, 0),)) for key in keys if key in self._known}


class StoreChannel:
    """A store that has some shards, and says so at once, or never."""

    closed = False

    def __init__(self, locator: Locator, number: int, held: Sequence[PageKey], *, silent: bool = False):
        self._locator, self._number, self._held, self._silent = locator, number, held, silent
        self.asked: list[FindShards] = []
        locator.joins(f"s{number}", cast(Any, self))

    def send(self, message: Message) -> None:
        assert isinstance(message, FindShards)
        self.asked.append(message)
        if not self._silent:
            shards = tuple(_held(key, self._number) for key in message.keys if key in self._held)
            asyncio.get_running_loop().call_soon(self._locator.told, ShardsFound(message.question, shards))


def _entry(key: PageKey, number: int) -> ShardEntry:
    return ShardEntry(key, K + number, f"s{number}", f"life-{number}", 1, K, 2, 64, 7 + number, (1, 2, 3))


def _held(key: PageKey, number: int) -> HeldShard:
    return HeldShard(key, K + number, 7 + number, (1, 2, 3))


def _stripe(*numbers: int) -> StoredStripe:
    return StoredStripe(tuple(ParityShard(K + n, f"tcp://s{n}", 7 + n) for n in numbers), (1, 2, 3))


def _made(index: Index) -> Locator:
    return Locator(cast(Any, index), "g")


async def test_what_the_index_knows_nobody_else_is_asked_for() -> None:
    locator = _made(Index(KEYS))
    store = StoreChannel(locator, 0, KEYS)
    found = await locator.find(FindStripes("restore", 5, KEYS, STORES))
    assert found.stripes == {key: _stripe(0) for key in KEYS}
    assert not store.asked


async def test_without_redis_the_stores_tell_and_their_shards_make_one_stripe() -> None:
    locator = _made(Index(away=True))
    StoreChannel(locator, 0, KEYS[:2])
    StoreChannel(locator, 1, KEYS[1:3])
    found = await locator.find(FindStripes("restore", 5, KEYS, STORES))
    assert found.stripes == {KEYS[0]: _stripe(0), KEYS[1]: _stripe(0, 1), KEYS[2]: _stripe(1)}
    assert not found.trouble  # all said what they have: there is no more


async def test_what_redis_has_forgotten_is_asked_of_the_stores() -> None:
    locator = _made(Index(KEYS[:1]))
    stores = [StoreChannel(locator, number, KEYS) for number in range(2)]
    found = await locator.find(FindStripes("cached", 5, KEYS, STORES))
    assert [message.keys for store in stores for message in store.asked] == [KEYS[1:], KEYS[1:]]
    assert found.stripes == {KEYS[0]: _stripe(0)} | {key: _stripe(0, 1) for key in KEYS[1:]}


async def test_only_the_index_says_that_a_page_is_protected() -> None:
    locator = _made(Index(KEYS[:1]))
    store = StoreChannel(locator, 0, KEYS)
    found = await locator.find(FindStripes("recognise", 5, KEYS, STORES))
    assert set(found.stripes) == {KEYS[0]}
    assert not store.asked


@pytest.mark.parametrize("gone", [False, True], ids=["silent", "not connected"])
async def test_a_store_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    monkeypatch.setattr("services.coordinator.protection.locator.STORES_DEADLINE_S", 0.01)
    locator = _made(Index(away=True))
    StoreChannel(locator, 0, KEYS)
    silent = StoreChannel(locator, 1, KEYS, silent=True)
    if gone:
        locator.leaves(cast(Any, silent))
    found = await locator.find(FindStripes("cached", 5, KEYS, STORES))
    assert found.stripes == {key: _stripe(0) for key in KEYS}
    assert found.trouble == "Redis: gone"  # there may be more
    locator.told(ShardsFound(2, ()))  # too late: nobody waits for it any more


async def test_many_keys_are_asked_for_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.coordinator.protection.locator.KEYS_AT_ONCE", 3)
    locator = _made(Index(away=True))
    store = StoreChannel(locator, 0, KEYS)
    found = await locator.find(FindStripes("restore", 5, KEYS, STORES[:1]))
    assert [message.keys for message in store.asked] == [KEYS[:3], KEYS[3:]]
    assert set(found.stripes) == set(KEYS)
