"""Pages, and single tokens, through the ranks' own exchange, code and decoding; the stores are a dictionary."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio
import torch

from services.worker.communicator import create, open_rendezvous
from services.worker.device import HostDevice
from services.worker.engine.kv_pool import KVPool
from services.worker.shadow import exchange, restore
from services.worker.shadow.coder import make_coder
from services.worker.shadow.exchange import Exchange
from services.worker.shadow.protect import Protector
from services.worker.shadow.restore import Restorer
from shared.errors import CommunicatorAborted, ShardMissing
from shared.messages import ParityShard, ProtectDone, ProtectPlan, RestoreDone, RestorePlan, StripeRestore
from shared.transport.base import GetShards, Outcome, PutShards, ShardLabel
from shared.types import StoreInfo, encoding_rank, pack_ids

K, M, PAGE_TOKENS = 3, 2, 4
STORE = StoreInfo("store", "one", "tcp://store:1", "http://store:1", 1)
HOST = HostDevice()


class Stores:
    """What the ranks put, by key and number."""

    def __init__(self) -> None:
        self.shards: dict[tuple[bytes, int], tuple[ShardLabel, bytes]] = {}

    async def put(self, address: str, request: PutShards, payloads: Sequence[memoryview]) -> tuple[Outcome, ...]:
        for label, payload in zip(request.shards, payloads, strict=True):
            self.shards[label.page_key, label.number] = label, bytes(payload)
        return (None,) * len(request.shards)

    async def get(self, address: str, request: GetShards, into: Sequence[memoryview]) -> tuple[Outcome, ...]:
        outcomes: list[Outcome] = []
        for ref, place in zip(request.shards, into, strict=True):
            known = self.shards.get((ref.page_key, ref.number))
            outcomes.append(None if known else ShardMissing("not here"))
            if known:
                place[:] = known[1]
        return tuple(outcomes)

    def stripe(self, place: int, key: bytes, lost: tuple[int, ...]) -> StripeRestore:
        labels = [label for (of, _), (label, _) in sorted(self.shards.items()) if of == key]
        parity = tuple(ParityShard(label.number, STORE.bulk_address, label.checksum) for label in labels[: len(lost)])
        return StripeRestore(place, key, lost, parity, labels[0].data_checksums)


class Ranks:
    """K ranks in threads, each with a pool of random KV, a protector and a restorer."""

    def __init__(self) -> None:
        self.stores, self.told = Stores(), list[ProtectDone]()
        self.pools = [
            KVPool(pages=5, layers=3, page_tokens=PAGE_TOKENS, kv_heads=2, head_dim=8, dtype=torch.float32)
            for _ in range(K)
        ]
        for rank, pool in enumerate(self.pools):
            pool.kv.copy_(torch.randn(pool.kv.shape, generator=torch.Generator().manual_seed(rank)))
        self._threads = ThreadPoolExecutor(K)
        handle = open_rendezvous("shm", K)
        connecting = [self._threads.submit(create, "shm", handle.address, rank, K, timeout=30) for rank in range(K)]
        self.communicators = [future.result(30) for future in connecting]
        handle.close()
        loop = asyncio.get_running_loop()
        coders = [make_coder(K, M, HOST) for _ in range(K)]
        stores = self.stores
        self.protectors = [Protector("g", coder, stores, loop, self.told.append) for coder in coders]  # type: ignore[arg-type]
        self.restorers = [Restorer("g", coder, stores, loop, HOST) for coder in coders]  # type: ignore[arg-type]

    def _exchange(self, rank: int, *, tail: bool) -> Exchange:
        pool = self.pools[rank]
        return Exchange(self.communicators[rank], pool.tokens if tail else pool)

    async def protect(self, places: list[int], keys: list[bytes], *, tail: bool) -> None:
        plan = ProtectPlan(1, 0, pack_ids(places), tuple(keys), (STORE,), 0, tail)
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(
                loop.run_in_executor(self._threads, each.protect, plan, self._exchange(rank, tail=tail))
                for rank, each in enumerate(self.protectors)
            )
        )
        async with asyncio.timeout(10):
            while {key for done in self.told for key in done.protected} != set(keys):
                await asyncio.sleep(0.001)

    async def restore(self, stripes: list[StripeRestore], *, tail: bool) -> list[list[RestoreDone]]:
        """What each rank tells on the way."""
        plan = RestorePlan.of(1, 1, tuple(stripes), tail)
        loop = asyncio.get_running_loop()
        told: list[list[RestoreDone]] = [[] for _ in range(K)]
        for rank, restorer in enumerate(self.restorers):
            restorer.prefetch(plan, rank, (self.pools[rank].tokens if tail else self.pools[rank]).page_bytes)
        await asyncio.gather(
            *(
                loop.run_in_executor(
                    self._threads, each.restore, plan, self._exchange(rank, tail=tail), told[rank].append
                )
                for rank, each in enumerate(self.restorers)
            )
        )
        return told

    def close(self) -> None:
        for communicator in self.communicators:
            communicator.close()
        self._threads.shutdown()


@pytest_asyncio.fixture
async def ranks() -> AsyncIterator[Ranks]:
    group = Ranks()
    yield group
    group.close()


@pytest.mark.parametrize("lost", [(1,), (0, 2)])
@pytest.mark.parametrize("tail", [False, True])
async def test_what_ranks_lose_comes_back_bit_for_bit(ranks: Ranks, tail: bool, lost: tuple[int, ...]) -> None:
    places = [3 * PAGE_TOKENS + 1, 4 * PAGE_TOKENS, 2] if tail else [3, 0]
    keys = [bytes([place]) * 16 for place in places]
    before = [pool.kv.clone() for pool in ranks.pools]
    await ranks.protect(places, keys, tail=tail)
    assert len(ranks.stores.shards) == len(places) * M
    for rank in lost:
        for place in places:
            page, offset = divmod(place, PAGE_TOKENS) if tail else (place, slice(None))
            ranks.pools[rank].kv[page, :, :, offset] = 0
    told = await ranks.restore([ranks.stores.stripe(*pair, lost) for pair in zip(places, keys, strict=True)], tail=tail)
    assert [bool(done) for done in told] == [rank in lost for rank in range(K)]  # who has lost nothing is silent
    assert not any(each.failed for done in told for each in done)
    for pool, kv in zip(ranks.pools, before, strict=True):
        assert torch.equal(pool.kv, kv)


async def test_a_token_whose_parity_is_gone_is_told_and_not_written(ranks: Ranks) -> None:
    await ranks.protect([6, 7], [b"a" * 16, b"b" * 16], tail=True)
    stripes = [ranks.stores.stripe(6, b"a" * 16, (1,)), ranks.stores.stripe(7, b"b" * 16, (1,))]
    for number in range(K, K + M):
        del ranks.stores.shards[b"a" * 16, number]
    ranks.pools[1].kv.zero_()
    told = await ranks.restore(stripes, tail=True)
    assert [[each.failed for each in done] for done in told] == [[], [(b"a" * 16,)], []]
    lost, restored = ranks.pools[1].tokens.rows(np.array([6, 7]), ranks.pools[1].tokens.empty)
    assert not np.any(lost)
    assert np.any(restored)


async def test_a_rank_that_decodes_tells_after_each_window_how_far_it_is(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exchange, restore):
        monkeypatch.setattr(module, "round_pages", lambda page_bytes, _: 2)
    places, keys = [*range(5)], [bytes([place]) * 16 for place in range(5)]
    before = ranks.pools[1].kv.clone()
    await ranks.protect(places, keys, tail=False)
    stripes = [ranks.stores.stripe(*pair, (1,)) for pair in zip(places, keys, strict=True)]
    for number in range(K, K + M):
        del ranks.stores.shards[keys[2], number]
    ranks.pools[1].kv.zero_()
    _, told, _ = await ranks.restore(stripes, tail=False)
    assert [(done.upto, done.failed) for done in told] == [(2, ()), (4, (keys[2],)), (5, ())]
    assert sum(done.bytes_restored for done in told) == 4 * ranks.pools[1].page_bytes
    for page in places:
        assert torch.equal(ranks.pools[1].kv[page], before[page]) == (page != 2)


async def test_a_window_in_which_a_rank_has_lost_nothing_is_told_all_the_same(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exchange, restore):
        monkeypatch.setattr(module, "round_pages", lambda page_bytes, _: 1)
    places, keys = [3, 0], [b"a" * 16, b"b" * 16]
    before = [pool.kv.clone() for pool in ranks.pools]
    await ranks.protect(places, keys, tail=False)
    ranks.pools[0].kv[3], ranks.pools[2].kv[0] = 0, 0
    told = await ranks.restore(
        [ranks.stores.stripe(3, keys[0], (0,)), ranks.stores.stripe(0, keys[1], (2,))], tail=False
    )
    assert [[done.upto for done in each] for each in told] == [[1, 2], [], [1, 2]]
    assert all(torch.equal(pool.kv, kv) for pool, kv in zip(ranks.pools, before, strict=True))


async def test_bytes_that_decode_to_something_else_are_told_as_damaged_and_do_not_count(ranks: Ranks) -> None:
    keys = [b"a" * 16, b"b" * 16]
    await ranks.protect([3, 0], keys, tail=False)
    stripes = [ranks.stores.stripe(3, keys[0], (1,)), ranks.stores.stripe(0, keys[1], (1,))]
    before = ranks.pools[1].kv.clone()
    ranks.pools[0].kv[3] += 1  # a survivor's page that is not what was encoded
    ranks.pools[1].kv.zero_()
    _, (done,), _ = await ranks.restore(stripes, tail=False)
    assert (done.failed, done.damaged) == ((keys[0],), 1)
    assert torch.equal(ranks.pools[1].kv[0], before[0])


async def test_a_shard_that_is_damaged_or_gone_is_made_up_for_by_another_of_its_stripe(ranks: Ranks) -> None:
    """The first shard of one stripe is damaged, that of another is gone; of a third both are damaged."""
    places, keys = [*range(4)], [bytes([place]) * 16 for place in range(4)]
    await ranks.protect(places, keys, tail=False)
    shards = ranks.stores.shards
    stripes = [
        StripeRestore(
            place,
            key,
            (1,),
            tuple(ParityShard(K + n, STORE.bulk_address, shards[key, K + n][0].checksum) for n in range(M)),
            shards[key, K][0].data_checksums,
        )
        for place, key in zip(places, keys, strict=True)
    ]
    for key, number in ((keys[0], K), (keys[2], K), (keys[2], K + 1)):
        label, content = shards[key, number]
        shards[key, number] = label, bytes([content[0] ^ 1]) + content[1:]
    del shards[keys[1], K]
    before = ranks.pools[1].kv.clone()
    ranks.pools[1].kv.zero_()
    _, (done,), _ = await ranks.restore(stripes, tail=False)
    assert (done.failed, done.damaged) == ((keys[2],), 3)
    assert "parity shard differs" in done.reason
    assert all(torch.equal(ranks.pools[1].kv[page], before[page]) for page in (0, 1, 3))


async def protected_or_not(ranks: Ranks, keys: list[bytes]) -> dict[bytes, str]:
    """Protect one page a key; the reason why it failed by key, empty where it did not."""
    plan = ProtectPlan(1, 0, pack_ids(range(len(keys))), tuple(keys), (STORE,), 0)
    loop = asyncio.get_running_loop()
    await asyncio.gather(
        *(
            loop.run_in_executor(ranks._threads, each.protect, plan, ranks._exchange(rank, tail=False))
            for rank, each in enumerate(ranks.protectors)
        )
    )
    async with asyncio.timeout(10):
        while len({key for done in ranks.told for key in (*done.protected, *done.failed)}) < len(keys):
            await asyncio.sleep(0.001)
    told = [(key, done) for done in ranks.told for key in (*done.protected, *done.failed)]
    return {key: done.reason if key in done.failed else "" for key, done in told}


async def test_what_a_rank_can_not_encode_is_unprotected_and_the_others_go_on(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [bytes([number]) + bytes(15) for number in range(3)]  # one for each rank to encode

    def fails(stripes: object) -> None:
        raise MemoryError("no memory for parity")

    monkeypatch.setattr(ranks.protectors[1]._coder, "encode", fails)
    told = await protected_or_not(ranks, keys)
    failing = next(key for key in keys if encoding_rank(key, K) == 1)
    assert {key for key, reason in told.items() if reason} == {failing}
    assert "no memory for parity" in told[failing]
    assert all(each._in_flight == 0 for each in ranks.protectors)


async def test_a_put_that_breaks_leaves_its_stripes_unprotected_and_nothing_pending(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ranks.stores, "put", breaks)
    told = await protected_or_not(ranks, [bytes([number]) + bytes(15) for number in range(3)])
    assert all("a bug" in reason for reason in told.values())
    assert all(each._in_flight == 0 for each in ranks.protectors)


async def test_who_waits_for_stores_that_take_nothing_is_freed_when_the_epoch_ends(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    protector, exchange_ = ranks.protectors[0], ranks._exchange(0, tail=False)
    monkeypatch.setattr(protector, "_in_flight", 1 << 40)
    waiting = asyncio.get_running_loop().run_in_executor(ranks._threads, protector._take_room, 1, exchange_)
    await asyncio.sleep(0)
    exchange_.end()
    with pytest.raises(CommunicatorAborted):
        await asyncio.wait_for(waiting, 5)
