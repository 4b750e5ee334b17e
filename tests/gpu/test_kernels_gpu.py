"""The erasure code on a real GPU; skipped without one, where tests/pure/test_kernels_on_cpu.py runs the same source."""

import itertools
from typing import Any

import numpy as np
import pytest

from kernels.checksum import sum_checksum
from kernels.codec import make_codec
from kernels.cuda import CudaCodec, DeviceMemory
from kernels.errors import CodecError
from tests.bench.gpu_time import took
from tests.pure.test_codec import oracle


def devices() -> int:
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no CuPy, no driver, no device: CuPy has an error for each
        return 0


pytestmark = pytest.mark.skipif(not devices(), reason="no GPU")


def cuda(k: int, m: int, device: str = "cuda") -> CudaCodec:
    codec = make_codec(k, m, device)
    assert isinstance(codec, CudaCodec)
    return codec


def on_gpu(*shape: int, seed: int = 0) -> Any:
    import cupy

    return cupy.asarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 1), (3, 2), (8, 1), (8, 2), (4, 4), (32, 4)])
@pytest.mark.parametrize("length", [0, 1, 15, 4096, 100_003])
def test_parity_is_the_oracles(k: int, m: int, length: int) -> None:
    data, parity = on_gpu(k, length), on_gpu(m, length, seed=1)
    cuda(k, m).encode(list(data), list(parity))
    expected = oracle(k, m, list(data.get()))
    assert all(np.array_equal(a, b) for a, b in zip(parity.get(), expected, strict=True))


@pytest.mark.parametrize("offset", [0, 1, 4, 13])
def test_every_pattern_of_one_code_at_any_alignment(offset: int) -> None:
    codec, length = cuda(4, 2), 10_007
    room = on_gpu(6, length + 64)
    before = room.get()
    shards = [room[i, offset : offset + length] for i in range(6)]
    codec.encode(shards[:4], shards[4:])
    whole = room.get()
    assert np.array_equal(before[:, :offset], whole[:, :offset])
    assert np.array_equal(before[:, offset + length :], whole[:, offset + length :])
    for lost in itertools.chain(itertools.combinations(range(6), 1), itertools.combinations(range(6), 2)):
        for number in lost:
            shards[number][:] = 0xEE
        plan = codec.plan(set(range(6)) - set(lost), lost)
        codec.reconstruct(plan, [shards[s] for s in plan.sources], [shards[s] for s in lost])
        assert np.array_equal(room.get(), whole), lost


def test_scattered_pages_of_many_stripes_by_address() -> None:
    k, m, length, stripes = 8, 2, 122_880, 120
    pool = on_gpu(stripes * (k + m), length)
    pages = np.random.default_rng(3).permutation(stripes * (k + m)).reshape(stripes, k + m)
    addresses = np.uint64(pool.data.ptr) + pages.astype(np.uint64) * np.uint64(length)
    cuda(k, m).encode_at(addresses, length)
    host = pool.get()
    for stripe in pages[::17]:
        expected = oracle(k, m, list(host[stripe[:k]]))
        assert all(np.array_equal(a, b) for a, b in zip(host[stripe[k:]], expected, strict=True))


@pytest.mark.parametrize("length", [0, 5, 4096, 122_880, 100_003])
def test_checksums_are_made_on_the_way(length: int) -> None:
    import cupy

    codec, stripes = cuda(8, 2), 5
    room = on_gpu(stripes, 10, length + 16)
    sums = cupy.full((stripes, 10), 0xEE, dtype=cupy.uint64)
    step = np.uint64(length + 16)
    addresses = np.uint64(room.data.ptr) + np.arange(stripes * 10, dtype=np.uint64).reshape(stripes, 10) * step
    codec.encode_at(addresses, length, sums=sums.data.ptr)
    expected = [[sum_checksum(shard[:length]) for shard in stripe] for stripe in room.get()]
    assert sums.get().tolist() == expected


def test_work_is_ordered_on_the_callers_stream_without_waiting() -> None:
    import cupy

    codec, stream = cuda(8, 2), cupy.cuda.Stream(non_blocking=True)
    data, parity, flag = on_gpu(8, 64 << 20), on_gpu(2, 64 << 20, seed=1), on_gpu(8, 64 << 20, seed=2)
    codec.prepare()
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            data[:] = flag  # what must have ended before the last encode begins
        codec.encode(list(data), list(parity), stream=stream.ptr)
        assert not stream.done, "encode waited for the GPU"
    stream.synchronize()
    assert np.array_equal(parity[0].get(), np.bitwise_xor.reduce(flag.get()))


def test_nothing_is_allocated() -> None:
    import cupy

    codec, data, parity = cuda(8, 2), on_gpu(8, 1 << 20), on_gpu(2, 1 << 20)
    codec.prepare()
    codec.encode(list(data), list(parity))
    cupy.cuda.Device().synchronize()
    before = cupy.cuda.runtime.memGetInfo()[0], cupy.get_default_memory_pool().used_bytes()
    for _ in range(100):
        codec.encode(list(data), list(parity))
    cupy.cuda.Device().synchronize()
    assert (cupy.cuda.runtime.memGetInfo()[0], cupy.get_default_memory_pool().used_bytes()) == before


def test_torch_tensors_are_used_in_place() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    data = torch.randint(0, 256, (3, 5000), dtype=torch.uint8, device="cuda")
    parity = torch.zeros((2, 5000), dtype=torch.uint8, device="cuda")
    cuda(3, 2).encode(list(data), list(parity), stream=torch.cuda.current_stream().cuda_stream)
    expected = oracle(3, 2, list(data.cpu().numpy()))
    assert all(np.array_equal(a, b) for a, b in zip(parity.cpu().numpy(), expected, strict=True))


def test_host_memory_and_another_gpus_are_refused() -> None:
    codec, out = cuda(1, 1), on_gpu(64)
    with pytest.raises(CodecError, match="memory of cuda:0"):
        codec.encode([np.zeros(64, dtype=np.uint8)], [out])
    with pytest.raises(CodecError, match="not in the memory of cuda:0"):
        codec.encode([DeviceMemory(int(out.data.ptr) + 4096, 64, device=1)], [out])
    with pytest.raises(CodecError, match="there is no cuda"):
        cuda(1, 1, f"cuda:{devices()}")


@pytest.mark.parametrize(("k", "m"), [(8, 1), (8, 2)])
def test_encoding_takes_most_of_the_memorys_bandwidth(k: int, m: int) -> None:
    """Against a copy of as many bytes, which is what memory allows in practice."""
    import cupy

    length = 64 << 20
    codec = cuda(k, m)
    data, parity = list(on_gpu(k, length)), list(on_gpu(m, length, seed=1))
    bytes_moved = (k + m) * length
    source, target = cupy.empty(bytes_moved // 2, dtype=cupy.uint8), cupy.empty(bytes_moved // 2, dtype=cupy.uint8)
    copying = took(lambda: cupy.copyto(target, source)).gpu
    encoding = took(lambda: codec.encode(data, parity)).gpu
    assert encoding < copying / 0.8, (
        f"{bytes_moved / encoding / 1e9:.0f} GB/s, a copy {bytes_moved / copying / 1e9:.0f}"
    )


@pytest.mark.parametrize(("k", "m"), [(1, 1), (8, 1), (8, 2)])
def test_pages_scattered_over_the_pool_are_encoded_as_fast_as_long_ones(k: int, m: int) -> None:
    """A page of 120 KiB from each of many places, as the shadow does it."""
    import cupy

    codec, length, stripes = cuda(k, m), 122_880, 600
    pool = on_gpu(stripes * (k + m), length)
    pages = np.random.default_rng(3).permutation(stripes * (k + m)).reshape(stripes, k + m)
    addresses = np.uint64(pool.data.ptr) + pages.astype(np.uint64) * np.uint64(length)
    half = pool.ravel()[: pool.size // 2], pool.ravel()[pool.size // 2 :]
    copying, encoding = took(lambda: cupy.copyto(*half)).gpu, took(lambda: codec.encode_at(addresses, length)).gpu
    assert encoding < copying / 0.8, (
        f"{pool.nbytes / encoding / 1e9:.0f} GB/s, a copy {pool.nbytes / copying / 1e9:.0f}"
    )
