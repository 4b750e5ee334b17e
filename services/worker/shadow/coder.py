"""The erasure code where the pages are, by the same calls: ISA-L in host memory, the CUDA kernel on a GPU.

Pages never leave their device whole: on a GPU they are exchanged, encoded and decoded there, on a stream beside the
model's, and only parity crosses to host memory, through pinned buffers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kernels.codec import Codec, DecodePlan, checksum, make_codec
from kernels.cuda import CudaCodec
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
    def working(self) -> AbstractContextManager[object]:
        """While this coder, and the exchange that feeds it, work."""

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

    def working(self) -> AbstractContextManager[object]:
        return nullcontext()

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
    """Pages on a GPU: one launch for a batch of stripes, checksums made in the same pass."""

    codec: CudaCodec

    def __init__(self, codec: CudaCodec, device: torch.device):
        """A `device` without CUDA is for tests, whose codec runs the kernel's source on the CPU."""
        super().__init__(codec)
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _prepare(self, plans: Sequence[DecodePlan]) -> None:
        self.codec.prepare(plans, sums=True)

    def working(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)  # does nothing with none

    def encode(self, stripes: Sequence[Sequence[Memory]]) -> Encoded:
        length = len(stripes[0][0])
        parity = torch.empty(len(stripes), self.m, length, dtype=torch.uint8, device=self._device)
        sums = torch.empty(len(stripes), self.k + self.m, dtype=torch.int64, device=self._device)
        addresses = _addresses([[*data, *rows] for data, rows in zip(stripes, parity, strict=True)])
        self.codec.encode_at(addresses, length, stream=self._stream_address, sums=sums.data_ptr())
        host = torch.empty(parity.shape, dtype=torch.uint8, pin_memory=self._stream is not None)
        host.copy_(parity, non_blocking=True)
        told = self._read(sums[:, : self.k])
        return Encoded(host.numpy(), [tuple(map(int, row)) for row in told])

    def decode(self, plan: DecodePlan, sources: Sequence[Sequence[Memory]], targets: Sequence[Memory]) -> Sequence[int]:
        here = [[self._on_device(source) for source in stripe] for stripe in sources]
        sums = torch.empty(len(targets), self.k + 1, dtype=torch.int64, device=self._device)
        addresses = _addresses([[*stripe, target] for stripe, target in zip(here, targets, strict=True)])
        self.codec.reconstruct_at(plan, addresses, len(targets[0]), stream=self._stream_address, sums=sums.data_ptr())
        return [int(each) for each in self._read(sums)[:, self.k]]

    def _on_device(self, shard: Memory) -> Memory:
        return shard if isinstance(shard, torch.Tensor) else torch.from_numpy(shard).to(self._device)

    @property
    def _stream_address(self) -> int:
        return int(self._stream.cuda_stream) if self._stream is not None else 0

    def _read(self, sums: torch.Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
        """Sums in host memory, once all that was asked of the stream is done."""
        told = sums.contiguous().cpu()
        if self._stream is not None:
            self._stream.synchronize()
        return told.numpy().view(np.uint64)


def _addresses(stripes: Sequence[Sequence[Memory]]) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
    """uint64 [stripes, shards]: where tensors lie."""
    return np.array(
        [[shard.data_ptr() for shard in stripe if isinstance(shard, torch.Tensor)] for stripe in stripes],
        dtype=np.uint64,
    )


def make_coder(k: int, m: int, device: torch.device) -> Coder:
    """The coder for a device's pages. Raises CodecError where there is none."""
    codec = make_codec(k, m, str(device))
    return CudaCoder(codec, device) if isinstance(codec, CudaCodec) else HostCoder(codec)
