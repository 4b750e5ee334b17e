"""The codec, bit for bit against a slow and obvious version written from the definition."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import isal
from kernels.codec import Buffer, IsalCodec, checksum, make_codec
from kernels.errors import CodecError
from kernels.generator import parity_matrix
from kernels.gf256 import multiply_slowly

_PRODUCTS = np.array([[multiply_slowly(a, b) for b in range(256)] for a in range(256)], dtype=np.uint8)


def oracle(k: int, m: int, data: list[Buffer]) -> list[Buffer]:
    """Parity i, byte by byte: the sum over data shards j of coefficient (i, j) times their byte."""
    parity = []
    for row in parity_matrix(k, m):
        shard = np.zeros_like(data[0])
        for coefficient, source in zip(row, data, strict=True):
            shard ^= _PRODUCTS[coefficient][source]
        parity.append(shard)
    return parity


def random_shards(count: int, length: int, seed: int) -> list[Buffer]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, length), dtype=np.uint8))


def unaligned(length: int, offset: int) -> tuple[Buffer, Buffer]:
    """A buffer of 0xEE and the part of it that a shard uses, with guard bytes around."""
    whole = np.full(length + 64, 0xEE, dtype=np.uint8)
    return whole, whole[offset : offset + length]


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("m", range(1, 5))
def test_every_erasure_pattern_is_rebuilt_bit_for_bit(k: int, m: int) -> None:
    codec = make_codec(k, m)
    data = random_shards(k, 67, seed=k * 10 + m)
    parity = [np.empty(67, dtype=np.uint8) for _ in range(m)]
    codec.encode(data, parity)
    shards = data + parity
    assert all(np.array_equal(a, b) for a, b in zip(parity, oracle(k, m, data), strict=True))
    for lost_count in range(1, m + 1):
        for lost in itertools.combinations(range(k + m), lost_count):
            plan = codec.plan([s for s in range(k + m) if s not in lost], lost)
            rebuilt = [np.full(67, 0xEE, dtype=np.uint8) for _ in lost]
            codec.reconstruct(plan, [shards[s] for s in plan.sources], rebuilt)
            assert all(np.array_equal(rebuilt[i], shards[s]) for i, s in enumerate(lost)), lost


@settings(max_examples=60)
@given(data=st.data())
def test_any_code_length_and_alignment(data: st.DataObject) -> None:
    k, m = data.draw(st.integers(1, 40), label="k"), data.draw(st.integers(1, 6), label="m")
    length = data.draw(st.one_of(st.integers(0, 130), st.integers(0, 100_003)), label="length")
    offsets = data.draw(st.lists(st.integers(0, 63), min_size=m, max_size=m), label="offsets")
    lost = data.draw(st.lists(st.integers(0, k + m - 1), min_size=1, max_size=m, unique=True), label="lost")
    shards = random_shards(k, length, seed=length)
    codec = IsalCodec(k, m)
    guarded = [unaligned(length, offset) for offset in offsets]
    codec.encode(shards, [part for _, part in guarded])
    shards += [part.copy() for _, part in guarded]
    assert all(np.array_equal(a, b) for a, b in zip(shards[k:], oracle(k, m, shards[:k]), strict=True))
    for (whole, _), offset in zip(guarded, offsets, strict=True):
        assert (whole[:offset] == 0xEE).all()
        assert (whole[offset + length :] == 0xEE).all()
    plan = codec.plan(set(range(k + m)) - set(lost), lost)
    guarded = guarded[: len(lost)]
    codec.reconstruct(plan, [shards[s] for s in plan.sources], [part for _, part in guarded])
    for (whole, part), offset, shard in zip(guarded, offsets, lost, strict=False):
        assert np.array_equal(part, shards[shard])
        assert (whole[:offset] == 0xEE).all()
        assert (whole[offset + length :] == 0xEE).all()


def test_one_parity_is_plain_xor() -> None:
    data = random_shards(5, 1000, seed=1)
    parity = [np.empty(1000, dtype=np.uint8)]
    make_codec(5, 1).encode(data, parity)
    assert np.array_equal(parity[0], np.bitwise_xor.reduce(data))


def test_a_plan_is_made_once_for_a_pattern() -> None:
    codec = make_codec(4, 2)
    assert codec.plan([0, 2, 3, 4], [1]) is codec.plan({4, 3, 2, 0}, (1,))
    assert codec.plan([0, 2, 3, 4, 5], [1]).sources == (0, 2, 3, 4)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_of_stripes_given_by_address(threads: int) -> None:
    length = 2_100_000 if threads > 1 else 1000  # threads begin at 16 MiB of sources
    stripes = np.random.default_rng(5).integers(0, 256, (2, 10, length), dtype=np.uint8)
    addresses = np.array([[shard.ctypes.data for shard in stripe] for stripe in stripes], dtype=np.uint64)
    codec = IsalCodec(8, 2, threads)
    codec.encode_at(addresses, length)
    for stripe in stripes:
        assert all(np.array_equal(a, b) for a, b in zip(stripe[8:], oracle(8, 2, list(stripe[:8])), strict=True))
    plan, lost = codec.plan(range(2, 10), [1, 0]), stripes[:, :2].copy()
    stripes[:, :2] = 0xEE
    codec.reconstruct_at(plan, addresses[:, [*plan.sources, *plan.targets]], length)
    assert np.array_equal(stripes[:, :2], lost)
    codec.encode(list(stripes[0, :8]), list(stripes[1, 8:]))
    assert np.array_equal(stripes[0, 8:], stripes[1, 8:])


def test_threads_may_share_a_codec() -> None:
    codec, data = make_codec(8, 2), random_shards(8, 200_000, seed=3)
    expected, failures = oracle(8, 2, data), []

    def work() -> None:
        for _ in range(10):
            parity = [np.empty(200_000, dtype=np.uint8) for _ in range(2)]
            codec.encode(data, parity)
            if not all(np.array_equal(a, b) for a, b in zip(parity, expected, strict=True)):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 2, 3], [5, 4, 3, 2, 1, 0], [2]])
def test_stripes_by_address_are_coded_alike_whether_or_not_they_follow_each_other(order: list[int]) -> None:
    length, k, m = 48, 3, 2
    codec = make_codec(k, m)
    dice = np.random.default_rng(3)
    shards = [dice.integers(0, 256, (6, length), dtype=np.uint8) for _ in range(k + m)]
    bases = np.array([each.ctypes.data for each in shards], dtype=np.uint64)
    codec.encode_at(bases + np.array(order, dtype=np.uint64)[:, None] * np.uint64(length), length)
    for stripe in order:
        expected = np.zeros((m, length), dtype=np.uint8)
        codec.encode([each[stripe] for each in shards[:k]], list(expected))
        assert all((shards[k + number][stripe] == expected[number]).all() for number in range(m))


@pytest.mark.parametrize(
    ("present", "targets"),
    [([0, 1], [2]), ([0, 1, 3], []), ([0, 1, 3], [2, 2]), ([0, 1, 2], [1]), ([0, 1, 9], [2]), ([0, 1, 3], [7])],
)
def test_impossible_plans_are_refused(present: list[int], targets: list[int]) -> None:
    with pytest.raises(CodecError):
        make_codec(3, 2).plan(present, targets)


def test_malformed_buffers_are_refused() -> None:
    codec = make_codec(2, 1)
    whole = np.zeros(96, dtype=np.uint8)
    a, b, out = (np.zeros(32, dtype=np.uint8) for _ in range(3))
    frozen = out.copy()
    frozen.setflags(write=False)
    bad_calls: list[tuple[list[Buffer], list[Buffer]]] = [
        ([a], [out]),
        ([a, b], []),
        ([a, b[:31]], [out]),
        ([a, b], [out[:31]]),
        ([a, whole[::3]], [out]),
        ([a, b], [a]),
        ([whole[:32], b], [whole[31:63]]),
        ([a, b], [frozen]),
        ([a, None], [out]),  # type: ignore[list-item]
    ]
    for sources, targets in bad_calls:
        with pytest.raises(CodecError):
            codec.encode(sources, targets)
    with pytest.raises(CodecError, match="uint64"):
        codec.encode_at(np.zeros((1, 4), dtype=np.uint64), 32)
    with pytest.raises(CodecError, match="overlaps"):  # within a batch too
        codec.encode_at(np.array([[1000, 2000, 3000], [4000, 2969, 5000]], dtype=np.uint64), 32)
    two = make_codec(2, 2)
    with pytest.raises(CodecError, match="overlaps"):
        two.encode([a, b], [whole[:32], whole[16:48]])
    with pytest.raises(CodecError, match="a plan for"):
        codec.reconstruct(two.plan([0, 2], [1]), [a, b], [out])
    codec.encode([a, a], [out])  # the same source twice is only unusual
    codec.encode([a.view(np.int8), b.reshape(2, 16)], [out])  # type: ignore[list-item]  # any contiguous bytes do


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(CodecError, match="tpu"):
        make_codec(2, 1, "tpu")


def test_no_library_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isal.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(isal, "distribution", lambda name: _raise(isal.PackageNotFoundError(name)))
    with pytest.raises(CodecError, match="pyeclib"):
        isal.library_path()


def _raise(error: Exception) -> None:
    raise error


def test_checksum_is_xxh3_of_the_bytes_wherever_they_lie() -> None:
    data = random_shards(1, 500, seed=4)[0]
    assert checksum(data) == checksum(bytes(data)) == checksum(memoryview(data))
    assert checksum(b"") == 0x2D06800538D394C2  # from the xxHash specification's test vectors
