"""erasure.cu itself run on the CPU: a Runner for CudaCodec that launches the same plans as a GPU's."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.cuda import DeviceMemory
from kernels.launch import ARGUMENT_BYTES, SOURCE, Launch, Program

HARNESS = Path(__file__).parent / "erasure_cpu.cpp"
COMPILER = shutil.which("g++") or shutil.which("clang++")
GUARD = 0xEE


class CpuRunner:
    """Counts what the kernel moves. folded: coefficients are compiled in, as on a GPU; else one binary does a shape."""

    device = 0

    def __init__(self, folded: bool = False):
        self.folded = folded
        self.loaded = self.stored = self.misaligned = self.launches = 0

    def prepare(self, program: Program) -> None:
        _build(program.options() if self.folded else _options_of_shape(program))

    def run(self, program: Program, launches: Iterable[Launch], stream: int) -> None:
        library = _build(program.options() if self.folded else _options_of_shape(program))
        if not self.folded:
            library.set_matrix(program.coefficients)
        counters = np.zeros(3, dtype=np.uint64)
        for launch in launches:
            assert launch.batch.nbytes <= ARGUMENT_BYTES
            library.run_grid(launch.width, *launch.grid, launch.batch.ctypes.data, counters.ctypes.data)
            self.launches += 1
        self.loaded += int(counters[0])
        self.stored += int(counters[1])
        self.misaligned += int(counters[2])

    def clear(self, address: int, length: int, stream: int) -> None:
        ctypes.memset(address, 0, length)

    def device_of(self, address: int) -> int | None:
        return self.device


class Arena:
    """Shards in one buffer, at given offsets from 64-byte boundaries, guard bytes all around."""

    def __init__(self, length: int, offsets: Iterable[int]):
        offsets = list(offsets)
        room = length + 192 - length % 64
        self._whole = np.full(room * len(offsets) + 64, GUARD, dtype=np.uint8)
        base = -self._whole.ctypes.data % 64
        starts = [base + i * room + 64 + offset % 64 for i, offset in enumerate(offsets)]
        self.shards = [self._whole[start : start + length] for start in starts]
        self._guards = np.ones(self._whole.size, dtype=bool)
        for start in starts:
            self._guards[start : start + length] = False

    def poison(self, number: int) -> None:
        """Fill a shard that is to be written with bytes that it must not keep."""
        self.shards[number][:] = GUARD

    def check_guards(self) -> None:
        assert (self._whole[self._guards] == GUARD).all(), "bytes outside the shards were written"


def on_device(shard: npt.NDArray[np.uint8]) -> DeviceMemory:
    return DeviceMemory(shard.ctypes.data, shard.size)


def _options_of_shape(program: Program) -> tuple[str, ...]:
    return (*(o for o in program.options() if not o.startswith("-DCOEFFICIENTS")), "-DANY_MATRIX")


@cache
def _build(options: tuple[str, ...]) -> Any:
    assert COMPILER
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "erasure.so"
        command = [COMPILER, "-O2", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", *options]
        subprocess.run([*command, f"-I{SOURCE.parent}", str(HARNESS), "-o", str(path)], check=True, timeout=60)
        library = ctypes.CDLL(str(path))
    library.run_grid.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
    return library
