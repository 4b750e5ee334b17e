"""The erasure code as its users see it: k data shards, m parity shards, any k of which give back the rest.

Shards are separate buffers of equal length, any length and alignment, read and written in place: no packing, no copy.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from kernels import isal
from kernels.errors import CodecError
from kernels.generator import check_size, decode_matrix, parity_matrix
from kernels.gf256 import Matrix

Buffer = npt.NDArray[np.uint8]
"""One shard in host memory: contiguous bytes."""


class DeviceArray(Protocol):
    """One shard in a GPU's memory: contiguous, such as a torch tensor of any shape; or an array that speaks DLPack."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


Shard = Buffer | DeviceArray

Addresses = npt.NDArray[np.uint64]
"""[stripes, shards]: where each shard lies."""

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
    def encode(self, data: Sequence[Shard], parity: Sequence[Shard], *, stream: int = 0) -> None:
        """Write the m parity shards of the k data shards. Raises CodecError.

        stream: on a GPU, the stream to do it on (torch: torch.cuda.current_stream().cuda_stream); returns at once.
        """

    @abstractmethod
    def reconstruct(
        self, plan: DecodePlan, sources: Sequence[Shard], targets: Sequence[Shard], *, stream: int = 0
    ) -> None:
        """Write the shards plan.targets, given plan.sources in that order. Raises CodecError."""

    @abstractmethod
    def encode_at(self, addresses: Addresses, length: int, *, stream: int = 0) -> None:
        """Encode a batch of stripes [stripes, k + m], data before parity, given where their shards of length bytes lie.

        The caller guarantees that the memory is there, on this codec's device. Raises CodecError if a target overlaps.
        """

    @abstractmethod
    def reconstruct_at(self, plan: DecodePlan, addresses: Addresses, length: int, *, stream: int = 0) -> None:
        """Reconstruct in a batch of stripes [stripes, k + len(plan.targets)], sources before targets; see encode_at."""

    @abstractmethod
    def prepare(self, plans: Iterable[DecodePlan] = ()) -> None:
        """Do now what encoding and these plans need once, so that a recovery need not: a GPU's kernels are compiled."""

    def _check_plan(self, plan: DecodePlan) -> None:
        if (plan.k, plan.m) != (self.k, self.m):
            raise CodecError(f"a plan for k={plan.k}, m={plan.m} used with k={self.k}, m={self.m}")


class IsalCodec(Codec):
    """The code on CPUs, by ISA-L. threads: for stripes of 16 MiB and more; None leaves half of the cores to others."""

    def __init__(self, k: int, m: int, threads: int | None = None):
        super().__init__(k, m)
        self._threads = threads or max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        self._encode = isal.Tables(parity_matrix(k, m), self._threads)
        self._decode = lru_cache(maxsize=_PLANS)(self._decode_tables)

    def encode(self, data: Sequence[Shard], parity: Sequence[Shard], *, stream: int = 0) -> None:
        self._encode.apply(data, parity)

    def reconstruct(
        self, plan: DecodePlan, sources: Sequence[Shard], targets: Sequence[Shard], *, stream: int = 0
    ) -> None:
        self._check_plan(plan)
        self._decode(plan).apply(sources, targets)

    def encode_at(self, addresses: Addresses, length: int, *, stream: int = 0) -> None:
        check_addresses(addresses, self.k, self.m, length)
        self._encode.apply_at(addresses, length)

    def reconstruct_at(self, plan: DecodePlan, addresses: Addresses, length: int, *, stream: int = 0) -> None:
        self._check_plan(plan)
        check_addresses(addresses, self.k, len(plan.targets), length)
        self._decode(plan).apply_at(addresses, length)

    def prepare(self, plans: Iterable[DecodePlan] = ()) -> None:
        for plan in plans:
            self._check_plan(plan)
            self._decode(plan)

    def _decode_tables(self, plan: DecodePlan) -> isal.Tables:
        return isal.Tables(plan.matrix, self._threads)


def make_codec(k: int, m: int, device: str = "cpu") -> Codec:
    """Return the codec for a device: cpu, cuda, cuda:1. Raises CodecError if there is no such code or device."""
    if device == "cpu":
        return IsalCodec(k, m)
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index.isdigit() or device == "cuda"):
        from kernels import cuda  # needs CuPy, which CPUs do without

        return cuda.CudaCodec(k, m, cuda.CupyRunner(int(index or 0)))
    raise CodecError(f"no codec for device {device!r}; there is one for 'cpu', 'cuda' and 'cuda:<index>'")


def checksum(buffer: Buffer | memoryview | bytes) -> int:
    """Return xxh3_64 of the bytes."""
    return xxhash.xxh3_64_intdigest(buffer)  # type: ignore[arg-type]  # arrays are buffers, typed so from 3.12 on


def check_addresses(addresses: Addresses, sources: int, targets: int, length: int) -> None:
    """Raise CodecError if these are not [stripes, sources + targets], or a target overlaps a shard of any stripe."""
    if addresses.ndim != 2 or addresses.shape[1] != sources + targets or addresses.dtype != np.uint64 or length < 0:
        raise CodecError(
            f"addresses are uint64 [stripes, {sources + targets}], not {addresses.dtype} {list(addresses.shape)}"
        )
    if not addresses.size or not length:
        return
    written = np.sort(addresses[:, sources:], axis=None)
    read = addresses[:, :sources].ravel()
    size = np.uint64(length)
    after = np.searchsorted(written, read)  # the first target at or after each source
    runs_into = (after < written.size) & (written[np.minimum(after, written.size - 1)] - read < size)
    begins_in = (after > 0) & (read - written[np.maximum(after, 1) - 1] < size)
    if (np.diff(written) < size).any() or runs_into.any() or begins_in.any():
        raise CodecError("a target overlaps another shard")
