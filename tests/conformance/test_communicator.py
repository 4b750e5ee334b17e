"""The contract of a communicator, over every backend that runs without a GPU, between real processes."""

import ctypes
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._C import _distributed_c10d as c10d

from services.worker.communicator import Communicator, Kind, create, open_rendezvous
from services.worker.communicator.base import cut
from services.worker.communicator.shm import ShmCommunicator, ShmRendezvous
from shared.errors import CommunicatorAborted, CutOff
from tests.conformance.rank_processes import Outcome, RankProcesses

SIZE = 3
KINDS: tuple[Kind, ...] = ("shm", "gloo")


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(SIZE)
    yield processes
    processes.close()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


def results(outcomes: list[Outcome | None]) -> list[object]:
    assert all(outcome is not None and outcome.error is None for outcome in outcomes), outcomes
    return [outcome.result for outcome in outcomes if outcome is not None]


def values(seed: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def ordered_sum(seed: int, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    total = values(seed, 0, shape, dtype).to(torch.float32)
    for rank in range(1, size):
        total = total + values(seed, rank, shape, dtype).to(torch.float32)
    return total.to(dtype)


def reduce_part(communicator: Communicator, seed: int) -> int:
    rng = np.random.default_rng(seed)
    sizes = [1, 2, 576, *rng.integers(1, 3000, 20).tolist(), 8192, 8193, 16384, 20001, 100_003]
    for index, size in enumerate(sizes):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
        tensor = values(index, communicator.rank, (size,), dtype)
        communicator.all_reduce(tensor)
        assert torch.equal(tensor, ordered_sum(index, communicator.size, (size,), dtype)), size
    return len(sizes)


def test_all_reduce_adds_in_rank_order_whatever_the_size(ranks: RankProcesses, kind: Kind) -> None:
    assert results(ranks.play(kind, reduce_part, 7)) == [28] * SIZE


def gather_part(communicator: Communicator) -> None:
    for index, shape in enumerate([(1,), (3, 5), (2, 7, 11), (70_001,)]):
        dtype = (torch.float32, torch.bfloat16)[index % 2]
        out = torch.empty(communicator.size, *shape, dtype=dtype)
        communicator.all_gather(values(index, communicator.rank, shape, dtype), out)
        for rank in range(communicator.size):
            assert torch.equal(out[rank], values(index, rank, shape, dtype))


def test_all_gather_keeps_every_rank_in_its_place(ranks: RankProcesses, kind: Kind) -> None:
    results(ranks.play(kind, gather_part))


def exchange_part(communicator: Communicator, seed: int) -> int:
    """Every pair's total is random (nothing at times, more than a slot at others), cut differently at the two ends."""
    moved = 0
    for turn in range(6):
        rng = np.random.default_rng((seed, turn))
        totals = rng.choice([0, 1, 100, 4096, 50_000, 300_000], (communicator.size, communicator.size))

        def content(source: int, to: int, turn: int = turn, totals: np.ndarray = totals) -> np.ndarray:
            return np.random.default_rng((turn, source, to)).integers(0, 256, totals[source, to], np.uint8)

        def cuts(data: np.ndarray, pieces: int) -> list[np.ndarray]:
            return np.array_split(data, pieces) if len(data) else []

        me = communicator.rank
        send = [cuts(content(me, to), 1 + to) for to in range(communicator.size)]
        whole = [np.zeros(totals[source, me], np.uint8) for source in range(communicator.size)]
        communicator.all_to_all(send, [cuts(data, 3 + source) for source, data in enumerate(whole)])
        for source, data in enumerate(whole):
            assert np.array_equal(data, content(source, me))
            moved += len(data)
    return moved


def test_all_to_all_moves_every_byte_to_its_place(ranks: RankProcesses, kind: Kind) -> None:
    results(ranks.play(kind, exchange_part, 3))


def one_way_part(communicator: Communicator, length: int) -> int:
    """All send `length` bytes to rank 1. Returns how often they met for it."""
    me, before = communicator.rank, communicator.entered
    send = [[np.full(length, me, np.uint8)] if to == 1 and me != 1 else [] for to in range(communicator.size)]
    into = [np.zeros(length if me == 1 and source != 1 else 0, np.uint8) for source in range(communicator.size)]
    communicator.all_to_all(send, [[each] for each in into])
    assert all((each == source).all() for source, each in enumerate(into))
    return communicator.entered - before


def test_bytes_for_one_rank_alone_get_a_slot_for_themselves(ranks: RankProcesses, kind: Kind) -> None:
    if kind != "shm":
        pytest.skip("has no slots")
    assert results(ranks.play(kind, one_way_part, (1 << 16) - 64)) == [1] * SIZE


def wrong_sizes_part(communicator: Communicator) -> None:
    nothing = [[] for _ in range(communicator.size)]
    lie = [[np.zeros(5, np.uint8)] if communicator.rank == 0 and r == 1 else [] for r in range(communicator.size)]
    communicator.all_to_all(nothing, lie)
    communicator.all_reduce(torch.zeros(1))


def test_sizes_that_do_not_agree_end_the_epoch(ranks: RankProcesses, kind: Kind) -> None:
    outcomes = ranks.play(kind, wrong_sizes_part)
    assert [outcome.error for outcome in outcomes if outcome] == ["ProtocolError"] + ["CommunicatorAborted"] * 2


def two_at_once_part(first: Communicator, address: str, kind: Kind) -> None:
    second = create(kind, address, first.rank, first.size, slot_bytes=1 << 16, timeout=20)
    trouble: list[BaseException] = []

    def exchange() -> None:
        try:
            exchange_part(second, 11)
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=exchange)
    thread.start()
    reduce_part(first, 5)
    thread.join(30)
    second.close()
    assert not trouble
    assert not thread.is_alive()


def test_two_communicators_work_at_once_in_two_threads(ranks: RankProcesses, kind: Kind) -> None:
    handle = open_rendezvous(kind, SIZE, slot_bytes=1 << 16)
    results(ranks.play(kind, two_at_once_part, handle.address, kind))
    handle.close()


def one_sum_part(communicator: Communicator) -> float:
    tensor = torch.ones(600)
    communicator.all_reduce(tensor)
    return float(tensor[0])


def test_leaving_after_the_last_operation_disturbs_nobody(ranks: RankProcesses) -> None:
    for _ in range(40):  # on shm, where a leaver's word is still being waited for
        assert results(ranks.play("shm", one_sum_part)) == [float(SIZE)] * SIZE


class Meanwhile:
    """A word of the shared memory; before it is read the `turn`-th time, something happens."""

    def __init__(self, word: ctypes.c_uint32, turn: int, happens: Callable[[], object]) -> None:
        self._word, self._turn, self._happens = word, turn, happens

    @property
    def value(self) -> int:
        self._turn -= 1
        if self._turn == 0:
            self._happens()
        return self._word.value


def test_who_left_while_it_was_looked_for_had_taken_part() -> None:
    """The peer comes and leaves just as the waiter, which has not seen it come, looks whether the epoch goes on."""
    handle = ShmRendezvous(2, 1 << 16)
    with ThreadPoolExecutor() as pool:
        waiter, leaver = pool.map(lambda rank: ShmCommunicator(handle.address, rank, 2, timeout=20), range(2))
    handle.close()

    def come_and_leave() -> None:
        assert one_sum_part(leaver) == 2.0
        leaver.close()

    word = waiter._abort_word
    waiter._abort_word = Meanwhile(word, 2, come_and_leave)  # type: ignore[assignment]
    assert one_sum_part(waiter) == 2.0
    waiter._abort_word = word
    with pytest.raises(CommunicatorAborted):
        one_sum_part(waiter)
    waiter.close()


def wait_part(communicator: Communicator, missing: int, aborter: int | None, after: float, ready: Path) -> None:
    """All but `missing` wait for it in vain, which each says by a file in `ready`; `aborter` aborts after a while."""
    communicator.all_reduce(torch.zeros(8))
    (ready / str(communicator.rank)).touch()
    if communicator.rank == missing:
        time.sleep(60)
    if communicator.rank == aborter:
        threading.Timer(after, communicator.abort).start()
    communicator.all_reduce(torch.zeros(8))


def await_ready(ready: Path) -> None:
    deadline = time.monotonic() + 30
    while len(list(ready.iterdir())) < SIZE:
        assert time.monotonic() < deadline, "the ranks did not connect"
        time.sleep(0.01)
    time.sleep(0.1)  # on to the wait


def freed(outcome: Outcome | None) -> Outcome:
    assert outcome is not None
    assert outcome.error in ("CommunicatorAborted", "DeadlineExceeded"), outcome
    return outcome


def test_abort_frees_waiters_here_and_at_the_peers(ranks: RankProcesses, kind: Kind, tmp_path: Path) -> None:
    run = ranks.start(kind, wait_part, 2, 0, 0.3, tmp_path)
    outcomes = run.outcomes(lost=(2,))
    ranks.revive(2)
    assert freed(outcomes[0]).error == "CommunicatorAborted"
    assert max(freed(outcome).seconds for outcome in outcomes[:2]) < 30  # of a timeout of 90


@pytest.mark.parametrize("victim", range(SIZE))
def test_a_killed_peer_frees_the_survivors(ranks: RankProcesses, kind: Kind, victim: int, tmp_path: Path) -> None:
    run = ranks.start(kind, wait_part, victim, None, 0, tmp_path)
    await_ready(tmp_path)
    ranks.signal(victim, signal.SIGKILL)
    began = time.monotonic()
    outcomes = run.outcomes(lost=(victim,))
    waited = time.monotonic() - began
    ranks.revive(victim)
    assert [freed(o).error for r, o in enumerate(outcomes) if r != victim] == ["CommunicatorAborted"] * 2
    assert waited < 30


def test_a_stopped_peer_does_not_outlast_an_abort(ranks: RankProcesses, kind: Kind, tmp_path: Path) -> None:
    run = ranks.start(kind, wait_part, 2, 1, 0.6, tmp_path)
    await_ready(tmp_path)
    ranks.signal(2, signal.SIGSTOP)
    outcomes = run.outcomes(lost=(2,))
    ranks.revive(2)
    assert max(freed(outcome).seconds for outcome in outcomes[:2]) < 30


def test_a_stopped_peer_does_not_outlast_the_deadline(ranks: RankProcesses, kind: Kind, tmp_path: Path) -> None:
    run = ranks.start(kind, wait_part, 2, None, 0, tmp_path, timeout=4.0)
    await_ready(tmp_path)
    ranks.signal(2, signal.SIGSTOP)
    outcomes = run.outcomes(lost=(2,))
    ranks.revive(2)
    assert "DeadlineExceeded" in [freed(outcome).error for outcome in outcomes[:2]]
    assert max(freed(outcome).seconds for outcome in outcomes[:2]) < 30


def test_a_peer_that_never_comes_is_not_waited_for_for_ever(ranks: RankProcesses, kind: Kind) -> None:
    # not less: on cores that others fill, to reach the store takes a second, and is bounded by the same timeout
    outcomes = ranks.start(kind, one_sum_part, timeout=5.0, absent=(1,)).outcomes()
    assert {freed(outcomes[0]).error, freed(outcomes[2]).error} <= {"DeadlineExceeded", "CommunicatorAborted"}
    assert max(freed(outcomes[r]).seconds for r in (0, 2)) < 30


def test_an_address_that_is_gone_is_an_error_of_ours() -> None:
    handle = open_rendezvous("shm", 2)
    handle.close()
    with pytest.raises(Exception, match="gone"):
        create("shm", handle.address, 1, 2, timeout=1)
    with pytest.raises(CutOff):
        create("gloo", "127.0.0.1:1", 1, 2, timeout=1)


def test_a_rank_that_waits_for_others_to_come_ends_when_it_is_cancelled(kind: Kind) -> None:
    handle = open_rendezvous(kind, 2)
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    began = time.monotonic()
    with pytest.raises(CommunicatorAborted):
        create(kind, handle.address, 0, 2, timeout=60, cancelled=cancelled)
    assert time.monotonic() - began < 10
    handle.close()


def test_pieces_cover_the_range_once() -> None:
    sizes = [0, 5, 3, 0, 7]
    flat = [(buffer, offset) for buffer, size in enumerate(sizes) for offset in range(size)]
    for start in range(len(flat)):
        for length in range(1, len(flat)):
            pieces = cut(sizes, start, length)
            seen = [(p.buffer, p.offset + i) for p in pieces for i in range(p.length)]
            assert seen == flat[start : start + length]


def test_an_abort_of_gloo_cuts_no_connection_that_was_opened_while_its_ranks_connected(
    ranks: RankProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store's, say, which has nothing to do with the epoch that ends."""
    make, pairs = c10d.ProcessGroupGloo, []

    def beside(*arguments: object) -> object:
        with socket.create_server(("127.0.0.1", 0)) as server:
            pairs.append((socket.create_connection(server.getsockname()), server.accept()[0]))
        return make(*arguments)

    beside.create_device, beside._Options = make.create_device, make._Options  # type: ignore[attr-defined]
    monkeypatch.setattr(c10d, "ProcessGroupGloo", beside)
    run = ranks.start("gloo", one_sum_part, absent=(0,))
    communicator = create("gloo", run._handle.address, 0, SIZE, timeout=30)
    assert one_sum_part(communicator) == SIZE
    communicator.abort()
    ((client, server),) = pairs
    client.settimeout(5)
    server.sendall(b"still here")
    assert client.recv(10) == b"still here"
    communicator.close()
    client.close()
    server.close()
    run.outcomes()


def test_connecting_ends_when_the_epoch_does() -> None:
    """A peer that died before it connected is known to nobody: the coordinator's next epoch must free who waits."""
    rendezvous, cancelled = open_rendezvous("shm", 2), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        connecting = threads.submit(create, "shm", rendezvous.address, 0, 2, timeout=60.0, cancelled=cancelled)
        assert not connecting.done()
        cancelled.set()
        with pytest.raises(CommunicatorAborted, match="before all ranks were connected"):
            connecting.result(timeout=5.0)
    rendezvous.close()


def test_who_holds_the_meeting_place_can_end_the_epoch_for_ranks_that_compute_and_for_those_to_come() -> None:
    rendezvous = ShmRendezvous(2, 1 << 16)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda rank: create("shm", rendezvous.address, rank, 2, timeout=60.0), range(2))
        waiting = threads.submit(first.all_reduce, torch.ones(1))
        rendezvous.abort()
        with pytest.raises(CommunicatorAborted):
            waiting.result(timeout=5.0)
        with pytest.raises(CommunicatorAborted):
            second.all_reduce(torch.ones(1))
        with pytest.raises(CommunicatorAborted):
            create("shm", rendezvous.address, 1, 2, timeout=60.0)
    first.close()
    second.close()
    rendezvous.close()
