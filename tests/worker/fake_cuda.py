"""A GPU that is none: the worker's own code runs on tensors of the CPU, and every operation is noted with its order.

Operations are done at once, in the order in which they are asked for; `Ordering` finds those that a real device could
do in another. Copies between host and device that don't wait land late, on purpose: when somebody waits for their
stream, or something on the device touches their bytes. Who reads host memory too early finds POISON there.

What torch does is seen by a dispatch mode, in each thread that was bound; kernels of the codec by `Kernels`.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._C import _distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.launch import Launch, Program
from services.worker.communicator.torch_dist import NcclCommunicator
from services.worker.device import Device
from services.worker.memory import Bytes
from tests.pure.kernels_on_cpu import CpuRunner
from tests.pure.ordering import Access, Clock, Hazard, Ordering, Ranges, Work, joined

POISON = 0xEE
_VIEWS = {"detach", "alias", "_unsafe_view"}
_READ_BACK = {"_local_scalar_dense", "equal", "is_nonzero"}
_ROWS = {"index_copy_", "index_select"}


@dataclass(frozen=True, slots=True)
class _Late:
    """A copy that has not landed."""

    work: Work
    stream: int
    land: Callable[[], None]

    def touches(self, access: Sequence[Access]) -> bool:
        mine = {each.memory for each in self.work.access}
        return any(each.memory in mine for each in access)


class World:
    """All fake devices of a test: one order, one memory. For any thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.order = Ordering()
        self.counts: Counter[str] = Counter()
        """Launches, copies, collectives, waits of the host; and bytes of each kind of copy."""
        self.by_thread: dict[str, Counter[str]] = {}
        self._kept: list[object] = []  # memory is never used again, so that an address says what it is
        self._host: set[int] = set()
        self._storages: dict[int, int] = {}  # where it begins -> its bytes
        self._late: list[_Late] = []
        self._here = threading.local()
        self._streams = 0

    def count(self, what: str, times: int = 1) -> None:
        with self.lock:
            self.counts[what] += times
            self.by_thread.setdefault(self.thread, Counter())[what] += times

    def hazards(self) -> list[Hazard]:
        """What nothing orders."""
        with self.lock:
            return self.order.hazards()

    # -- threads of the host -----------------------------------------------------------------------------------------

    @property
    def thread(self) -> str:
        return self.line(threading.current_thread())

    @staticmethod
    def line(thread: threading.Thread) -> str:
        return f"thread {thread.name} {thread.ident}"

    def tell(self, thread: threading.Thread | None = None) -> Clock:
        """What a thread, the calling one, has done and waited for, as a message carries it."""
        with self.lock:
            return self.order.clock(self.line(thread or threading.current_thread()))

    def hear(self, told: Clock) -> None:
        """The calling thread goes on after that."""
        with self.lock:
            self.order.join(self.thread, told)

    # -- memory ------------------------------------------------------------------------------------------------------

    def keep(self, tensor: torch.Tensor, *, host: bool) -> None:
        """Memory that is there from the beginning: the device's, or pinned."""
        storage = tensor.untyped_storage()
        with self.lock:
            self._kept.append(storage)
            self._storages[storage.data_ptr()] = storage.nbytes()
            if host:
                self._host.add(storage.data_ptr())

    def drop(self, tensor: torch.Tensor) -> None:
        """Memory is pinned no longer: no copy may need it any more."""
        where = tensor.untyped_storage().data_ptr()
        with self.lock:
            assert not any(access.memory == where for each in self._late for access in each.work.access), (
                "memory is unpinned that a copy has yet to read"
            )
            self._host.remove(where)
            del self._storages[where]

    def on_device(self, tensor: torch.Tensor) -> bool:
        where = tensor.untyped_storage().data_ptr()
        return where in self._storages and where not in self._host

    def pinned(self, tensor: torch.Tensor) -> bool:
        at = tensor.data_ptr()
        return any(start <= at < start + self._storages[start] for start in self._host)

    def at(self, address: int, length: int, *, writes: bool) -> Access:
        """Bytes that a kernel was given by address. Raises where no device memory is, as a GPU would."""
        for start, size in self._storages.items():
            if start <= address and address + length <= start + size and start not in self._host:
                return Access(start, [(address - start, address - start + length)], writes)
        raise RuntimeError("CUDA error: an illegal memory access: a kernel was given memory of the host")

    def access(self, tensor: torch.Tensor, writes: bool) -> Access:
        assert self.on_device(tensor) or self.pinned(tensor), "an address that is not kept may soon be another tensor's"
        return Access(tensor.untyped_storage().data_ptr(), _ranges(tensor), writes)

    # -- work --------------------------------------------------------------------------------------------------------

    def new_stream(self) -> int:
        with self.lock:
            self._streams += 1
            return self._streams

    def do(self, stream: int, label: str, access: Sequence[Access], late: Callable[[], None] | None = None) -> None:
        """Something is asked of a stream. `late`: a copy that is done when somebody needs it."""
        with self.lock:
            self._land([each for each in self._late if each.touches(access)])
            line = f"stream {stream}"
            self.order.join(line, self.order.clock(self.thread))
            work = self.order.work(line, label, access)
            if late is not None:
                self._late.append(_Late(work, stream, late))

    def finish(self, stream: int) -> None:
        """The calling thread waits for a stream."""
        with self.lock:
            self.count("waits")
            line = f"stream {stream}"
            self.order.join(line, self.order.clock(self.thread))
            reached = self.order.clock(line)
            self.order.join(self.thread, reached)
            self._land([each for each in self._late if reached.get(each.work.timeline, 0) >= each.work.number])

    def _land(self, copies: Sequence[_Late]) -> None:
        for each in copies:
            self._late.remove(each)
            each.land()

    # -- what torch does ---------------------------------------------------------------------------------------------

    def bind(self, device: "FakeCuda", stream: int) -> None:
        if not hasattr(self._here, "mode"):
            self._here.device, self._here.stream = device, stream
            self._here.mode = _Noted(self)
            self._here.mode.__enter__()

    def release(self) -> None:
        """This thread is one of the test's again."""
        if hasattr(self._here, "mode"):
            self._here.mode.__exit__(None, None, None)
            del self._here.mode, self._here.device

    def check_bound(self, device: "FakeCuda") -> None:
        assert getattr(self._here, "device", None) is device, f"{self.thread} is not bound to the device that it uses"

    @property
    def stream(self) -> int:
        """The calling thread's current stream."""
        return int(getattr(self._here, "stream", 0))

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self._here.stream = self.stream, stream
        try:
            yield
        finally:
            self._here.stream = before


class _Noted(TorchDispatchMode):
    """Tells the world what torch is asked to do in this thread."""

    def __init__(self, world: World):
        super().__init__()
        self._world = world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [each for each in _tensors((*args, *kwargs.values())) if self._world.on_device(each)]
        if name == "copy_" and self._is_late(args, kwargs):
            return self._copy_late(args[0], args[1])
        result = func(*args, **kwargs)
        if name in _VIEWS or func.is_view:
            return result
        written = _written(func, args, kwargs)
        made = [each for each in _tensors((result,)) if not any(_same(each, one) for one in _tensors(args))]
        for each in made:
            if not self._is_read_back(name):
                self._world.keep(each, host=False)
        access = self._accesses(name, args, given, written, made)
        if access:
            self._world.count("launches")
            self._world.do(self._world.stream, name, access)
        if self._is_read_back(name) or (name == "copy_" and not all(map(self._world.on_device, args[:2]))):
            self._world.finish(self._world.stream)
        return result

    def _is_read_back(self, name: str) -> bool:
        return name in _READ_BACK

    def _accesses(
        self, name: str, args: Any, given: Sequence[torch.Tensor], written: Sequence[torch.Tensor], made: Any
    ) -> list[Access]:
        if name in _ROWS:
            return self._rows(name, args, written, made)
        reads = [self._world.access(each, False) for each in given if not any(each is one for one in written)]
        writes = [self._world.access(each, True) for each in (*written, *made) if self._world.on_device(each)]
        return reads + writes

    def _rows(self, name: str, args: Any, written: Sequence[torch.Tensor], made: Any) -> list[Access]:
        """Of index_copy_ and index_select, the rows that are meant and no others."""
        pool, dimension, index = args[0], args[1], args[2]
        rows = pool.movedim(dimension, 0) if dimension else pool
        chosen = joined([each for at in index.tolist() for each in _ranges(rows[at])])
        others = [each for each in (index, *args[3:4]) if self._world.on_device(each)]
        found = [Access(pool.untyped_storage().data_ptr(), chosen, name == "index_copy_")]
        found += [self._world.access(each, False) for each in others]
        if name == "index_select":
            found += [self._world.access(each, True) for each in (*written, *made)]
        return found

    def _is_late(self, args: Any, kwargs: Any) -> bool:
        asked = kwargs.get("non_blocking", len(args) > 2 and args[2])
        sides = [self._world.on_device(each) for each in args[:2]]
        if sides[0] == sides[1]:
            return False
        if not self._world.pinned(args[sides.index(False)]):
            self._world.count("copies that are not pinned")
            return False
        return bool(asked)

    def _copy_late(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        out = self._world.on_device(source)
        self._world.count("copies out" if out else "copies in")
        self._world.count("bytes out" if out else "bytes in", target.nbytes)
        access = [self._world.access(source, False), self._world.access(target, True)]

        def land() -> None:
            np.copyto(target.detach().numpy(), source.detach().numpy())

        self._world.do(self._world.stream, "copy to the host" if out else "copy from the host", access, land)
        return target


class FakeCuda(Device):
    """One device of a world. Its default stream is its own."""

    def __init__(self, world: World):
        super().__init__(torch.device("cpu"))
        self.world = world
        self._default = world.new_stream()

    def bind(self) -> None:
        self.world.bind(self, self._default)

    def stream(self) -> int:
        return self.world.new_stream()

    def on(self, stream: int) -> AbstractContextManager[object]:
        return self.world.on(stream)

    @property
    def address(self) -> int:
        self.world.check_bound(self)
        return self.world.stream

    def mark(self) -> Clock:
        self.world.check_bound(self)
        with self.world.lock:
            line = f"stream {self.world.stream}"
            self.world.order.join(line, self.world.order.clock(self.world.thread))
            return self.world.order.clock(line)

    def wait(self, mark: Clock) -> None:
        self.world.check_bound(self)
        with self.world.lock:
            self.world.order.join(f"stream {self.world.stream}", mark)

    def finish(self) -> None:
        self.world.check_bound(self)
        self.world.finish(self.world.stream)

    def host(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        count = int(np.prod(shape)) * dtype.itemsize
        memory = torch.from_numpy(np.full(count, POISON, dtype=np.uint8))
        self.world.keep(memory, host=True)
        return memory.view(dtype).view(shape)

    def pin(self, memory: Bytes) -> None:
        self.world.keep(torch.from_numpy(memory), host=True)

    def unpin(self, memory: Bytes) -> None:
        self.world.drop(torch.from_numpy(memory))


class Wire:
    """What connects the ranks of one communicator."""

    def __init__(self, world: World, size: int):
        self.world = world
        self.size = size
        self.together = threading.Barrier(size)
        self.sent: list[Any] = [None] * size
        self.clocks: list[Clock] = [{}] * size


class _Group:
    """A rank's NCCL: a stream of its own, which goes on behind the stream that asks; `wait` does the reverse."""

    def __init__(self, wire: Wire, rank: int):
        self._wire = wire
        self._rank = rank
        self._stream = wire.world.new_stream()

    def allreduce(self, tensors: list[torch.Tensor], options: object) -> "_Queued":
        (tensor,) = tensors
        return self._meet("allreduce", tensor, tensor, lambda all_: sum(all_[1:], all_[0]))

    def _allgather_base(self, out: torch.Tensor, tensor: torch.Tensor) -> "_Queued":
        return self._meet("allgather", tensor, out, np.stack)

    def alltoall_base(
        self, out: torch.Tensor, sent: torch.Tensor, lengths_in: list[int], lengths_out: list[int], options: object
    ) -> "_Queued":
        cuts = np.cumsum([0, *lengths_out])
        parts = [sent.detach().numpy()[cuts[r] : cuts[r + 1]] for r in range(self._wire.size)]

        def mine(all_: Any) -> Any:
            return np.concatenate([each[self._rank] for each in all_])

        came = self._meet("alltoall", sent, out, mine, parts)
        assert len(out) == sum(lengths_in)
        return came

    def abort(self) -> None:
        self._wire.together.abort()

    def _meet(self, label: str, sent: torch.Tensor, out: torch.Tensor, make: Any, parts: Any = None) -> "_Queued":
        wire, world, line = self._wire, self._wire.world, f"stream {self._stream}"
        with world.lock:
            world.count("collectives")
            world.order.join(line, world.order.clock(f"stream {world.stream}"))
            world.do(self._stream, f"{label} sends", [world.access(sent, False)])
            wire.sent[self._rank] = parts if parts is not None else sent.detach().numpy().copy()
            wire.clocks[self._rank] = world.order.clock(line)
        try:
            wire.together.wait(10)
            content, clocks = make(list(wire.sent)), list(wire.clocks)
            with world.lock:
                for clock in clocks:
                    world.order.join(line, clock)
                world.do(self._stream, f"{label} receives", [world.access(out, True)])
            wire.together.wait(10)  # all have read what the others sent
        except threading.BrokenBarrierError as error:
            raise RuntimeError("NCCL communicator was aborted") from error
        np.copyto(out.detach().numpy(), np.asarray(content).reshape(out.shape))
        return _Queued(world, self._stream)


@dataclass(frozen=True, slots=True)
class _Queued:
    """A collective that was asked for (c10d.Work)."""

    world: World
    stream: int

    def wait(self) -> None:
        with self.world.lock:
            self.world.order.join(f"stream {self.world.stream}", self.world.order.clock(f"stream {self.stream}"))

    def is_completed(self) -> bool:
        return True


class FakeNccl(NcclCommunicator):
    """The worker's communicator over NCCL, with a wire of the test's for NCCL."""

    def __init__(self, device: FakeCuda, wire: Wire, rank: int, timeout: float = 10.0):
        self._fake = device, wire
        super().__init__("nowhere:0", rank, wire.size, timeout)

    def _reach(self, address: str) -> Any:
        return c10d.HashStore()

    def _meet(self, store: object, cancelled: object) -> None:
        pass

    def _own_device(self) -> Device:
        return self._fake[0]

    def _connect(self, store: object, timeout: object) -> Any:
        return _Group(self._fake[1], self.rank)


class Kernels(CpuRunner):
    """The codec's kernels on a fake device: run at once, noted on the stream that they were launched on."""

    def __init__(self, world: World):
        super().__init__()
        self._world = world

    def run(self, program: Program, launches: Iterable[Launch], stream: int) -> None:
        for launch in launches:
            length, access = int(launch.batch["length"]), list[Access]()
            for row in launch.batch["shards"][: launch.grid[1]].tolist():
                for column, address in enumerate(row):
                    sums = column >= program.sources + program.targets
                    size = 8 * (program.sources + program.targets) if sums else length
                    access.append(self._world.at(address, size, writes=column >= program.sources))
            self._world.count("launches")
            self._world.do(stream, "codec", access)
            with self._world.lock:  # its threads' places are variables of the library, which all devices share
                super().run(program, [launch], stream)

    def clear(self, address: int, length: int, stream: int) -> None:
        self._world.do(stream, "clear", [self._world.at(address, length, writes=True)])
        super().clear(address, length, stream)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    named = {argument.name: argument for argument in func._schema.arguments}
    pairs = [*zip(func._schema.arguments, args, strict=False), *((named[key], value) for key, value in kwargs.items())]
    changed = [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    return list(_tensors(changed))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _ranges(tensor: torch.Tensor) -> Ranges:
    """The bytes of a tensor in its storage."""
    if not tensor.numel():
        return []
    size = tensor.element_size()
    places = np.zeros(1, dtype=np.int64) + tensor.storage_offset() * size
    width = size
    dims = sorted(((stride * size, count) for stride, count in zip(tensor.stride(), tensor.shape, strict=True)))
    for stride, count in dims:
        if count == 1:
            continue
        if stride <= width:
            width += stride * (count - 1)
        else:
            places = (places[:, None] + np.arange(count) * stride).reshape(-1)
    return joined([(int(at), int(at) + width) for at in places])
