"""A rank's KV blocks as pages of bytes, wherever vLLM's layout puts them. Imports no vllm: it is told the layout."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch

from services.worker.memory import Memory
from shared.errors import ConfigError


class Placement(Protocol):
    """A vllm KVCacheTensor: layer l's part of block b starts at offset + l * layer_stride + b * block_stride."""

    layers: Sequence[str]
    layer_stride: int
    block_stride: int
    offset: int


class BlockPages:
    """Block ids are page ids. A page is what all layers hold of a block, brought together: uint8 [page_bytes].

    buffer: the whole KV cache, uint8 [n], on the rank's device. KV cache groups may share all bytes of a block or none:
    raises ConfigError where they share some.
    """

    def __init__(self, buffer: torch.Tensor, placements: Sequence[Placement], blocks: int):
        if buffer.dtype != torch.uint8 or buffer.dim() != 1:
            raise ValueError(f"a KV cache as {buffer.dtype} {tuple(buffer.shape)}: uint8 [n] is needed")
        ranges = sorted({_ranges(each) for each in placements})
        for before, after in pairwise(ranges):
            if after.start < before.start + (before.parts - 1) * before.apart + blocks * before.length:
                raise ConfigError("this model's KV cache groups lay out a block in different ways: not protected yet")
        self._device = buffer.device
        # each: uint8 [count, blocks, length], a view of the buffer
        self._parts = [
            buffer.as_strided((each.parts, blocks, each.length), (each.apart, each.length, 1), each.start)
            for each in ranges
        ]
        self.page_bytes = page_bytes(placements)

    def page(self, page_id: int, /) -> Memory:
        """One block: uint8 [page_bytes], a copy where it is in parts. `wrote` brings a changed one back."""
        parts = [part[:, page_id].reshape(-1) for part in self._parts]
        return _memory(parts[0] if len(parts) == 1 else torch.cat(parts))

    def target(self, page_id: int, scratch: Memory, /) -> Memory:
        """The block, where it is one range of bytes, else `scratch`."""
        whole = len(self._parts) == 1 and self._parts[0].shape[0] == 1
        return self.page(page_id) if whole else scratch

    def wrote(self, page_id: int, content: Memory, /) -> None:
        """Scatter a page over the layers."""
        source = content if isinstance(content, torch.Tensor) else torch.from_numpy(content)
        at = 0
        for part in self._parts:
            rows = part[:, page_id]
            rows.copy_(source[at : at + rows.numel()].view(rows.shape))
            at += rows.numel()

    def empty(self, count: int, /) -> Memory:
        """New memory for pages where the cache is: uint8 [count, page_bytes]."""
        if self._device.type == "cpu":
            return np.empty((count, self.page_bytes), dtype=np.uint8)  # in huge pages, where it is large
        return torch.empty((count, self.page_bytes), dtype=torch.uint8, device=self._device)


def page_bytes(placements: Sequence[Placement]) -> int:
    """What all layers hold of one block on one rank."""
    return sum(each.parts * each.length for each in {_ranges(each) for each in placements})


class _Ranges(NamedTuple):
    """A block is `parts` ranges of bytes, `apart`; the next block's follow right after."""

    start: int
    parts: int
    apart: int
    length: int


def _ranges(placement: Placement) -> _Ranges:
    if placement.block_stride < placement.layer_stride:
        return _Ranges(placement.offset, len(placement.layers), placement.layer_stride, placement.block_stride)
    # All layers of a block lie together: one range, with what pads it.
    return _Ranges(0, 1, 0, placement.block_stride)


def _memory(tensor: torch.Tensor) -> Memory:
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def pages_of(cache: torch.Tensor, placements: Sequence[Placement], blocks: int) -> BlockPages:
    """The pages of the allocation that `cache`, any tensor of it, belongs to."""
    buffer = torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())
    return BlockPages(buffer, placements, blocks)
