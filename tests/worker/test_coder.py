"""The coders of pages: the one for GPUs, whose kernel runs on the CPU here, beside the one for host memory."""

import numpy as np
import pytest
import torch

from kernels.checksum import sum_checksum
from kernels.codec import checksum, make_codec
from kernels.cuda import CudaCodec
from services.worker.device import HostDevice
from services.worker.memory import Rows
from services.worker.shadow.coder import Coder, CudaCoder, HostCoder, make_coder
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


def pages_of(stripes: list[list[torch.Tensor]], coder: Coder) -> list[Rows]:
    """Each rank's pages, in one piece of memory of which they are every other row."""
    by_rank = zip(*stripes, strict=True)
    columns = [torch.stack([page for each in column for page in (each, each * 0)]) for column in by_rank]
    index = np.arange(len(stripes)) * 2
    return [Rows(column if isinstance(coder, CudaCoder) else column.numpy(), index) for column in columns]


def test_both_coders_make_the_same_parity_and_sums_of_the_data(
    stripes: list[list[torch.Tensor]], on_gpu: CudaCoder, in_host: HostCoder
) -> None:
    there, here = on_gpu.encode(pages_of(stripes, on_gpu)), in_host.encode(pages_of(stripes, in_host))
    assert (there.parity == here.parity).all()
    for data, sums, sums_here in zip(stripes, there.data_checksums, here.data_checksums, strict=True):
        assert sums == tuple(sum_checksum(page.numpy()) for page in data)
        assert sums_here == tuple(checksum(page.numpy()) for page in data)


@pytest.mark.parametrize("lost", range(K))
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("reversed_", [False, True])
def test_lost_pages_come_back_in_one_call_each_with_its_recorded_checksum(
    stripes: list[list[torch.Tensor]],
    on_gpu: CudaCoder,
    in_host: HostCoder,
    lost: int,
    count: int,
    reversed_: bool,
) -> None:
    for coder in (on_gpu, in_host):
        data = pages_of(stripes[:count], coder)
        encoded = coder.encode(data)
        plan = coder.codec.plan(set(range(K + M)) - {lost}, [lost])
        order = np.arange(count)[:: -1 if reversed_ else 1]
        every = [*data, *(Rows.all(np.ascontiguousarray(encoded.parity[:, number])) for number in range(M))]
        targets = np.zeros((count, LENGTH), dtype=np.uint8)
        rows = Rows.all(torch.from_numpy(targets) if coder is on_gpu else targets)
        sums = coder.decode(plan, [every[source].take(order) for source in plan.sources], rows.take(order))
        assert sums.tolist() == [encoded.data_checksums[at][lost] for at in order]
        for target, stripe in zip(targets, stripes, strict=False):
            assert (target == stripe[lost].numpy()).all()


def test_a_damaged_survivor_shows_in_the_checksum_of_its_stripe_alone(
    stripes: list[list[torch.Tensor]], on_gpu: CudaCoder
) -> None:
    data = pages_of(stripes[:2], on_gpu)
    encoded = on_gpu.encode(data)
    plan = on_gpu.codec.plan({1, 2, K}, [0])
    data[1].memory[2, 5] ^= 1  # of the second stripe
    present = {1: data[1], 2: data[2], K: Rows.all(np.ascontiguousarray(encoded.parity[:, 0]))}
    targets = Rows.all(torch.zeros(2, LENGTH, dtype=torch.uint8))
    decoded = on_gpu.decode(plan, [present[source] for source in plan.sources], targets)
    assert int(decoded[0]) == encoded.data_checksums[0][0]
    assert int(decoded[1]) != encoded.data_checksums[1][0]


def test_a_cpu_gets_the_coder_of_host_memory() -> None:
    coder = make_coder(K, 1, HostDevice())
    coder.prepare()
    assert isinstance(coder, HostCoder)
