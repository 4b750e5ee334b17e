"""The CUDA kernel's own source, run over its grid on the CPU by the codec that drives a GPU, bit for bit."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.checksum import sum_checksum
from kernels.codec import Shard, make_codec
from kernels.cuda import CudaCodec, DeviceMemory
from kernels.errors import CodecError
from kernels.launch import Program, plan_launches
from tests.pure.kernels_on_cpu import COMPILER, Arena, CpuRunner, on_device
from tests.pure.test_codec import oracle

needs_compiler = pytest.mark.skipif(not COMPILER, reason="NO C++ COMPILER: THE CUDA KERNEL'S BITS ARE NOT CHECKED")


def fill(arena: Arena, k: int, seed: int) -> None:
    for shard in arena.shards[:k]:
        shard[:] = np.random.default_rng(seed).integers(0, 256, shard.size, dtype=np.uint8)
        seed += 1


def encode(codec: CudaCodec, arena: Arena) -> None:
    shards = [on_device(shard) for shard in arena.shards]
    codec.encode(shards[: codec.k], shards[codec.k :])


def rebuild(codec: CudaCodec, arena: Arena, lost: tuple[int, ...]) -> None:
    """Lose shards and reconstruct them in place; the arena must be as it was."""
    before = [arena.shards[number].copy() for number in lost]
    for number in lost:
        arena.poison(number)
    plan = codec.plan(set(range(codec.k + codec.m)) - set(lost), lost)
    shards = [on_device(shard) for shard in arena.shards]
    codec.reconstruct(plan, [shards[s] for s in plan.sources], [shards[s] for s in lost])
    assert all(np.array_equal(arena.shards[n], old) for n, old in zip(lost, before, strict=True)), lost


@needs_compiler
@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("m", range(1, 5))
def test_every_erasure_pattern_is_rebuilt_bit_for_bit(k: int, m: int) -> None:
    runner = CpuRunner()
    codec, arena, length = CudaCodec(k, m, runner), Arena(45, [7] * (k + m)), 45
    fill(arena, k, seed=k * 10 + m)
    encode(codec, arena)
    assert all(np.array_equal(a, b) for a, b in zip(arena.shards[k:], oracle(k, m, arena.shards[:k]), strict=True))
    written = m
    for lost_count in range(1, m + 1):
        for lost in itertools.combinations(range(k + m), lost_count):
            rebuild(codec, arena, lost)
            written += lost_count
    arena.check_guards()
    assert runner.stored == written * length
    assert not runner.misaligned


@needs_compiler
@settings(max_examples=60)
@given(data=st.data())
def test_any_length_and_alignment(data: st.DataObject) -> None:
    k, m = data.draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (8, 2), (8, 4), (17, 3), (32, 4)]), label="k, m")
    length = data.draw(st.one_of(st.integers(0, 70), st.integers(0, 5_000), st.integers(0, 100_003)), label="length")
    step = data.draw(st.sampled_from([16, 8, 4, 1]), label="shards are alike modulo")
    first = data.draw(st.integers(0, 15), label="first offset")
    offsets = data.draw(st.lists(st.integers(0, 3), min_size=k + m, max_size=k + m), label="offsets")
    lost = data.draw(st.lists(st.integers(0, k + m - 1), min_size=1, max_size=m, unique=True), label="lost")
    runner = CpuRunner()
    codec, arena = CudaCodec(k, m, runner), Arena(length, [first + step * offset for offset in offsets])
    fill(arena, k, seed=length)
    for number in range(k, k + m):
        arena.poison(number)
    encode(codec, arena)
    assert all(np.array_equal(a, b) for a, b in zip(arena.shards[k:], oracle(k, m, arena.shards[:k]), strict=True))
    rebuild(codec, arena, tuple(lost))
    arena.check_guards()
    assert runner.misaligned == 0
    assert runner.loaded == 2 * k * length  # each byte of k shards once to encode, once to reconstruct
    assert runner.stored == (m + len(lost)) * length


@needs_compiler
@pytest.mark.parametrize(
    ("k", "m", "lost"), [(8, 1, (3,)), (8, 2, (0, 5)), (8, 4, (1, 2, 8, 11)), (3, 2, (0, 2)), (32, 4, (30,))]
)
def test_coefficients_compiled_in_as_on_a_gpu(k: int, m: int, lost: tuple[int, ...]) -> None:
    codec, arena = CudaCodec(k, m, CpuRunner(folded=True)), Arena(40_000 // k, [5] * (k + m))
    fill(arena, k, seed=k)
    codec.prepare([codec.plan(set(range(k + m)) - set(lost), lost)])
    encode(codec, arena)
    assert all(np.array_equal(a, b) for a, b in zip(arena.shards[k:], oracle(k, m, arena.shards[:k]), strict=True))
    rebuild(codec, arena, lost)
    arena.check_guards()


@needs_compiler
def test_one_launch_codes_scattered_pages_of_many_stripes() -> None:
    k, m, length, stripes = 3, 2, 100, 1200
    runner = CpuRunner()
    codec = CudaCodec(k, m, runner)
    order = np.random.default_rng(1).permutation(stripes * (k + m))
    # every third page is less aligned than the others, so stripes differ in the widest vector that they can take
    arena = Arena(length, [4 * (number % 3 == 0) for number in range(len(order))])
    for shard in arena.shards:
        shard[:] = np.random.default_rng(2).integers(0, 256, length, dtype=np.uint8)
    pages = order.reshape(stripes, k + m)
    addresses = np.array([[arena.shards[page].ctypes.data for page in stripe] for stripe in pages], dtype=np.uint64)
    codec.encode_at(addresses, length)
    for stripe in pages[::8]:
        shards = [arena.shards[page] for page in stripe]
        assert all(np.array_equal(a, b) for a, b in zip(shards[k:], oracle(k, m, shards[:k]), strict=True))
    assert runner.loaded == stripes * k * length
    assert runner.launches == 1 + 2  # 818 stripes fit a launch: those of 16-byte vectors, and those of 4-byte
    lost = arena.shards[pages[7, 1]].copy()
    arena.poison(int(pages[7, 1]))
    plan = codec.plan([0, 2, 3], [1])
    codec.reconstruct_at(plan, addresses[7:8][:, [*plan.sources, *plan.targets]], length)
    assert np.array_equal(arena.shards[pages[7, 1]], lost)
    arena.check_guards()


@needs_compiler
@settings(max_examples=40)
@given(data=st.data())
def test_checksums_are_made_on_the_way(data: st.DataObject) -> None:
    k, m = data.draw(st.sampled_from([(1, 1), (3, 2), (8, 2), (16, 4)]), label="k, m")
    length = data.draw(st.one_of(st.integers(0, 70), st.integers(0, 20_003)), label="length")
    step, stripes = data.draw(st.sampled_from([16, 4, 1]), label="aligned to"), 2
    offsets = data.draw(st.lists(st.integers(0, 3), min_size=k + m, max_size=k + m), label="offsets")
    runner = CpuRunner()
    codec, arena = CudaCodec(k, m, runner), Arena(length, [step * offset for offset in offsets] * stripes)
    fill(arena, len(arena.shards), seed=length)
    addresses = np.array([shard.ctypes.data for shard in arena.shards], dtype=np.uint64).reshape(stripes, k + m)
    sums = np.full((stripes, k + m), 0xEE, dtype=np.uint64)
    codec.encode_at(addresses, length, sums=sums.ctypes.data)
    expected = [sum_checksum(shard) for shard in arena.shards]
    assert sums.ravel().tolist() == expected
    for row in range(stripes):
        shards = arena.shards[row * (k + m) : (row + 1) * (k + m)]
        assert all(np.array_equal(a, b) for a, b in zip(shards[k:], oracle(k, m, shards[:k]), strict=True))
    plan = codec.plan(range(1, k + m), [0])
    arena.poison(0)
    rebuilt = np.zeros((1, k + 1), dtype=np.uint64)
    codec.reconstruct_at(plan, addresses[:1, [*plan.sources, 0]], length, sums=rebuilt.ctypes.data)
    assert rebuilt[0].tolist() == [expected[shard] for shard in (*plan.sources, 0)]
    arena.check_guards()
    assert runner.misaligned == 0
    assert runner.loaded == (stripes + 1) * k * length


def test_a_checksum_changes_with_any_bit_and_any_order() -> None:
    data = np.random.default_rng(6).integers(0, 256, 999, dtype=np.uint8)
    seen = {sum_checksum(data), sum_checksum(data[::-1].copy()), sum_checksum(np.roll(data, 4)), sum_checksum(b"")}
    for bit in range(8 * data.size):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(sum_checksum(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 8 * data.size + 4
    assert sum_checksum(b"") == 0


def test_launches_cover_every_vector_once() -> None:
    program = Program.of(np.ones((1, 2), dtype=np.uint8))
    addresses = np.arange(3 * 3000, dtype=np.uint64).reshape(3000, 3) * np.uint64(1 << 20)
    launches = list(plan_launches(program, addresses, (1 << 20) - 16))
    assert [launch.grid[1] for launch in launches] == [1364, 1364, 272]
    assert all(launch.grid[0] * 256 * program.vectors >= (1 << 16) - 1 for launch in launches)
    assert [launch.kernel for launch in launches] == ["code_16"] * 3
    assert not list(plan_launches(program, addresses, 0))


def test_malformed_shards_are_refused() -> None:
    codec = CudaCodec(2, 1, CpuRunner())
    a, b, out = (DeviceMemory(1 << 20 << i, 64) for i in range(3))
    bad_calls: list[tuple[list[Shard], list[Shard], str]] = [
        ([a], [out], "needed"),
        ([a, b], [], "needed"),
        ([a, replace(b, length=63)], [out], "unequal"),
        ([a, b], [a], "overlaps"),
        ([a, b], [replace(b, address=b.address + 63)], "overlaps"),
        ([a, replace(b, device=1)], [out], "not in the memory of cuda:0"),
        ([np.zeros(64, dtype=np.uint8), b], [out], "not ndarray"),
    ]
    for sources, targets, message in bad_calls:
        with pytest.raises(CodecError, match=message):
            codec.encode(sources, targets)
    with pytest.raises(CodecError, match="uint64"):
        codec.encode_at(np.zeros((1, 2), dtype=np.uint64), 64)
    with pytest.raises(CodecError, match="a plan for"):
        codec.reconstruct(make_codec(3, 1).plan([0, 1, 3], [2]), [a, b, out], [out])
    for k, m in ((33, 1), (8, 5)):
        with pytest.raises(CodecError, match="at most"):
            CudaCodec(k, m, CpuRunner())


class Strided(DeviceMemory):
    """Every second byte; or, read-only."""

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        is_strided = self.length == 32
        return {
            "shape": (1, self.length, 1),
            "typestr": "|u1",
            "data": (self.address, not is_strided),
            "strides": (1, 1 + is_strided, 7),
            "version": 3,
        }


def test_gaps_and_read_only_targets_are_refused() -> None:
    codec, whole = CudaCodec(1, 1, CpuRunner()), DeviceMemory(1 << 20, 32)
    with pytest.raises(CodecError, match="contiguous"):
        codec.encode([Strided(1 << 21, 32)], [whole])
    with pytest.raises(CodecError, match="read-only"):
        codec.encode([replace(whole, length=48)], [Strided(1 << 21, 48)])
