"""Which deaths are the device's own: only then a spare elsewhere takes the rank."""

import asyncio
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.worker.agent.app import Worker
from services.worker.agent.supervisor import _Host
from services.worker.device import CudaDevice, watch
from services.worker.device_health import DeviceWatch, Health, failure, visible
from shared.config import WorkerSettings
from shared.messages import Goodbye, Heartbeat, Message


@pytest.mark.parametrize(
    ("health", "words"),
    [
        (Health(), ""),
        (Health(xids=(13, 31, 43, 45, 94)), ""),  # the program's own
        (Health(xids=(31, 79)), "Xid 79"),
        (Health(xids=(48,)), "ECC"),
        (Health(lost=True, xids=(31,)), "off the bus"),
        (Health(remapping_failed=True), "remapped"),
    ],
)
def test_a_device_is_given_up_for_what_is_its_own_and_for_nothing_else(health: Health, words: str) -> None:
    assert words in failure(health)
    assert bool(failure(health)) is bool(words)


def test_devices_are_asked_for_by_what_cuda_was_shown() -> None:
    assert visible([0, 1], None) == {0: 0, 1: 1}
    assert visible([0, 1], "3, GPU-8f6") == {0: 3, 1: "GPU-8f6"}
    assert visible([0, 1], "5") == {0: 5}


class Nvml:
    """Says of device 0 what it is told to say."""

    class NVMLError(Exception):
        pass

    class NVMLError_GpuIsLost(NVMLError):
        pass

    nvmlEventTypeXidCriticalError = NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.xids: list[int] = []
        self.lost = False
        self.remapped = (0, 0, 0, 0)

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByIndex

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, *_: object) -> None: ...
    def nvmlEventSetWait_v2(self, events: object, timeout: int) -> Any:
        if not self.xids:
            raise self.NVMLError("timeout")
        return SimpleNamespace(eventData=self.xids.pop(0))

    def nvmlDeviceGetPciInfo(self, handle: int) -> None:
        if self.lost:
            raise self.NVMLError_GpuIsLost

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 40

    def nvmlDeviceGetRemappedRows(self, handle: int) -> tuple[int, ...]:
        return self.remapped


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_what_nvml_says_is_what_is_known(nvml: Nvml) -> None:
    watch = DeviceWatch([0])
    assert watch.health(0) == Health()
    nvml.xids = [31, 79]
    assert watch.health(0) == Health(xids=(31, 79))
    assert watch.health(0) == Health(xids=(31, 79))  # it stays failed
    nvml.remapped = (0, 0, 0, 1)
    assert watch.health(0).remapping_failed
    nvml.lost = True
    assert watch.health(0).lost


def test_a_process_is_replaced_on_its_device_unless_that_has_failed(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = _Host(WorkerSettings(device="cuda", count=2, name="w"))
    monkeypatch.setattr("os.waitpid", lambda pid, _: (pid, signal.SIGKILL))
    host._pids, host._started = {0: 10, 1: 11}, {0: 0.0, 1: 0.0}
    monkeypatch.setattr(host._watch, "health", lambda index: Health(xids=(79,) if index == 1 else (31,)))
    told = list[tuple[Any, ...]]()
    monkeypatch.setattr(host, "_tell", lambda *given: told.append(given))
    assert not host._reap()
    assert set(host._due) == {0}
    ((place, pid, why),) = told
    assert (place, pid) == (1, 11)
    assert "Xid 79" in why


def test_a_rank_whose_device_fails_while_it_serves_says_goodbye_with_what_failed(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process lives: a kernel that never ends, or one that is not waited for yet."""
    monkeypatch.setattr("services.worker.device.WATCH_S", 0.01)
    device, runner = CudaDevice(torch.device("cuda:0")), SimpleNamespace(unfit="", overstay_s=0.0)
    runner.step_done, runner.in_flight, runner.progress = 0, True, 0

    async def beaten() -> list[Message]:
        worker = Worker(WorkerSettings(), "w", "cuda:0", lambda *_: runner)  # type: ignore[arg-type,return-value]
        worker._runner = runner  # type: ignore[assignment]
        channel = Channel()
        watch(device, worker._device_failed, worker._ended)
        async with asyncio.timeout(20):
            beating = asyncio.create_task(worker._beat(channel, runner, 0.01))  # type: ignore[arg-type]
            while len(channel.sent) < 3:
                await asyncio.sleep(0)
            nvml.xids = [31, 79]
            await beating
        worker._runner = None
        await worker.close()
        return channel.sent

    *beats, last = asyncio.run(beaten())
    assert all(isinstance(each, Heartbeat) for each in beats)
    assert isinstance(last, Goodbye)
    assert "Xid 79" in last.reason


class Channel:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.closed = False

    def send(self, message: Message) -> None:
        self.sent.append(message)

    async def close(self) -> None:
        self.closed = True


def test_without_nvml_a_death_is_the_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert DeviceWatch([0]).health(0) == Health()
