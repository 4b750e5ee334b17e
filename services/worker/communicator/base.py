"""The contract of a communicator: what the ranks of one epoch say to each other, and how it ends.

Every wait is bounded, and every wait ends at once when the communicator is aborted. A communicator is used by one
thread at a time; `abort` may come from any thread. After an error it is of no use but to be closed.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from services.worker.memory import Memory

Kind = Literal["shm", "gloo", "nccl"]
DEFAULT_SLOT_BYTES = 2 << 20


class Communicator(ABC):
    """The ranks of one epoch of a group. All ranks call the same operations, of the same sizes, in the same order.

    Every operation raises CommunicatorAborted when the epoch ended or a peer is gone, and DeadlineExceeded when a peer
    did not take part within the timeout.
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}")
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.entered = 0
        """Times that this rank has begun to wait for the others: one more than those that it waits for."""
        self.waited_s = 0.0

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by the sum of all ranks' tensors.

        The same bits on all ranks; and, but for NCCL, added in rank order, in float32 at least, so that each element's
        bits are the same whatever the size. NCCL adds as it likes: equal bits for an equal size of tensor and group.
        """

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Fill out [size, *tensor.shape] with every rank's tensor. Both contiguous, of one dtype."""

    @abstractmethod
    def all_to_all(self, send: Sequence[Sequence[Memory]], receive: Sequence[Sequence[Memory]]) -> None:
        """Send the bytes of the buffers send[r] to each rank r, and fill the buffers receive[r] with what r sends here.

        Buffers are contiguous uint8 [n], in host memory, or for NCCL on its device. The totals must agree between the
        two ranks; how they are cut need not.
        """

    def check(self) -> None:  # noqa: B027  most operations have come to their end when they return
        """Raise as an operation would if one that was asked for did not come to its end. To be called before anything
        leaves this rank that was computed from what others sent: over NCCL, operations only queue."""

    def still(self) -> AbstractContextManager[object]:
        """While this is entered no thread of the communicator's own touches the device: a CUDA graph is captured."""
        return nullcontext()

    @abstractmethod
    def abort(self) -> None:
        """End the epoch, from any thread: every wait here, and where possible at the peers, raises at once."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory and sockets. No other thread may be inside an operation."""

    def _check_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        if out.shape != (self.size, *tensor.shape) or out.dtype != tensor.dtype:
            raise ValueError(f"all_gather of {tuple(tensor.shape)} into {tuple(out.shape)}")

    def _check_exchange(self, send: Sequence[Sequence[Memory]], receive: Sequence[Sequence[Memory]]) -> None:
        if len(send) != self.size or len(receive) != self.size:
            raise ValueError(f"all_to_all takes one list for each of {self.size} ranks")


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [offset, offset + length) of one buffer."""

    buffer: int
    offset: int
    length: int


def cut(sizes: Sequence[int], start: int, length: int) -> list[Piece]:
    """The pieces of buffers of these sizes, laid end to end, that make up bytes [start, start + length)."""
    pieces = []
    at = 0
    for buffer, size in enumerate(sizes):
        low, high = max(start, at), min(start + length, at + size)
        if low < high:
            pieces.append(Piece(buffer, low - at, high - low))
        at += size
    return pieces
