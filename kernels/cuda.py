"""Backend for GPUs: erasure.cu, compiled by CuPy for each matrix and launched on the caller's stream.

A launch allocates nothing, copies nothing and waits for nothing: the addresses of its shards are its argument. The
first use of a matrix on a machine compiles its kernel, in 0.1 to 1 s: Codec.prepare does that ahead of time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from kernels.codec import Addresses, Codec, DecodePlan, Shard, check_addresses
from kernels.errors import CodecError
from kernels.generator import parity_matrix
from kernels.launch import BLOCK, MAX_SOURCES, MAX_TARGETS, SOURCE, WIDTHS, Launch, Program, plan_launches

_PROGRAMS = 1024  # compiled kernels kept: a pattern of erasures each, about 30 KiB
_SUM_BYTES = 8
_CUDA_KINDS = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A shard given by its address on a CUDA device."""

    address: int
    length: int
    device: int = 0

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.length,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA_KINDS[0], self.device


class Runner(Protocol):
    """Compiles programs and launches them on one device."""

    device: int

    def prepare(self, program: Program) -> None:
        """Compile a program, unless it is."""

    def run(self, program: Program, launches: Iterable[Launch], stream: int) -> None:
        """Launch on a stream, given by its address, and return at once."""

    def clear(self, address: int, length: int, stream: int) -> None:
        """Set these bytes to 0 on a stream, and return at once."""

    def device_of(self, address: int) -> int | None:
        """Return the device whose memory this is, if it is one's."""


class CudaCodec(Codec):
    """The code on one GPU. Shards are torch tensors, CuPy arrays, or DeviceMemory, contiguous, of equal bytes."""

    def __init__(self, k: int, m: int, runner: Runner):
        super().__init__(k, m)
        if k > MAX_SOURCES or m > MAX_TARGETS:
            raise CodecError(f"on a GPU k is at most {MAX_SOURCES} and m at most {MAX_TARGETS}, not {k} and {m}")
        self._runner = runner
        self._encode = Program.of(parity_matrix(k, m))
        self._decode = lru_cache(maxsize=_PROGRAMS)(_decode_program)

    def encode(self, data: Sequence[Shard], parity: Sequence[Shard], *, stream: int = 0) -> None:
        self._code(self._encode, data, parity, stream)

    def reconstruct(
        self, plan: DecodePlan, sources: Sequence[Shard], targets: Sequence[Shard], *, stream: int = 0
    ) -> None:
        self._check_plan(plan)
        self._code(self._decode(plan), sources, targets, stream)

    def encode_at(self, addresses: Addresses, length: int, *, stream: int = 0, sums: int = 0) -> None:
        """As Codec says; sums: the address of uint64 [stripes, k + m] on the device, for sum_checksum of each shard."""
        self._code_at(self._encode, addresses, length, stream, sums)

    def reconstruct_at(
        self, plan: DecodePlan, addresses: Addresses, length: int, *, stream: int = 0, sums: int = 0
    ) -> None:
        """As Codec says; sums: the address of uint64 [stripes, k + len(plan.targets)], likewise."""
        self._check_plan(plan)
        self._code_at(self._decode(plan), addresses, length, stream, sums)

    def prepare(self, plans: Iterable[DecodePlan] = (), *, sums: bool = False) -> None:
        self._runner.prepare(_with_sums(self._encode) if sums else self._encode)
        for plan in plans:
            self._check_plan(plan)
            self._runner.prepare(_with_sums(self._decode(plan)) if sums else self._decode(plan))

    def _code(self, program: Program, sources: Sequence[Shard], targets: Sequence[Shard], stream: int) -> None:
        if len(sources) != program.sources or len(targets) != program.targets:
            raise CodecError(
                f"{len(sources)} sources and {len(targets)} targets given; "
                f"{program.sources} and {program.targets} are needed"
            )
        places = [self._place(shard, writes=False) for shard in sources]
        places += [self._place(shard, writes=True) for shard in targets]
        lengths = {length for _, length in places}
        if len(lengths) > 1:
            raise CodecError(f"shards of unequal length: {sorted(lengths)}")
        self._code_at(program, np.array([[address for address, _ in places]], dtype=np.uint64), lengths.pop(), stream)

    def _code_at(self, program: Program, addresses: Addresses, length: int, stream: int, sums: int = 0) -> None:
        check_addresses(addresses, program.sources, program.targets, length)
        if sums:
            step = _SUM_BYTES * addresses.shape[1]
            rows = np.uint64(sums) + np.arange(len(addresses), dtype=np.uint64) * np.uint64(step)
            program, addresses = _with_sums(program), np.column_stack([addresses, rows])
            self._runner.clear(sums, step * len(addresses), stream)
        self._runner.run(program, plan_launches(program, addresses, length), stream)

    def _place(self, shard: Any, *, writes: bool) -> tuple[int, int]:
        """Return a shard's address and bytes. Raises CodecError if it is not this device's, contiguous, or writable."""
        view = getattr(shard, "__cuda_array_interface__", None)
        if view is None:
            raise CodecError(
                f"a shard is an array in the memory of cuda:{self._runner.device}, not {type(shard).__name__}"
            )
        address, is_read_only = view["data"]
        if view.get("strides") is not None and not _is_contiguous(view):
            raise CodecError(f"a shard is contiguous; this one has shape {view['shape']}, strides {view['strides']}")
        if writes and is_read_only:
            raise CodecError("a target is read-only")
        length = int(np.dtype(view["typestr"]).itemsize * np.prod(view["shape"], dtype=np.int64))
        if length and self._device_of(shard, address) != self._runner.device:
            raise CodecError(f"a shard is not in the memory of cuda:{self._runner.device}")
        return address, length

    def _device_of(self, shard: Any, address: int) -> int | None:
        if not hasattr(shard, "__dlpack_device__"):
            return self._runner.device_of(address)
        kind, index = shard.__dlpack_device__()
        return int(index) if kind in _CUDA_KINDS else None


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream of the caller's, in the protocol of CUDA's Python libraries: (version, address)."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


class CupyRunner:
    """Runs programs on a GPU through CuPy, which keeps compiled ones on disk too. Raises CodecError without one."""

    def __init__(self, device: int = 0):
        try:
            import cupy
        except ImportError as error:
            raise CodecError("CuPy is not here: install ghostserve[cuda]") from error
        self._cupy = cupy
        try:
            devices = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise CodecError(f"CUDA can't be used: {error}") from error
        if device >= devices:
            raise CodecError(f"there is no cuda:{device}: CUDA shows {devices} devices")
        self.device = device
        self._kernels = lru_cache(maxsize=_PROGRAMS)(self._compile)

    def prepare(self, program: Program) -> None:
        self._kernels(program)

    def run(self, program: Program, launches: Iterable[Launch], stream: int) -> None:
        kernels = self._kernels(program)
        with self._cupy.cuda.Device(self.device), self._cupy.cuda.Stream.from_external(_Stream(stream)):
            for launch in launches:
                kernels[launch.width](launch.grid, (BLOCK,), (launch.batch,))

    def clear(self, address: int, length: int, stream: int) -> None:
        with self._cupy.cuda.Device(self.device):
            self._cupy.cuda.runtime.memsetAsync(address, 0, length, stream)

    def device_of(self, address: int) -> int | None:
        try:
            found = self._cupy.cuda.runtime.pointerGetAttributes(address)
        except self._cupy.cuda.runtime.CUDARuntimeError:
            return None
        return int(found.device) if found.devicePointer else None

    def _compile(self, program: Program) -> dict[int, Any]:
        """Return the kernel of each width, loaded on this device."""
        with self._cupy.cuda.Device(self.device):
            module = self._cupy.RawModule(code=SOURCE.read_text(), options=program.options())
            try:
                return {width: module.get_function(f"code_{width}") for width in WIDTHS}
            except self._cupy.cuda.compiler.CompileException as error:
                raise CodecError(f"erasure.cu does not compile here: {error}") from error


def _decode_program(plan: DecodePlan) -> Program:
    return Program.of(plan.matrix)


@lru_cache(maxsize=_PROGRAMS)
def _with_sums(program: Program) -> Program:
    """The same one each time: what it makes of itself takes longer than to look it up."""
    return Program.of(program.matrix, sums=True)


def _is_contiguous(view: dict[str, Any]) -> bool:
    """Whether rows follow each other without gaps; axes of one element have any stride."""
    expected = np.dtype(view["typestr"]).itemsize
    for size, stride in zip(reversed(view["shape"]), reversed(view["strides"]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
