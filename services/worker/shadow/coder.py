"""The erasure code where the pages are, by the same calls: ISA-L in host memory, the CUDA kernel on a GPU.

Pages never leave their device whole: on a GPU they are exchanged, encoded and decoded there, on a stream beside the
model's, and only parity crosses to host memory, through pinned buffers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.codec import Codec, DecodePlan, checksum, make_codec
from kernels.cuda import CudaCodec
from services.worker.device import Device
from services.worker.memory import Bytes, Memory, Rows, Sums, to_host


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch of stripes. parity: uint8 [stripes, m, page_bytes] in host memory."""

    parity: Bytes
    data_checksums: list[tuple[int, ...]]
    """Of each stripe's k data shards, by their device's checksum: xxh3_64 in host memory, sum_checksum on a GPU."""


class Coder(ABC):
    """A code of k data and m parity shards over pages of one device. Used by one thread, the shadow."""

    def __init__(self, codec: Codec):
        self.codec = codec
        self.k = codec.k
        self.m = codec.m

    def prepare(self) -> None:
        """Do now what encoding, and decoding for one lost rank, need once."""
        ranks = range(self.k)
        self._prepare([self.codec.plan({*ranks, self.k} - {lost}, [lost]) for lost in ranks])

    @abstractmethod
    def _prepare(self, plans: Sequence[DecodePlan]) -> None: ...

    @abstractmethod
    def encode(self, data: Sequence[Rows]) -> Encoded:
        """The parity of a batch of stripes, at least one: k ranks' pages of them, on this coder's device."""

    @abstractmethod
    def decode(self, plan: DecodePlan, sources: Sequence[Rows], targets: Rows) -> Sums:
        """Write the plan's one target of each stripe of a batch, given its sources in the plan's order.

        Sources lie in host memory or on the device. Returns each target's checksum, as `encode` makes it of data
        shards.
        """


class HostCoder(Coder):
    """Pages in host memory."""

    def _prepare(self, plans: Sequence[DecodePlan]) -> None:
        self.codec.prepare(plans)

    def encode(self, data: Sequence[Rows]) -> Encoded:
        parity = np.empty((len(data[0]), self.m, data[0].length), dtype=np.uint8)
        self.codec.encode_at(_addresses([*data, *_shards(parity)]), data[0].length)
        sums = zip(*(map(checksum, map(to_host, pages)) for pages in data), strict=True)
        return Encoded(parity, list(sums))

    def decode(self, plan: DecodePlan, sources: Sequence[Rows], targets: Rows) -> Sums:
        self.codec.reconstruct_at(plan, _addresses([*sources, targets]), targets.length)
        return np.fromiter(map(checksum, map(to_host, targets)), dtype=np.uint64, count=len(targets))


class CudaCoder(Coder):
    """Pages on a GPU: one launch for a batch of stripes, checksums made in the same pass.

    All is asked of the current stream, and done when `encode` or `decode` returns.
    """

    codec: CudaCodec

    def __init__(self, codec: CudaCodec, device: Device):
        """A `device` without CUDA is for tests, whose codec runs the kernel's source on the CPU."""
        super().__init__(codec)
        self._device = device
        self._copies = device.stream()

    def _prepare(self, plans: Sequence[DecodePlan]) -> None:
        self.codec.prepare(plans, sums=True)

    def encode(self, data: Sequence[Rows]) -> Encoded:
        count, length = len(data[0]), data[0].length
        parity = self._empty(count, self.m, length)
        sums = self._empty(count, self.k + self.m, dtype=torch.int64)
        addresses = _addresses([*data, *_shards(parity)])
        self.codec.encode_at(addresses, length, stream=self._device.address, sums=sums.data_ptr())
        host, told = self._copy_out(parity), self._copy_out(sums)
        self._device.finish()
        return Encoded(host.numpy(), [tuple(row) for row in _unsigned(told)[:, : self.k].tolist()])

    def decode(self, plan: DecodePlan, sources: Sequence[Rows], targets: Rows) -> Sums:
        here = self._copy_in([each for each in sources if not isinstance(each.memory, torch.Tensor)])
        sums = self._empty(len(targets), self.k + 1, dtype=torch.int64)
        there = [each if isinstance(each.memory, torch.Tensor) else next(here) for each in sources]
        addresses = _addresses([*there, targets])
        self.codec.reconstruct_at(plan, addresses, targets.length, stream=self._device.address, sums=sums.data_ptr())
        told = self._copy_out(sums)
        self._device.finish()
        return _unsigned(told)[:, self.k]

    def _copy_in(self, shards: Sequence[Rows]) -> Iterator[Rows]:
        """Shards from host memory, those of one piece of memory in one copy.

        On a stream of its own, beside the exchange that brings the others.
        """
        with self._device.on(self._copies):
            there = [torch.empty(each.memory.shape, dtype=torch.uint8, device=self._device.where) for each in shards]
            for target, each in zip(there, shards, strict=True):
                target.copy_(torch.from_numpy(each.memory), non_blocking=True)
            copied = self._device.mark()
        self._device.wait(copied)
        return (Rows(memory, each.index) for memory, each in zip(there, shards, strict=True))

    def _copy_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same in host memory once the stream has got there."""
        return self._device.host(*tensor.shape, dtype=tensor.dtype).copy_(tensor, non_blocking=True)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device.where)


def _unsigned(sums: torch.Tensor) -> Sums:
    return sums.numpy().view(np.uint64)


def _shards(parity: Memory) -> list[Rows]:
    """Of parity [stripes, m, length], each of the m."""
    count, m, length = parity.shape
    return [Rows(parity.reshape(count * m, length), np.arange(count) * m + number) for number in range(m)]


def _addresses(shards: Sequence[Rows]) -> Sums:
    """uint64 [stripes, shards]: where they lie."""
    return np.stack([each.addresses for each in shards], axis=1)


def make_coder(k: int, m: int, device: Device) -> Coder:
    """The coder for a device's pages. Raises CodecError where there is none."""
    codec = make_codec(k, m, str(device.where))
    return CudaCoder(codec, device) if isinstance(codec, CudaCodec) else HostCoder(codec)
