"""The erasure code as its users see it: k data shards, m parity shards, any k of which give back the rest.

Shards are separate buffers of equal length, any length and alignment, read and written in place: no packing, no copy.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

from kernels import isal
from kernels.errors import CodecError
from kernels.generator import check_size, decode_matrix, parity_matrix
from kernels.gf256 import Matrix

Buffer = npt.NDArray[np.uint8]
"""One shard: uint8, one dimension, contiguous."""

_PLANS = 512  # decode plans kept for a codec


@dataclass(frozen=True, eq=False, slots=True)
class DecodePlan:
    """How to compute some shards from k others; made once for a pattern of erasures by Codec.plan."""

    k: int
    m: int
    sources: tuple[int, ...]  # k shard numbers: data 0..k-1, parity k..k+m-1
    targets: tuple[int, ...]
    matrix: Matrix  # [len(targets), k], read-only


class Codec(ABC):
    """A code of k data and m parity shards on one kind of device. Safe to use from several threads."""

    def __init__(self, k: int, m: int):
        check_size(k, m)
        self.k = k
        self.m = m
        self._plan = lru_cache(maxsize=_PLANS)(self._make_plan)

    def plan(self, present: Collection[int], targets: Sequence[int]) -> DecodePlan:
        """Return how to compute the targets from k of the shards present, data before parity; cached.

        Shard numbers: data 0..k-1, parity k..k+m-1. Raises CodecError if fewer than k are present, or a number is none.
        """
        return self._plan(tuple(sorted(set(present))), tuple(targets))

    def _make_plan(self, present: tuple[int, ...], targets: tuple[int, ...]) -> DecodePlan:
        if len(present) < self.k:
            raise CodecError(f"{len(present)} shards are present; {self.k} are needed")
        if not targets or len(set(targets)) != len(targets):
            raise CodecError(f"targets {list(targets)}: at least one, and each once")
        if set(targets) & set(present):
            raise CodecError(f"targets {list(targets)} are partly present: {list(present)}")
        sources = present[: self.k]
        matrix = decode_matrix(self.k, self.m, sources, targets)
        matrix.setflags(write=False)
        return DecodePlan(self.k, self.m, sources, targets, matrix)

    @abstractmethod
    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """Write the m parity shards of the k data shards. Raises CodecError."""

    @abstractmethod
    def reconstruct(self, plan: DecodePlan, sources: Sequence[Buffer], targets: Sequence[Buffer]) -> None:
        """Write the shards plan.targets, given plan.sources in that order. Raises CodecError."""


class IsalCodec(Codec):
    """The code on CPUs, by ISA-L."""

    def __init__(self, k: int, m: int):
        super().__init__(k, m)
        self._encode = isal.Tables(parity_matrix(k, m))
        self._decode = lru_cache(maxsize=_PLANS)(_decode_tables)

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        _apply(self._encode, data, parity)

    def reconstruct(self, plan: DecodePlan, sources: Sequence[Buffer], targets: Sequence[Buffer]) -> None:
        if (plan.k, plan.m) != (self.k, self.m):
            raise CodecError(f"a plan for k={plan.k}, m={plan.m} used with k={self.k}, m={self.m}")
        _apply(self._decode(plan), sources, targets)


def make_codec(k: int, m: int, device: str = "cpu") -> Codec:
    """Return the codec for a device. Raises CodecError if there is no such code, backend or library."""
    if device == "cpu":
        return IsalCodec(k, m)
    raise CodecError(f"no codec for device {device!r}; there is one for 'cpu'")


def checksum(buffer: Buffer | memoryview | bytes) -> int:
    """Return xxh3_64 of the bytes."""
    return xxhash.xxh3_64_intdigest(buffer)  # type: ignore[arg-type]  # arrays are buffers, typed so from 3.12 on


def _decode_tables(plan: DecodePlan) -> isal.Tables:
    return isal.Tables(plan.matrix)


def _apply(tables: isal.Tables, sources: Sequence[Buffer], targets: Sequence[Buffer]) -> None:
    if len(sources) != tables.columns or len(targets) != tables.rows:
        raise CodecError(
            f"{len(sources)} sources and {len(targets)} targets given; {tables.columns} and {tables.rows} are needed"
        )
    length = sources[0].size
    reads = [_address(buffer, length, writes=False) for buffer in sources]
    writes = [_address(buffer, length, writes=True) for buffer in targets]
    _check_apart(reads, writes, length)
    tables.apply(length, reads, writes)


def _address(buffer: Buffer, length: int, *, writes: bool) -> int:
    """Return where a shard lies. Raises CodecError if it is not one of this length, or can't be written but must be."""
    view = buffer.__array_interface__  # one look-up for all: this is the cost of a call with small shards
    if view["typestr"] != "|u1" or len(view["shape"]) != 1 or view["strides"] is not None:
        raise CodecError(f"a shard is uint8 [n], contiguous; this one is {buffer.dtype} {list(buffer.shape)}")
    if view["shape"][0] != length:
        raise CodecError(f"shards of unequal length: {view['shape'][0]} and {length}")
    address, is_read_only = view["data"]
    if writes and is_read_only:
        raise CodecError("a target is read-only")
    return int(address)


def _check_apart(reads: Sequence[int], writes: Sequence[int], length: int) -> None:
    """Raise CodecError if a target overlaps another target or a source."""
    for i, start in enumerate(writes):
        for other in (*reads, *writes[:i]):
            if -length < start - other < length:
                raise CodecError("a target overlaps another shard")
