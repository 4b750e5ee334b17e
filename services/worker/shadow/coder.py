"""The erasure code where the pages are, by the same calls: ISA-L in host memory, the CUDA kernel on a GPU.

Pages never leave their device whole: on a GPU they are exchanged, encoded and decoded there, on a stream beside the
model's, and only parity crosses to host memory, through pinned buffers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.codec import Codec, DecodePlan, checksum, make_codec
from kernels.cuda import CudaCodec
from services.worker.device import Device
from services.worker.memory import Bytes, Memory, to_host


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
    def encode(self, stripes: Sequence[Sequence[Memory]]) -> Encoded:
        """The parity of a batch of stripes, at least one, each of k pages on this coder's device."""

    @abstractmethod
    def decode(self, plan: DecodePlan, sources: Sequence[Sequence[Memory]], targets: Sequence[Memory]) -> Sequence[int]:
        """Write the plan's one target of each stripe of a batch, given its sources in the plan's order.

        Sources lie in host memory or on the device. Returns each target's checksum, as `encode` makes it of data
        shards.
        """


class HostCoder(Coder):
    """Pages in host memory."""

    def _prepare(self, plans: Sequence[DecodePlan]) -> None:
        self.codec.prepare(plans)

    def encode(self, stripes: Sequence[Sequence[Memory]]) -> Encoded:
        parity = np.empty((len(stripes), self.m, len(stripes[0][0])), dtype=np.uint8)
        sums = []
        for data, rows in zip(stripes, parity, strict=True):
            shards = [to_host(shard) for shard in data]
            self.codec.encode(shards, list(rows))
            sums.append(tuple(checksum(shard) for shard in shards))
        return Encoded(parity, sums)

    def decode(self, plan: DecodePlan, sources: Sequence[Sequence[Memory]], targets: Sequence[Memory]) -> Sequence[int]:
        sums = []
        for stripe, target in zip(sources, targets, strict=True):
            page = to_host(target)
            self.codec.reconstruct(plan, [to_host(source) for source in stripe], [page])
            sums.append(checksum(page))
        return sums


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

    def encode(self, stripes: Sequence[Sequence[Memory]]) -> Encoded:
        length = len(stripes[0][0])
        parity = self._empty(len(stripes), self.m, length)
        sums = self._empty(len(stripes), self.k + self.m, dtype=torch.int64)
        addresses = _addresses([[*data, *rows] for data, rows in zip(stripes, parity, strict=True)])
        self.codec.encode_at(addresses, length, stream=self._device.address, sums=sums.data_ptr())
        host, told = self._copy_out(parity), self._copy_out(sums)
        self._device.finish()
        return Encoded(host.numpy(), [tuple(map(int, row)) for row in _unsigned(told)[:, : self.k]])

    def decode(self, plan: DecodePlan, sources: Sequence[Sequence[Memory]], targets: Sequence[Memory]) -> Sequence[int]:
        from_host = [each for stripe in sources for each in stripe if not isinstance(each, torch.Tensor)]
        copied = self._copy_in(from_host)
        here = iter(copied)
        sums = self._empty(len(targets), self.k + 1, dtype=torch.int64)
        addresses = _addresses(
            [
                [*(each if isinstance(each, torch.Tensor) else next(here) for each in stripe), target]
                for stripe, target in zip(sources, targets, strict=True)
            ]
        )
        self.codec.reconstruct_at(plan, addresses, len(targets[0]), stream=self._device.address, sums=sums.data_ptr())
        told = self._copy_out(sums)
        self._device.finish()
        return [int(each) for each in _unsigned(told)[:, self.k]]

    def _copy_in(self, shards: Sequence[Bytes]) -> torch.Tensor:
        """Shards from host memory, [shards, length] on the device; those that lie side by side in one copy.

        On a stream of its own, beside the exchange that brings the others.
        """
        with self._device.on(self._copies):
            there = self._empty(len(shards), len(shards[0]) if shards else 0)
            start = 0
            for at in range(1, len(shards) + 1):
                if at == len(shards) or shards[at].ctypes.data != shards[at - 1].ctypes.data + len(shards[0]):
                    run = _side_by_side(shards[start], at - start)
                    there[start:at].copy_(torch.from_numpy(run), non_blocking=True)
                    start = at
            copied = self._device.mark()
        self._device.wait(copied)
        return there

    def _copy_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same in host memory once the stream has got there."""
        return self._device.host(*tensor.shape, dtype=tensor.dtype).copy_(tensor, non_blocking=True)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device.where)


def _side_by_side(first: Bytes, count: int) -> Bytes:
    """Shards in host memory that follow each other without gaps: uint8 [count, length]."""
    return np.lib.stride_tricks.as_strided(first, (count, len(first)), (len(first), 1))


def _unsigned(sums: torch.Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
    return sums.numpy().view(np.uint64)


def _addresses(stripes: Sequence[Sequence[Memory]]) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
    """uint64 [stripes, shards]: where tensors lie."""
    return np.array(
        [[shard.data_ptr() for shard in stripe if isinstance(shard, torch.Tensor)] for stripe in stripes],
        dtype=np.uint64,
    )


def make_coder(k: int, m: int, device: Device) -> Coder:
    """The coder for a device's pages. Raises CodecError where there is none."""
    codec = make_codec(k, m, str(device.where))
    return CudaCoder(codec, device) if isinstance(codec, CudaCodec) else HostCoder(codec)
