"""Which pages a rank reads, and where it writes others anew, when slices are exchanged."""

from collections.abc import Sequence

import numpy as np
import torch

from services.worker.communicator.base import Communicator
from services.worker.memory import Bytes, Ids, Memory, Room, Rows, to_host
from services.worker.shadow.exchange import Came, Exchange

PAGE_BYTES = 64


class Peers(Communicator):
    """The others, whose slices are all of one byte: 100 more than their rank."""

    def all_reduce(self, tensor: torch.Tensor) -> None: ...

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None: ...

    sent: Sequence[Sequence[Memory]] = ()

    def all_to_all(self, send: Sequence[Sequence[Memory]], receive: Sequence[Sequence[Memory]]) -> None:
        self.sent = send
        for rank, buffers in enumerate(receive):
            for each in buffers:
                to_host(each)[:] = 100 + rank

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Scattered:
    """Pages that are in parts. `read` and `written`: their numbers, in order."""

    page_bytes = PAGE_BYTES

    def __init__(self) -> None:
        self.read: list[int] = []
        self.written: list[int] = []

    def rows(self, pages: Ids, room: Room, /) -> Rows:
        self.read += pages.tolist()
        content = to_host(room(len(pages)))
        content[:] = pages[:, None]
        return Rows.all(content)

    def targets(self, pages: Ids, room: Room, /) -> Rows:
        return Rows.all(room(len(pages)))

    def wrote(self, pages: Ids, content: Rows, /) -> None:
        self.written += pages.tolist()

    def empty(self, count: int, /) -> Bytes:
        return np.empty((count, PAGE_BYTES), dtype=np.uint8)


def gather(exchange: Exchange, pages: list[int], receivers: list[tuple[int, ...]]) -> Came:
    to = np.array([[rank in each for rank in range(exchange.size)] for each in receivers])
    return exchange.gather(np.array(pages), to)


def test_a_rank_that_lost_its_pages_does_not_read_them() -> None:
    pool = Scattered()
    came = gather(Exchange(Peers(1, 3, 1.0), pool), [4, 5], [(1,), (1,)])
    assert pool.read == []
    assert [indices.tolist() for indices in came.indices] == [[0, 1], [], [0, 1]]
    assert {rank: [int(to_host(row)[0]) for row in came.of(rank, np.array([1, 0]))] for rank in (0, 2)} == {
        0: [100, 100],
        2: [102, 102],
    }


def test_a_rank_reads_what_it_sends_and_nothing_else() -> None:
    pool = Scattered()
    came = gather(Exchange(Peers(0, 3, 1.0), pool), [4, 5, 6], [(1,), (0,), (2,)])
    assert [indices.tolist() for indices in came.indices] == [[], [1], [1]]
    assert pool.read == [4, 6]


def test_each_rank_is_sent_the_pages_that_it_lacks_in_their_order() -> None:
    peers = Peers(0, 3, 1.0)
    gather(Exchange(peers, Scattered()), [4, 5, 6, 7], [(1,), (2,), (1, 2), (0, 1)])
    assert [[int(to_host(each)[at]) for each in buffers for at in range(0, len(each), PAGE_BYTES)]
            for buffers in peers.sent] == [[], [4, 6], [5, 6]]  # fmt: skip


def test_what_came_lies_in_one_piece_so_that_it_can_be_received_there() -> None:
    came = gather(Exchange(Peers(1, 3, 1.0), Scattered()), [4, 5, 6], [(1,), (1, 2), (1,)])
    first, last = to_host(came.slices[0]), to_host(came.slices[2])
    assert [len(each) for each in came.slices] == [3, 0, 2]
    assert last.ctypes.data == first.ctypes.data + first.nbytes


def test_pages_to_be_written_anew_have_a_place_each_and_are_not_read() -> None:
    pool, pages = Scattered(), np.array([4, 5])
    exchange = Exchange(Peers(1, 3, 1.0), pool)
    came = gather(exchange, [4, 5], [(1,), (1,)])
    for number, target in enumerate(exchange.targets(pages)):
        to_host(target)[:] = number
    assert [int(to_host(each)[0]) for each in exchange.targets(pages)] == [0, 1]
    assert pool.read == []
    assert [int(to_host(row)[-1]) for row in came.of(2, np.array([0, 1]))] == [102, 102], "what came was written over"
