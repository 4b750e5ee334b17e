"""The compute thread outlives what it can't do, and says what that is."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.agent.inventory import Inventory
from services.worker.agent.rank_engine import Job
from services.worker.communicator import Communicator
from services.worker.device import Fence, HostDevice
from services.worker.engine.host_slices import host_memory
from services.worker.engine.model import RankModel
from services.worker.engine.runner import Runner
from shared.errors import ModelError
from shared.messages import (
    DRAWN,
    Assign,
    Batch,
    Join,
    Joined,
    Message,
    NotePages,
    Prepare,
    Prepared,
    RankFailed,
    Rendezvous,
    SequenceStart,
    StandBy,
    StepDone,
    StepPlan,
    StepRaised,
)
from shared.types import GroupConfig, SamplingParams, pack_ids, unpack_ids
from tests.worker.rank_threads import small_model

WAIT_S = 20.0


class NoShadow:
    """Protects nothing."""

    device = HostDevice()
    restored = Fence(device)

    def interrupt(self, epoch: int) -> None: ...
    def close(self) -> None: ...
    def enter(self, epoch: int, communicator: Communicator, pool: object, tokens: object) -> None: ...
    def step_done(self, step: int) -> None: ...


class Ranked:
    """A runner of a small model, what it reports, and a model that can be told to fail."""

    def __init__(self, model_dir: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
        self.told: list[Message] = []
        self.asked = threading.Event()

        def fail(model: object, rank: int) -> None:
            self.asked.set()
            raise ModelError(f"model.safetensors is cut (rank {rank})")

        monkeypatch.setattr(f"services.worker.engine.runner.RankModel.{failing}", fail)
        config = GroupConfig(
            "g", str(model_dir), "small", "float32", 2, 1, "parity", 16, 1 << 20, 64, 4, "shm", 0.2, 3.0, 10.0
        )
        self.runner = Runner(
            model_dir, config, torch.device("cpu"), NoShadow(), Inventory(), self.told.append,  # type: ignore[arg-type]
            host_memory=host_memory(),
        )  # fmt: skip

    def lives_on(self) -> bool:
        """Whether it still takes jobs."""
        self.runner.at_rest.clear()
        self.runner.submit(StandBy(self.runner._epoch, hold=False))
        return self.runner.at_rest.wait(WAIT_S)


@pytest.fixture
def model_dir(tmp_path: Path) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield small_model(tmp_path, "Llama")
    torch.set_num_threads(threads)


def test_a_spare_that_can_not_prepare_a_slice_says_so_and_its_thread_lives(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = Ranked(model_dir, monkeypatch, "prepare")
    try:
        assert spare.asked.wait(WAIT_S)
        assert spare.lives_on()
        assert "rank 0" in spare.runner.unfit
        assert "model.safetensors is cut" in spare.runner.unfit
    finally:
        spare.runner.close()


@pytest.mark.parametrize("job", [Prepare(7, 1), Assign(0, 1, 2, "shm")])
def test_a_worker_that_can_not_load_the_slice_it_is_given_says_so(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, job: Prepare | Assign
) -> None:
    spare = Ranked(model_dir, monkeypatch, "load")
    try:
        spare.runner.submit(job)
        assert spare.asked.wait(WAIT_S)
        assert spare.lives_on()
        assert "rank 1" in spare.runner.unfit
        assert not any(isinstance(message, Prepared) for message in spare.told)
    finally:
        spare.runner.close()


def test_after_an_error_of_the_device_the_process_says_that_it_has_to_end(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = Ranked(model_dir, monkeypatch, "prepare")
    try:

        def fail(job: object) -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(spare.runner, "_stand_by", fail)
        monkeypatch.setattr(spare.runner.shadow.device, "trouble", lambda: "the device failed: Xid 79")
        assert spare.asked.wait(WAIT_S)
        assert spare.lives_on()
        assert spare.lives_on()  # so the first job has been looked at
        assert spare.runner.unfit.startswith("the device failed: Xid 79; StandBy: AcceleratorError: CUDA error")
    finally:
        spare.runner.close()


POISON = 13


def prefill(*tokens: int, anew: bool = True) -> Batch:
    """All of a prompt, as sequence 1 in page 0, and one token drawn."""
    begun = SequenceStart(1, len(tokens), pack_ids([0]), SamplingParams(temperature=0.0))
    one, ids = pack_ids([1]), pack_ids(tokens)
    return Batch(one, pack_ids([0]), pack_ids([len(tokens)]), ids, draws=b"\1", begun=(begun,), ended=one, anew=anew)


def decode(start: int) -> Batch:
    """One more token of sequence 1, which the step before draws."""
    one = pack_ids([1])
    return Batch(one, pack_ids([start]), one, pack_ids([DRAWN]), draws=b"\1")


class Pair:
    """Two ranks of a small model, as their coordinator sees them."""

    def __init__(self, model_dir: Path) -> None:
        config = GroupConfig(
            "g", str(model_dir), "small", "float32", 2, 1, "parity", 16, 1 << 20, 64, 4, "shm", 0.2, 3.0, 60.0
        )
        self.told: list[queue.Queue[Message]] = [queue.Queue(), queue.Queue()]
        self.runners = [
            Runner(
                model_dir, config, torch.device("cpu"), NoShadow(), Inventory(), told.put, host_memory=None,  # type: ignore[arg-type]
            )
            for told in self.told
        ]  # fmt: skip

    def submit(self, *jobs: Job) -> None:
        """One job for each rank, or the same for both."""
        for runner, job in zip(self.runners, jobs * (2 if len(jobs) == 1 else 1), strict=True):
            runner.submit(job)

    def next(self, rank: int) -> Message:
        return self.told[rank].get(timeout=WAIT_S)

    def assigned(self, epoch: int) -> Join:
        """Both have their rank in an epoch; where they meet."""
        self.submit(Assign(epoch, 0, 2, "shm"), Assign(epoch, 1, 2, "shm"))
        meets = self.next(0)
        assert isinstance(meets, Rendezvous)
        assert meets.epoch == epoch, meets
        return Join(epoch, meets.model_address, meets.exchange_address)

    def begin(self, epoch: int) -> None:
        """Both are connected in an epoch."""
        self.submit(self.assigned(epoch))
        assert [type(self.next(rank)) for rank in range(2)] == [Joined, Joined]

    def step(self, epoch: int, step: int, *tokens: int) -> list[Message]:
        """Prefill of some tokens and one more drawn; what the ranks say of it."""
        self.submit(StepPlan(epoch, step, prefill(*tokens)))
        return [self.next(rank) for rank in range(2)]

    def close(self) -> None:
        for runner in self.runners:
            runner.close()
        assert all(told.empty() for told in self.told)


@pytest.fixture
def pair(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """After the first of its collectives, or before, as POISON stands in the prompt first or not, a step raises."""
    forward, logits = RankModel.forward, RankModel.logits_in_pieces
    poisoned = threading.local()

    def before(model: RankModel, chunks: Any, *others: Any) -> Any:
        if chunks[0].tokens[0] == POISON:
            raise RuntimeError("poison")
        poisoned.last = chunks[0].tokens[-1] == POISON
        return forward(model, chunks, *others)

    def after(model: RankModel, *arguments: Any) -> Any:
        if poisoned.last:
            raise MemoryError("no room for logits")
        return logits(model, *arguments)

    monkeypatch.setattr(RankModel, "forward", before)
    monkeypatch.setattr(RankModel, "logits_in_pieces", after)
    made = Pair(model_dir)
    yield made
    made.close()


def drawn(told: list[Message]) -> int:
    """The token that both ranks drew in a step."""
    assert all(isinstance(each, StepDone) for each in told), told
    (token,) = {token for each in told if isinstance(each, StepDone) for token in unpack_ids(each.drawn)}
    return token


def test_after_a_step_that_raised_an_error_on_all_ranks_the_next_one_is_as_ever(pair: Pair) -> None:
    """In the same epoch, over the same communicator, and with the KV that was there."""
    pair.begin(1)
    expected = drawn(pair.step(1, 1, 3, 4, 5))
    for step, tokens in ((2, (POISON, 1)), (3, (1, 2, POISON))):
        told = pair.step(1, step, *tokens)
        assert all(isinstance(each, StepRaised) and each.step == step for each in told), told
        assert len({each.collectives for each in told if isinstance(each, StepRaised)}) == 1
    assert isinstance(told[0], StepRaised)
    assert "no room for logits" in told[0].reason
    assert drawn(pair.step(1, 4, 3, 4, 5)) == expected


def test_steps_that_were_planned_to_follow_one_that_raised_are_left_out(pair: Pair) -> None:
    pair.begin(1)
    pair.submit(StepPlan(1, 1, prefill(POISON, 1)))
    pair.submit(StepPlan(1, 2, decode(2)))
    pair.submit(StepPlan(1, 3, prefill(3, 4, anew=False)))
    pair.submit(StepPlan(1, 4, prefill(3, 4)))
    told = [[pair.next(rank) for _ in range(2)] for rank in range(2)]
    assert [[type(each) for each in of] for of in told] == [[StepRaised, StepDone]] * 2
    assert {each.step for of in told for each in of if isinstance(each, StepDone)} == {4}
    assert all(runner.step_done == 4 for runner in pair.runners)


def test_a_step_goes_on_with_the_token_that_the_one_before_it_draws(pair: Pair) -> None:
    pair.begin(1)
    first = drawn(pair.step(1, 1, 3, 4, 5))
    expected = drawn(pair.step(1, 2, 3, 4, 5, first))
    pair.submit(StepPlan(1, 3, prefill(3, 4, 5)))
    pair.submit(StepPlan(1, 4, decode(3)))
    assert [drawn([pair.next(rank) for rank in range(2)]) for _ in range(2)] == [first, expected]


def test_pages_are_noted_in_the_order_of_the_steps(pair: Pair) -> None:
    """As whole after the step that fills them, and not any more once another is to write them."""
    pair.begin(1)
    key = bytes(16)
    pair.submit(StepPlan(1, 1, prefill(3, 4)))
    pair.submit(NotePages(1, pack_ids([0, 1]), key * 2))
    pair.submit(StepPlan(1, 2, prefill(5, 6)))
    for _ in range(2):
        drawn([pair.next(rank) for rank in range(2)])
    for runner in pair.runners:
        assert runner.at_rest.wait(WAIT_S)
        claim = runner._inventory.claim()
        assert claim is not None
        assert (unpack_ids(claim.pages), claim.keys) == ([1], (key,))


def test_an_epoch_that_ends_while_ranks_connect_or_compute_leaves_them_fit_for_the_next_one(pair: Pair) -> None:
    join = pair.assigned(1)
    pair.runners[0].submit(join)  # the other one never comes
    pair.begin(2)
    expected = drawn(pair.step(2, 1, 3, 4))
    pair.runners[0].submit(StepPlan(2, 2, prefill(3, 4)))  # nor does it here
    pair.begin(3)
    assert drawn(pair.step(3, 1, 3, 4)) == expected


def test_an_error_that_is_none_of_a_step_is_told_as_the_end_of_the_rank(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("no shared memory")

    monkeypatch.setattr("services.worker.engine.runner.Meeting.open", breaks)
    pair.submit(Assign(1, 0, 2, "shm"), Assign(1, 1, 2, "shm"))
    told = pair.next(0)
    assert isinstance(told, RankFailed)
    assert told.fatal
    assert "no shared memory" in told.reason
