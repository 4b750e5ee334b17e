"""A worker process of vLLM that waits for other ranks hears that its epoch is over, and goes on at once."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from services.vllm import messages
from services.vllm.messages import Answer, Call, End, Place, Placed
from services.worker.communicator import create, open_rendezvous
from services.worker.communicator.base import Communicator

SOON_S, LONG_S = 20.0, 300.0


class Model:
    """In place of vLLM's worker, as rank 0 of two: a step is one sum."""

    parallel_config = SimpleNamespace(tensor_parallel_size=2)
    groups = SimpleNamespace(install=lambda: None)

    def __init__(self) -> None:
        self.left = 0

    def leave(self) -> None:
        self.left += 1

    def rejoin(self, epoch: int, channel: Communicator) -> None:
        self.channel = channel

    def execute_model(self) -> int:
        self.channel.all_reduce(torch.ones(1))
        return self.left


def serve(connection: Connection) -> None:
    """The process."""
    from services.vllm.process import Process

    process = Process(b"", multiprocessing.Lock(), connection, "w")
    process._built[0] = SimpleNamespace(worker=Model(), execute_model=None)  # type: ignore[assignment]
    process._built[0].execute_model = process._built[0].worker.execute_model
    process._rank = 0
    process.serve()


class Told:
    """The engine core's end."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, *said: messages.Message) -> None:
        for each in said:
            messages.send(self.connection, each)

    def hear(self, limit_s: float = 60.0) -> Any:
        assert self.connection.poll(limit_s), "nothing is heard"
        return messages.receive(self.connection)


@pytest.fixture
def worker() -> Iterator[Told]:
    told = Told()
    yield told
    told.process.kill()
    told.process.join()


def join(told: Told, epoch: int) -> Communicator:
    """Be rank 1 in an epoch."""
    meeting = open_rendezvous("shm", 2)
    told.tell(End(epoch), Place(epoch, 0, meeting.address, LONG_S))
    made = create("shm", meeting.address, 1, 2, timeout=LONG_S)
    meeting.close()
    assert not told.hear().error
    return made


def test_a_rank_that_waits_for_others_to_connect_goes_on_when_the_epoch_is_over(worker: Told) -> None:
    join(worker, 1).close()
    meeting = open_rendezvous("shm", 2)
    worker.tell(End(2), Place(2, 0, meeting.address, LONG_S))
    assert not worker.connection.poll(0.5)  # nobody else comes
    worker.tell(End(3))
    placed = worker.hear(SOON_S)
    assert isinstance(placed, Placed)
    assert (placed.epoch, bool(placed.error)) == (2, True)
    join(worker, 3).close()


def test_a_place_of_an_epoch_that_is_over_is_not_taken(worker: Told) -> None:
    meeting = open_rendezvous("shm", 2)
    worker.tell(End(1), End(2), Place(1, 0, meeting.address, LONG_S))
    placed = worker.hear()
    assert (placed.epoch, bool(placed.error)) == (1, True)


def test_a_rank_in_the_middle_of_a_step_goes_on_when_the_epoch_is_over_and_blames_itself_for_nothing(
    worker: Told,
) -> None:
    peer = join(worker, 1)
    worker.tell(Call(1, 1, "execute_model", (), {}, True))
    assert not worker.connection.poll(0.5)  # rank 1 lives, and takes no part
    began = time.monotonic()
    worker.tell(End(2))
    answer = worker.hear(SOON_S)
    assert time.monotonic() - began < SOON_S
    assert isinstance(answer, Answer)
    assert answer.error
    assert not answer.own
    peer.close()
    peer = join(worker, 2)
    worker.tell(Call(2, 2, "execute_model", (), {}, True))
    stepping = threading.Thread(target=peer.all_reduce, args=(torch.ones(1),))
    stepping.start()
    assert worker.hear().value == 2  # it has left two epochs' peers behind, of which the first were none
    stepping.join()
    peer.close()
