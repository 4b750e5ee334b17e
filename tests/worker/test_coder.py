"""The coders of pages: the one for GPUs, whose kernel runs on the CPU here, beside the one for host memory."""

import numpy as np
import pytest
import torch

from kernels.checksum import sum_checksum
from kernels.codec import checksum, make_codec
from kernels.cuda import CudaCodec
from services.worker.device import HostDevice
from services.worker.memory import Memory
from services.worker.shadow.coder import CudaCoder, HostCoder, make_coder
from tests.pure.kernels_on_cpu import COMPILER, CpuRunner

K, M, LENGTH = 3, 2, 1000


@pytest.fixture
def stripes() -> list[list[torch.Tensor]]:
    """Four stripes of K pages."""
    dice = np.random.default_rng(7)
    return [[torch.from_numpy(dice.integers(0, 256, LENGTH, dtype=np.uint8)) for _ in range(K)] for _ in range(4)]


@pytest.fixture
def on_gpu() -> CudaCoder:
    if COMPILER is None:
        pytest.skip("NO C++ COMPILER: the CUDA kernel's source can't be run on the CPU")
    return CudaCoder(CudaCodec(K, M, CpuRunner()), HostDevice())


@pytest.fixture
def in_host() -> HostCoder:
    return HostCoder(make_codec(K, M))


def test_both_coders_make_the_same_parity_and_sums_of_the_data(
    stripes: list[list[torch.Tensor]], on_gpu: CudaCoder, in_host: HostCoder
) -> None:
    there, here = on_gpu.encode(stripes), in_host.encode([[page.numpy() for page in data] for data in stripes])
    assert (there.parity == here.parity).all()
    for data, sums, sums_here in zip(stripes, there.data_checksums, here.data_checksums, strict=True):
        assert sums == tuple(sum_checksum(page.numpy()) for page in data)
        assert sums_here == tuple(checksum(page.numpy()) for page in data)


@pytest.mark.parametrize("lost", range(K))
@pytest.mark.parametrize("count", [1, 4])
def test_lost_pages_come_back_in_one_call_each_with_its_recorded_checksum(
    stripes: list[list[torch.Tensor]], on_gpu: CudaCoder, in_host: HostCoder, lost: int, count: int
) -> None:
    for coder in (on_gpu, in_host):
        pages = stripes[:count] if coder is on_gpu else [[page.numpy() for page in data] for data in stripes[:count]]
        encoded = coder.encode(pages)
        plan = coder.codec.plan(set(range(K + M)) - {lost}, [lost])
        sources = [
            [(*data, *parity)[at] for at in plan.sources] for data, parity in zip(pages, encoded.parity, strict=True)
        ]
        targets = np.zeros((count, LENGTH), dtype=np.uint8)
        memory = [torch.from_numpy(target) if coder is on_gpu else target for target in targets]
        assert [*coder.decode(plan, sources, memory)] == [sums[lost] for sums in encoded.data_checksums]
        for target, data in zip(targets, pages, strict=True):
            assert (target == np.asarray(data[lost])).all()


def test_a_damaged_survivor_shows_in_the_checksum_of_its_stripe_alone(
    stripes: list[list[torch.Tensor]], on_gpu: CudaCoder
) -> None:
    encoded = on_gpu.encode(stripes[:2])
    plan = on_gpu.codec.plan({1, 2, K}, [0])
    sources: list[list[Memory]] = []
    for (_, first, second), parity in zip(stripes, encoded.parity, strict=False):
        present: dict[int, Memory] = {1: first.clone(), 2: second, K: parity[0]}
        sources.append([present[source] for source in plan.sources])
    sources[1][plan.sources.index(1)][5] ^= 1
    targets = [torch.zeros(LENGTH, dtype=torch.uint8) for _ in range(2)]
    decoded = on_gpu.decode(plan, sources, targets)
    assert decoded[0] == encoded.data_checksums[0][0]
    assert decoded[1] != encoded.data_checksums[1][0]


def test_a_cpu_gets_the_coder_of_host_memory() -> None:
    coder = make_coder(K, 1, HostDevice())
    coder.prepare()
    assert isinstance(coder, HostCoder)
