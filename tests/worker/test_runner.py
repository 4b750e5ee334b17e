"""The compute thread outlives what it can't do, and says what that is."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.worker.agent.inventory import Inventory
from services.worker.device import Fence, HostDevice
from services.worker.engine.runner import Runner
from shared.errors import ModelError
from shared.messages import Assign, Message, Prepare, Prepared, StandBy
from shared.types import GroupConfig
from tests.worker.rank_threads import small_model

WAIT_S = 20.0


class NoShadow:
    """Protects nothing."""

    device = HostDevice()
    restored = Fence(device)

    def interrupt(self, epoch: int) -> None: ...
    def close(self) -> None: ...


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
            hold_weights=True,
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
        monkeypatch.setattr(spare.runner.shadow.device, "trouble", lambda: "the device failed: Xid 79; ")
        assert spare.asked.wait(WAIT_S)
        assert spare.lives_on()
        assert spare.lives_on()  # so the first job has been looked at
        assert spare.runner.unfit.startswith("the device failed: Xid 79; StandBy: AcceleratorError: CUDA error")
    finally:
        spare.runner.close()
