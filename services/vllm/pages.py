"""A rank's KV blocks as pages of bytes, wherever vLLM's layout puts them. Imports no vllm: it is told the layout."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch

from services.worker.memory import Ids, Memory, Room, Rows
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
        self._whole = len(self._parts) == 1 and self._parts[0].shape[0] == 1

    def rows(self, pages: Ids, room: Room, /) -> Rows:
        """Blocks, each brought together where it is in parts. `wrote` brings changed ones back."""
        if self._whole:
            return Rows(_memory(self._parts[0][0]), pages)
        content = torch.as_tensor(room(len(pages)))
        for parts, rows in self._split(content):
            for row, page in enumerate(pages.tolist()):
                rows[row].copy_(parts[:, page])
        return Rows.all(_memory(content))

    def targets(self, pages: Ids, room: Room, /) -> Rows:
        """The blocks, where each is one range of bytes, else `room`."""
        return self.rows(pages, room) if self._whole else Rows.all(room(len(pages)))

    def wrote(self, pages: Ids, content: Rows, /) -> None:
        """Scatter pages over the layers."""
        if self._whole:  # they are the blocks themselves
            return
        for parts, rows in self._split(torch.as_tensor(content.memory)):
            for row, page in zip(content.index.tolist(), pages.tolist(), strict=True):
                parts[:, page].copy_(rows[row])

    def _split(self, content: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pages [n, page_bytes] as what they have of each part: uint8 [count, blocks, length], [n, count, length]."""
        at = 0
        for part in self._parts:
            count, _, length = part.shape
            yield part, content[:, at : at + count * length].view(-1, count, length)
            at += count * length

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
