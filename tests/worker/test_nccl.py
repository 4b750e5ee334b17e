"""The communicator over NCCL without NCCL: what it asks of it, in which order, and how it ends."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import torch

from services.worker.communicator import torch_dist
from shared.errors import CommunicatorAborted, DeadlineExceeded
from tests.worker.fake_cuda import FakeCuda, FakeNccl, Wire, World

SIZE = 3


class Ranks:
    """Three ranks in threads, each with a device of its own."""

    def __init__(self) -> None:
        self.world = World()
        self.devices = [FakeCuda(self.world) for _ in range(SIZE)]
        wire = Wire(self.world, SIZE)
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}", self.devices[rank].bind) for rank in range(SIZE)]
        self.communicators = [FakeNccl(device, wire, rank) for rank, device in enumerate(self.devices)]

    def all(self, part: Callable[[FakeNccl], Any]) -> list[Any]:
        running = [
            thread.submit(part, communicator)
            for thread, communicator in zip(self._threads, self.communicators, strict=True)
        ]
        return [future.result(20) for future in running]

    def close(self) -> None:
        for communicator in self.communicators:
            communicator.close()
        for thread in self._threads:
            thread.shutdown()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    group = Ranks()
    yield group
    group.close()


def test_a_layers_sum_is_one_collective_and_the_host_waits_for_nothing(ranks: Ranks) -> None:
    def part(comm: FakeNccl) -> list[float]:
        value = torch.full((4,), float(comm.rank + 1))
        for _ in range(3):
            comm.all_reduce(value)
        return [float(each) for each in value.numpy()]

    assert ranks.all(part) == [[54.0] * 4] * SIZE
    assert ranks.world.counts["collectives"] == 3 * SIZE
    assert ranks.world.counts["waits"] == 0
    assert not ranks.world.hazards()


def test_pages_are_exchanged_without_asking_first_for_their_sizes(ranks: Ranks) -> None:
    def part(comm: FakeNccl) -> list[list[int]]:
        own = torch.full((2,), comm.rank, dtype=torch.uint8)
        send = [[own] if other != comm.rank else [] for other in range(SIZE)]
        came = [torch.empty(2 if other != comm.rank else 0, dtype=torch.uint8) for other in range(SIZE)]
        comm.all_to_all(send, [[each] if len(each) else [] for each in came])
        return [each.numpy().tolist() for each in came]

    assert ranks.all(part) == [[[], [1, 1], [2, 2]], [[0, 0], [], [2, 2]], [[0, 0], [1, 1], []]]
    assert ranks.world.counts["collectives"] == SIZE
    assert ranks.world.counts["waits"] == 0
    assert not ranks.world.hazards()


def test_an_abort_that_does_not_come_back_holds_up_nobody(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, one = threading.Event(), ranks.communicators[0]
    monkeypatch.setattr(torch_dist, "_ABORT", 0.05)
    monkeypatch.setattr(one._group, "abort", stuck.wait)
    one.abort()  # as the event loop does
    one.close()
    with pytest.raises(CommunicatorAborted):
        one.check()
    with pytest.raises(CommunicatorAborted):
        one.all_reduce(torch.zeros(1))
    stuck.set()


def test_while_a_graph_is_captured_the_watching_thread_asks_the_device_nothing(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA ends a capture with an error where any thread of the process asks for an event meanwhile."""
    monkeypatch.setattr(torch_dist, "_WATCH", 0.001)
    capturing, asked, looked = threading.Event(), list[bool](), threading.Event()

    def is_completed(self: object) -> bool:
        asked.append(capturing.is_set())
        looked.set()
        return False

    monkeypatch.setattr("tests.worker.fake_cuda._Queued.is_completed", is_completed)
    ranks.all(lambda comm: comm.all_reduce(torch.zeros(1)))
    assert looked.wait(10)
    with ExitStack() as all_still:
        for each in ranks.communicators:
            all_still.enter_context(each.still())
        capturing.set()
        before = ranks.communicators[0]._latest
        ranks.all(lambda comm: comm.all_reduce(torch.zeros(1)))
        assert ranks.communicators[0]._latest is not before
        threading.Event().wait(0.05)  # as long as many looks
        capturing.clear()
    assert ranks.communicators[0]._latest is before  # what was captured has not run
    assert True not in asked


def test_an_operation_that_does_not_end_is_aborted_after_the_timeout(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted = threading.Event()
    monkeypatch.setattr("tests.worker.fake_cuda._Queued.is_completed", lambda self: False)
    for each in ranks.communicators:
        each.timeout = 0.1
        monkeypatch.setattr(each._group, "abort", aborted.set)
    ranks.all(lambda comm: comm.all_reduce(torch.zeros(1)))
    assert aborted.wait(10)
    with pytest.raises(DeadlineExceeded):
        next(each for each in ranks.communicators if each._late).check()


def test_what_nccl_refuses_is_an_end_of_the_epoch(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("NCCL error: remote process exited")

    one = ranks.communicators[0]
    monkeypatch.setattr(one._group, "allreduce", refuse)
    with pytest.raises(CommunicatorAborted, match="remote process exited"):
        one.all_reduce(torch.zeros(1))
    with pytest.raises(CommunicatorAborted):
        one.check()


def test_ranks_are_connected_when_the_group_is_made_and_pytorch_ends_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[Any] = []

    class Group:
        class Options:
            _timeout = timedelta()

        def __init__(self, store: Any, rank: int, size: int, options: Any):
            steps.append((rank, size, options._timeout, os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]))

        def eager_connect_single_device(self, device: torch.device) -> None:
            steps.append(device)

    for name in torch_dist._LEAVE_US_ALONE:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch_dist.c10d, "ProcessGroupNCCL", Group, raising=False)
    device, timeout = torch.device("cuda", 3), timedelta(seconds=7)
    torch_dist._nccl_group(torch_dist.c10d.HashStore(), 1, 8, timeout, device)
    assert steps == [(1, 8, timeout, "0"), device]


def test_ranks_that_nccl_does_not_connect_are_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(torch_dist, "_NCCL_CONNECT", 0.05)
    monkeypatch.setattr(torch_dist, "_nccl_group", lambda *_: stuck.wait())
    monkeypatch.setattr(FakeNccl, "_connect", torch_dist.NcclCommunicator._connect)
    world = World()
    with pytest.raises(DeadlineExceeded, match="did not connect"):
        FakeNccl(FakeCuda(world), Wire(world, SIZE), 0)
    stuck.set()
