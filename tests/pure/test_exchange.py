"""Which pages a rank reads, and where it writes others anew, when slices are exchanged."""

from collections.abc import Sequence

import numpy as np
import torch

from services.worker.communicator.base import Communicator
from services.worker.memory import Bytes, Memory, to_host
from services.worker.shadow.exchange import Exchange

PAGE_BYTES = 64


class Peers(Communicator):
    """The others, whose slices are all of one byte: 100 more than their rank."""

    def all_reduce(self, tensor: torch.Tensor) -> None: ...

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None: ...

    def all_to_all(self, send: Sequence[Sequence[Memory]], receive: Sequence[Sequence[Memory]]) -> None:
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

    def page(self, page_id: int, /) -> Bytes:
        self.read.append(page_id)
        return np.full(PAGE_BYTES, page_id, dtype=np.uint8)

    def target(self, page_id: int, scratch: Memory, /) -> Memory:
        return scratch

    def wrote(self, page_id: int, content: Memory, /) -> None:
        self.written.append(page_id)

    def empty(self, count: int, /) -> Bytes:
        return np.empty((count, PAGE_BYTES), dtype=np.uint8)


def test_a_rank_that_lost_its_pages_does_not_read_them() -> None:
    pool = Scattered()
    slices = Exchange(Peers(1, 3, 1.0), pool).gather([4, 5], [(1,), (1,)])
    assert pool.read == []
    assert {index: sorted(each) for index, each in slices.items()} == {0: [0, 2], 1: [0, 2]}
    assert {rank: int(to_host(each)[0]) for rank, each in slices[0].items()} == {0: 100, 2: 102}


def test_a_rank_reads_what_it_sends_and_nothing_else() -> None:
    pool = Scattered()
    assert Exchange(Peers(0, 3, 1.0), pool).gather([4, 5, 6], [(1,), (0,), (2,)]).keys() == {1}
    assert pool.read == [4, 6]


def test_pages_to_be_written_anew_have_a_place_each_and_are_not_read() -> None:
    pool = Scattered()
    exchange = Exchange(Peers(1, 3, 1.0), pool)
    slices = exchange.gather([4, 5], [(1,), (1,)])
    for number, target in enumerate(exchange.targets([4, 5])):
        to_host(target)[:] = number
    assert [int(to_host(each)[0]) for each in exchange.targets([4, 5])] == [0, 1]
    assert pool.read == []
    assert int(to_host(slices[1][2])[-1]) == 102, "what the others sent was written over"
