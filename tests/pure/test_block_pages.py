"""vLLM's KV layouts as pages of bytes, over a buffer whose every byte says where it is."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from services.vllm.pages import BlockPages
from services.worker.memory import Bytes, to_host
from shared.errors import ConfigError

LAYERS, BLOCKS, PART = 3, 5, 8


@dataclass
class Tensor:
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0


LAYER_OUTERMOST = Tensor(["a", "b", "c"], PART * BLOCKS, PART)
BLOCK_OUTERMOST = Tensor(["a", "b", "c"], PART, LAYERS * PART)


def buffer() -> torch.Tensor:
    return torch.arange(LAYERS * BLOCKS * PART, dtype=torch.uint8)


def part(tensor: Tensor, layer: int, block: int) -> slice:
    start = tensor.offset + layer * tensor.layer_stride + block * tensor.block_stride
    return slice(start, start + PART)


def one(pages: BlockPages, number: int) -> Bytes:
    """A copy of a page."""
    (page,) = pages.rows(np.array([number]), pages.empty)
    return to_host(page).copy()


@pytest.mark.parametrize("tensor", [LAYER_OUTERMOST, BLOCK_OUTERMOST])
def test_a_page_is_what_all_layers_hold_of_a_block(tensor: Tensor) -> None:
    held = buffer()
    pages = BlockPages(held, [tensor], BLOCKS)
    assert pages.page_bytes == LAYERS * PART
    expected = np.concatenate([held.numpy()[part(tensor, layer, 2)] for layer in range(LAYERS)])
    assert (one(pages, 2) == expected).all()


@pytest.mark.parametrize("tensor", [LAYER_OUTERMOST, BLOCK_OUTERMOST])
def test_a_page_that_is_written_changes_its_block_and_no_other(tensor: Tensor) -> None:
    held, before = buffer(), buffer()
    pages = BlockPages(held, [tensor], BLOCKS)
    rows = pages.rows(np.array([4, 1]), pages.empty)
    for row in map(to_host, rows):
        row += np.uint8(100)
    pages.wrote(np.array([4, 1]), rows)
    assert [one(pages, 4).tolist(), one(pages, 1).tolist()] == [to_host(row).tolist() for row in rows]
    for layer in range(LAYERS):
        before[part(tensor, layer, 4)] += 100
        before[part(tensor, layer, 1)] += 100
    assert torch.equal(held, before)


@pytest.mark.parametrize("tensor", [LAYER_OUTERMOST, BLOCK_OUTERMOST])
def test_a_page_is_written_anew_where_it_is_or_beside_it(tensor: Tensor) -> None:
    held = buffer()
    pages = BlockPages(held, [tensor], BLOCKS)
    targets = pages.targets(np.array([2]), pages.empty)
    (target,) = map(to_host, targets)
    target[:] = 7
    pages.wrote(np.array([2]), targets)
    assert (one(pages, 2) == 7).all()
    assert np.shares_memory(target, held.numpy()) == (tensor is BLOCK_OUTERMOST)


def test_groups_that_share_all_bytes_of_a_block_are_one_page() -> None:
    pages = BlockPages(buffer(), [LAYER_OUTERMOST, Tensor(["x", "y", "z"], PART * BLOCKS, PART)], BLOCKS)
    assert pages.page_bytes == LAYERS * PART


def test_layers_of_two_sizes_are_one_page() -> None:
    small = Tensor(["i"], BLOCKS * 4, 4, offset=LAYERS * BLOCKS * PART)
    held = torch.arange(LAYERS * BLOCKS * PART + BLOCKS * 4, dtype=torch.uint8)
    pages = BlockPages(held, [LAYER_OUTERMOST, small], BLOCKS)
    assert pages.page_bytes == LAYERS * PART + 4
    assert one(pages, 1)[-4:].tolist() == list(range(small.offset + 4, small.offset + 8))


def test_groups_that_share_some_bytes_of_a_block_are_refused() -> None:
    with pytest.raises(ConfigError, match="not protected yet"):
        BlockPages(buffer(), [LAYER_OUTERMOST, Tensor(["x"], BLOCKS * 4, 4, offset=4)], BLOCKS)


def test_new_memory_is_where_the_cache_is() -> None:
    memory = BlockPages(buffer(), [LAYER_OUTERMOST], BLOCKS).empty(2)
    assert isinstance(memory, np.ndarray)
    assert memory.shape == (2, LAYERS * PART)
