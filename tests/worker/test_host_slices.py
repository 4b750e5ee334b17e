"""A host holds one copy of its weights, whoever filled it, and whoever died on the way."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from services.worker.device import HostDevice
from services.worker.engine import host_slices
from services.worker.engine.host_slices import HostSlices, host_memory
from services.worker.engine.model import RankModel
from services.worker.engine.placed import content
from services.worker.memory import Bytes
from shared.errors import ModelError
from tests.worker.rank_threads import small_model

NAME = b"n" * 32
SIZES = (5000, 7000)


@pytest.fixture
def shared() -> Iterator[int]:
    memory = host_memory()
    yield memory
    os.close(memory)


def filled_with(value: int) -> host_slices.Fill:
    def fill(memory: Bytes) -> Iterator[None]:
        memory[:100] = value
        yield
        memory[100:] = value
        yield

    return fill


def never(memory: Bytes) -> Iterator[None]:
    raise AssertionError("it is filled already")
    yield


def held(shared: int) -> None:
    HostSlices(shared, NAME, SIZES).hold(0, filled_with(1))


def forked(life: Callable[[], None]) -> tuple[int, int]:
    """A process that lives so far, writes a byte, and stays. Returns its pid and where to read the byte."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            life()
            os.write(writing, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def killed(pid: int, reading: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reading)


def test_what_one_has_filled_all_others_map_and_can_not_write(shared: int) -> None:
    first, second = HostSlices(shared, NAME, SIZES), HostSlices(shared, NAME, SIZES)
    assert first.hold(1, filled_with(7)) is not None
    again = second.hold(1, never)
    assert again is not None
    assert again.tolist() == [7] * SIZES[1]
    assert not again.flags.writeable
    assert second.hold(0, filled_with(3)) is not None  # areas lie apart
    assert first.hold(1, never).tolist() == [7] * SIZES[1]  # type: ignore[union-attr]


def test_a_slice_whose_filler_was_killed_half_way_is_filled_again(shared: int) -> None:
    def half() -> None:
        parts = []

        def fill(memory: Bytes) -> Iterator[None]:
            memory[:100] = 1
            yield
            os.write(parts[0], b"!")
            signal.pause()

        parts.append(writing)
        HostSlices(shared, NAME, SIZES).hold(0, fill)

    reading, writing = os.pipe()
    pid, other = forked(half)
    assert os.read(reading, 1) == b"!"
    survivor = HostSlices(shared, NAME, SIZES)
    assert survivor.hold(0, never) is None  # it is at it
    assert survivor.hold(1, filled_with(2)) is not None  # and at nothing else
    killed(pid, other)
    memory = survivor.hold(0, filled_with(9))
    assert memory is not None
    assert memory.tolist() == [9] * SIZES[0]
    os.close(reading)
    os.close(writing)


def test_a_filler_that_fails_leaves_the_slice_to_the_next_one(shared: int) -> None:
    def fails(memory: Bytes) -> Iterator[None]:
        memory[:] = 1
        yield
        raise ModelError("the file is cut")

    slices = HostSlices(shared, NAME, SIZES)
    with pytest.raises(ModelError, match="cut"):
        slices.hold(0, fails)
    memory = slices.hold(0, filled_with(5))
    assert memory is not None
    assert set(memory) == {5}


def test_nobody_waits_for_a_filler_that_stands_still(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_slices, "STALL_S", 0.1)
    waiting = HostSlices(shared, NAME, SIZES)

    def stands(memory: Bytes) -> Iterator[None]:
        yield
        assert waiting.wait(0, never) is None
        yield

    assert HostSlices(shared, NAME, SIZES).hold(0, stands) is not None
    assert waiting.wait(0, never) is not None


def test_memory_of_other_weights_is_left_alone_while_it_is_used(
    shared: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_slices, "ATTACH_S", 0.1)
    pid, reading = forked(lambda: held(shared))
    assert os.read(reading, 1) == b"!"
    own = HostSlices(shared, b"m" * 32, SIZES)
    assert "in use for others" in caplog.text
    assert own.hold(0, filled_with(2)) is not None
    alike = HostSlices(shared, NAME, SIZES)
    assert set(alike.hold(0, never)) == {1}  # type: ignore[arg-type]
    killed(pid, reading)


def test_memory_that_nobody_uses_any_more_is_given_to_other_weights(shared: int) -> None:
    pid, reading = forked(lambda: held(shared))
    assert os.read(reading, 1) == b"!"
    killed(pid, reading)
    other = HostSlices(shared, b"m" * 32, SIZES)
    assert set(other.hold(0, filled_with(4))) == {4}  # type: ignore[arg-type]
    assert os.pread(shared, 32, 0) == b"m" * 32


# -- of a model ------------------------------------------------------------------------------------------------------


def loaded(directory: Path, memory: int | None, rank: int, device: str = "cpu") -> RankModel:
    model = RankModel(directory, size=2, dtype=torch.float32, device=device, host_memory=memory)
    model.load(rank)
    return model


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_second_worker_computes_with_the_bytes_of_the_first_and_reads_no_file(
    tmp_path: Path, shared: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = small_model(tmp_path, family)
    alone, first = loaded(directory, None, 1), loaded(directory, shared, 1)

    def no_file(*_: object) -> None:
        raise AssertionError("a file is read")

    monkeypatch.setattr("services.worker.engine.model.Weights", no_file)
    second = loaded(directory, shared, 1)
    monkeypatch.undo()
    x = torch.randn(3, 48)
    for own, one, other in zip(alone._all_linears(), first._all_linears(), second._all_linears(), strict=True):
        assert own._packed is not None
        assert one._packed is not None
        assert other._packed is not None
        assert content(own._packed).tobytes() == content(one._packed).tobytes() == content(other._packed).tobytes()
        if own.inputs == 48 and own.style == "colwise":
            assert torch.equal(own(x), other(x))
        assert (own._bias is None) == (other._bias is None)
    for mine, theirs in zip(alone._base.parameters(), second._base.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_made_by_a_thread_of_other_settings_is_held_as_the_computing_thread_packs_it(
    tmp_path: Path, shared: int
) -> None:
    """oneDNN's form of a weight depends on how many threads the one that packs it may use."""
    directory = small_model(tmp_path, "Llama", vocab_size=400)

    def made(threads: int) -> RankModel:
        torch.set_num_threads(threads)
        model = RankModel(directory, size=3, dtype=torch.float32, host_memory=shared)
        assert all(linear.room for linear in model._all_linears())
        return model

    def held(model: RankModel) -> bool:
        torch.set_num_threads(1)
        model.load(0)
        return model.prepare(1)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
            assert second.submit(held, first.submit(made, 2).result()).result()
    finally:
        torch.set_num_threads(before)


def test_weights_that_are_replaced_while_they_are_read_are_not_held(tmp_path: Path, shared: int) -> None:
    directory = small_model(tmp_path, "Llama")
    model = RankModel(directory, size=2, dtype=torch.float32, host_memory=shared)
    model.load_shared()
    os.utime(directory / "model.safetensors", (1, 1))
    with pytest.raises(ModelError, match="replaced"):
        model.prepare(0)


def test_what_goes_to_a_device_is_pinned_until_it_is_there(
    tmp_path: Path, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    class Noted(HostDevice):
        def pin(self, memory: Bytes) -> None:
            did.append(f"pin {len(memory)}")

        def unpin(self, memory: Bytes) -> None:
            did.append(f"unpin {len(memory)}")

        def finish(self) -> None:
            did.append("finish")

    monkeypatch.setattr("services.worker.engine.model.fill_buffers", lambda *_: None)
    monkeypatch.setattr("services.worker.engine.model.make_device", lambda _: Noted())
    model = loaded(small_model(tmp_path, "Llama"), shared, 1, "meta")
    model.forget_prepared()
    room = sum(linear.room for linear in model._all_linears())
    assert did == [f"pin {room}", "finish", f"unpin {room}"]
    model.forget_prepared()
    assert len(did) == 3
