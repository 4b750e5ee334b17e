"""Pages as bytes, wherever they are: uint8 numpy arrays in host memory, uint8 torch tensors on a GPU."""

from typing import Any

import numpy as np
import torch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Memory = Bytes | torch.Tensor


def to_host(memory: Memory) -> Bytes:
    """The bytes in host memory: a view where they are there, else a copy, which waits for the device."""
    return memory.numpy(force=True) if isinstance(memory, torch.Tensor) else memory


def write(memory: Memory, content: Memory) -> None:
    """Replace the bytes by others, wherever those are."""
    if isinstance(memory, torch.Tensor):
        memory.copy_(torch.as_tensor(content))
    else:
        memory[:] = to_host(content)
