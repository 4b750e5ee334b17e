"""What the CUDA kernel is compiled for and launched with: pure, so that a CPU runs the same plan in the tests.

A Program is a matrix and the shape of its kernel; a Launch codes up to program.stripes stripes of one length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.errors import CodecError
from kernels.gf256 import Matrix

SOURCE = Path(__file__).parent / "erasure.cu"
MAX_SOURCES = 32  # their vectors are in registers, all at once
MAX_TARGETS = 4
MAX_SUMMED = 16  # sources, if checksums are made: each shard takes 2 registers more
BLOCK = 256  # threads
WIDTHS = (16, 4, 1)  # bytes of a vector; there is a kernel code_<width> for each

_LOADS_IN_FLIGHT = 8  # of 16 bytes, by each thread; with 1,024 threads on a multiprocessor 128 KiB, 4 times the need
ARGUMENT_BYTES = 32_764  # most that a launch takes since CUDA 12.1, on devices of capability 7.0 and later


@dataclass(frozen=True)
class Program:
    """A matrix [targets, sources], and the kernel made for it. Equal matrices make equal programs."""

    sources: int
    targets: int
    coefficients: bytes  # of the matrix, row by row
    sums: bool = False  # whether checksums are made on the way; a table of addresses has a column for them then

    @classmethod
    def of(cls, matrix: Matrix, sums: bool = False) -> "Program":
        """Return the program of a matrix [targets, sources]. Raises CodecError if it is too large for the kernel."""
        targets, sources = matrix.shape
        if not (1 <= sources <= MAX_SOURCES and 1 <= targets <= MAX_TARGETS):
            raise CodecError(
                f"the kernel codes {MAX_SOURCES} shards into {MAX_TARGETS} at most, not {sources} into {targets}"
            )
        if sums and sources > MAX_SUMMED:
            raise CodecError(f"the kernel makes checksums of {MAX_SUMMED} sources at most, not {sources}")
        return cls(sources, targets, matrix.tobytes(), sums)

    @property
    def matrix(self) -> Matrix:
        """[targets, sources]."""
        return np.frombuffer(self.coefficients, dtype=np.uint8).reshape(self.targets, self.sources)

    @property
    def vectors(self) -> int:
        """Vectors of each source that a thread loads before it stores any."""
        return max(1, _LOADS_IN_FLIGHT // self.sources)

    @property
    def stripes(self) -> int:
        """Stripes that the argument of one launch has room for."""
        return (ARGUMENT_BYTES - 8) // (8 * self.columns)

    @property
    def columns(self) -> int:
        """Addresses that each stripe has."""
        return self.sources + self.targets + self.sums

    @cached_property
    def batch_type(self) -> np.dtype[Any]:
        """The kernel's argument: struct Batch in erasure.cu."""
        shards = ("shards", np.uint64, (self.stripes, self.columns))
        return np.dtype([shards, ("length", np.uint64)])

    def options(self) -> tuple[str, ...]:
        """Return the compiler's options, the same for NVRTC and for a C++ compiler."""
        return (
            "-std=c++17",
            f"-DSOURCES={self.sources}",
            f"-DTARGETS={self.targets}",
            f"-DCOEFFICIENTS={','.join(map(str, self.coefficients))}",
            f"-DVECTORS={self.vectors}",
            f"-DBLOCK={BLOCK}",
            f"-DSTRIPES={self.stripes}",
            f"-DSUMS={int(self.sums)}",
        )


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch: kernel code_<width> over grid (blocks of a stripe, stripes), with BLOCK threads in a block."""

    width: int
    grid: tuple[int, int]
    batch: npt.NDArray[np.void]  # one element of program.batch_type

    @property
    def kernel(self) -> str:
        return f"code_{self.width}"


def plan_launches(program: Program, addresses: npt.NDArray[np.uint64], length: int) -> Iterator[Launch]:
    """Yield the launches that code stripes [stripes, program.columns] of this many bytes each.

    A stripe is coded in the widest vectors for which its shards are equally aligned: 16 bytes for all pages of a pool.
    Where sums are made they must be aligned, as there words are counted from the beginning.
    """
    if not length:
        return
    shards = addresses[:, : program.sources + program.targets]
    unlike = np.bitwise_or.reduce(shards if program.sums else shards ^ shards[:, :1], axis=1)
    todo = np.ones(len(addresses), dtype=bool)
    for width in WIDTHS:
        alike = todo & (unlike % np.uint64(width) == 0)
        if not alike.any():
            continue
        todo &= ~alike
        stripes = addresses[alike]
        blocks = max(1, -(-(length // width) // (BLOCK * program.vectors)))
        for start in range(0, len(stripes), program.stripes):
            some = stripes[start : start + program.stripes]
            batch = np.zeros((), dtype=program.batch_type)
            batch["shards"][: len(some)] = some
            batch["length"] = length
            yield Launch(width, (blocks, len(some)), batch)
