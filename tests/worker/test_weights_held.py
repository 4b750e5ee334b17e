"""What a spare holds ready for a GPU lies in host memory, and of it one slice goes to the device."""

from pathlib import Path

import pytest
import torch

from services.worker.engine.host_slices import host_memory
from services.worker.engine.model import RankModel
from tests.worker.rank_threads import small_model

SIZE = 3


@pytest.fixture(autouse=True)
def _no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked at, which no tensor on "meta" allows."""
    monkeypatch.setattr("services.worker.engine.model.fill_buffers", lambda *_: None)


def test_slices_of_all_ranks_are_held_in_host_memory_and_one_is_on_the_device(tmp_path: Path) -> None:
    """The device is "meta", which like a GPU is not the host's."""
    model = RankModel(
        small_model(tmp_path, "Qwen2"), size=SIZE, dtype=torch.float32, device="meta", host_memory=host_memory()
    )
    for rank in range(SIZE):
        model.prepare(rank)
    model.load(1)
    held = [packed for slices in model._ready.values() for packed in slices]
    assert {packed.weight.device.type for packed in held if packed.weight is not None} == {"cpu"}
    assert len(held) == SIZE * len(model._all_linears())
    for linear, packed in zip(model._all_linears(), model._ready[1], strict=True):
        assert linear._weight is not None
        assert packed.weight is not None
        assert (linear._weight.device.type, linear._weight.shape) == ("meta", packed.weight.shape)
        assert (linear._bias is None) == (packed.bias is None)


def test_a_slice_that_was_not_held_is_read_straight_to_the_device(tmp_path: Path) -> None:
    model = RankModel(small_model(tmp_path, "Llama"), size=SIZE, dtype=torch.float32, device="meta")
    model.load(2)
    assert not model._ready
    assert all(linear._weight is not None and linear._weight.is_meta for linear in model._all_linears())
