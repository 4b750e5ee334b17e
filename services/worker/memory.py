"""Pages as bytes, wherever they are: uint8 numpy arrays in host memory, uint8 torch tensors on a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Memory = Bytes | torch.Tensor
Ids = np.ndarray[Any, np.dtype[np.int64]]
Sums = np.ndarray[Any, np.dtype[np.uint64]]
Room = Callable[[int], Memory]
"""Gives memory for so many pages: uint8 [pages, page_bytes]."""

GATHERED_BYTES = 16 << 10
"""Shorter rows in host memory are brought together rather than passed on one by one: a copy of one takes less."""


def to_host(memory: Memory) -> Bytes:
    """The bytes in host memory: a view where they are there, else a copy, which waits for the device."""
    return memory.numpy(force=True) if isinstance(memory, torch.Tensor) else memory


def write(memory: Memory, content: Memory) -> None:
    """Replace the bytes by others, wherever those are."""
    if isinstance(memory, torch.Tensor):
        memory.copy_(torch.as_tensor(content))
    else:
        memory[:] = to_host(content)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a contiguous matrix of bytes, in some order: many pages as one thing. memory: uint8 [any, length]."""

    memory: Memory
    index: Ids

    @classmethod
    def all(cls, memory: Memory) -> "Rows":
        """All of them as they lie."""
        return cls(memory, np.arange(len(memory)))

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Memory]:
        return (self.memory[at] for at in self.index.tolist())

    @property
    def length(self) -> int:
        """Bytes of a row."""
        return int(self.memory.shape[1])

    @property
    def addresses(self) -> Sums:
        """Where each lies: uint64 [rows]."""
        start = self.memory.data_ptr() if isinstance(self.memory, torch.Tensor) else self.memory.ctypes.data
        return (start + self.index * self.length).view(np.uint64)

    @property
    def consecutive(self) -> bool:
        """Whether they follow each other without gaps."""
        return not len(self.index) or bool((np.diff(self.index) == 1).all())

    def take(self, at: Ids) -> "Rows":
        """Those at these places."""
        return Rows(self.memory, self.index[at])

    def flat(self) -> list[Memory]:
        """Their bytes end to end, each buffer uint8 [n]: views, or one copy where rows are short or on a GPU."""
        if not len(self.index):
            return []
        if self.consecutive:
            return [self.memory[int(self.index[0]) : int(self.index[-1]) + 1].reshape(-1)]
        if isinstance(self.memory, torch.Tensor):
            return [torch.index_select(self.memory, 0, on_device(self.index, self.memory.device)).view(-1)]
        if self.length >= GATHERED_BYTES:
            return list(self)
        return [np.take(self.memory, self.index, axis=0).reshape(-1)]


def on_device(index: Ids, where: torch.device) -> torch.Tensor:
    """An index where torch wants it for memory there. The host does not wait."""
    here = torch.from_numpy(index)
    return here if where.type == "cpu" else here.pin_memory().to(where, non_blocking=True)
