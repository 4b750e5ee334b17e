"""What a worker asks of its device: order between streams, memory that copies reach by themselves, one way to wait.

In host memory everything is done when a call returns, so there is nothing to order. On CUDA a call only queues; what it
does is done when the stream gets there. The tests have a third device, which checks that order (tests/worker).
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from services.worker.device_health import DeviceWatch, failure
from services.worker.memory import Bytes
from shared.types.keys import ROUND_BYTES

WATCH_S = 1.0
Mark = Any
"""A place in a stream; None in host memory."""
Stream = Any


class Device(ABC):
    """One device. All is about the calling thread's current stream, which is the device's default one
    until `on` says otherwise."""

    round_bytes = ROUND_BYTES
    """What a rank sends of its pages in one round of exchange; equal on all ranks of a group."""

    def __init__(self, where: torch.device):
        self.where = where

    @abstractmethod
    def bind(self) -> None:
        """The calling thread is about to use the device: to be called first in each that does."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream, beside all others."""

    @abstractmethod
    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Let this stream be the current one."""

    @property
    @abstractmethod
    def address(self) -> int:
        """The current stream, as CUDA's own calls want it."""

    @abstractmethod
    def mark(self) -> Mark:
        """The place behind all that was asked of the current stream so far."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """What is asked of the current stream from now on is done behind the mark; the thread goes on at once."""

    def trouble(self) -> str:
        """Why the device can't be used any more, in words; empty if nothing is known against it. For any thread."""
        return ""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all is done that was asked of the current stream."""

    @abstractmethod
    def host(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """New host memory, uninitialised, which copies from and to the device (`non_blocking`) don't wait for."""

    @abstractmethod
    def pin(self, memory: Bytes) -> None:
        """Copies from and to this memory, too, don't wait for the host, until `unpin`. It takes milliseconds a GB."""

    @abstractmethod
    def unpin(self, memory: Bytes) -> None:
        """All such copies are done: the memory is as it was."""


class HostDevice(Device):
    """Host memory: every call is done when it returns."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def bind(self) -> None:
        pass

    def stream(self) -> Stream:
        return None

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return nullcontext()

    @property
    def address(self) -> int:
        return 0

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        pass

    def finish(self) -> None:
        pass

    def host(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        content = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)  # NumPy asks for huge pages
        return torch.from_numpy(content).view(dtype).view(shape)

    def pin(self, memory: Bytes) -> None:
        pass

    def unpin(self, memory: Bytes) -> None:
        pass


class CudaDevice(Device):
    """One GPU, by torch."""

    round_bytes = 64 << 20  # about a millisecond of NVLink and PCIe, beside which launches and waits are little

    def __init__(self, where: torch.device):
        super().__init__(torch.device("cuda", where.index or 0))
        self._cuda: Any = torch.cuda
        self._health = DeviceWatch([self.where.index])  # what happens from now on
        self._asking = threading.Lock()

    def bind(self) -> None:
        self._cuda.set_device(self.where)

    def stream(self) -> Stream:
        return self._cuda.Stream(self.where)

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        chosen: AbstractContextManager[object] = self._cuda.stream(stream)
        return chosen

    @property
    def address(self) -> int:
        return int(self._cuda.current_stream(self.where).cuda_stream)

    def mark(self) -> Mark:
        return self._cuda.current_stream(self.where).record_event()

    def wait(self, mark: Mark) -> None:
        self._cuda.current_stream(self.where).wait_event(mark)

    def trouble(self) -> str:
        with self._asking:
            return failure(self._health.health(self.where.index))

    def finish(self) -> None:
        self._cuda.current_stream(self.where).synchronize()

    def host(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def pin(self, memory: Bytes) -> None:
        runtime = self._cuda.cudart()
        self._cuda.check_error(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))

    def unpin(self, memory: Bytes) -> None:
        runtime = self._cuda.cudart()
        self._cuda.check_error(runtime.cudaHostUnregister(memory.ctypes.data))


class Fence:
    """Order between two streams that touch the same pages: who has written leaves a mark, the other goes on behind it.

    For any thread. Neither side waits on the host.
    """

    def __init__(self, device: Device):
        self._device = device
        self._mark: Mark = None

    def leave(self) -> None:
        """All that was asked of this thread's stream so far comes before what `wait` is called for next."""
        self._mark = self._device.mark()

    def wait(self) -> None:
        """What is asked of this thread's stream from now on comes after what the last `leave` was called for."""
        if (mark := self._mark) is not None:
            self._device.wait(mark)


def watch(device: Device, failed: Callable[[str], None], ended: threading.Event) -> None:
    """Look at a device until `ended`, from a thread of its own: to ask one that has failed may take long.

    `failed` is called once, from there, with why it can't be used any more.
    """

    def look() -> None:
        while not ended.wait(WATCH_S):
            if trouble := device.trouble():
                failed(trouble)
                return

    threading.Thread(target=look, name="device-watch", daemon=True).start()


def make_device(where: torch.device) -> Device:
    """The device of this name."""
    return CudaDevice(where) if where.type == "cuda" else HostDevice()
