"""Attention over the pool, such that the bits of a token's KV don't depend on how its tokens were put into steps.

A prompt's positions are computed in tiles of TILE rows that begin at multiples of TILE. A tile is always computed
whole, against all keys up to its end: rows that are not in the step are zero and thrown away, keys that do not exist
yet are zero and masked. So every operation has the shape and the alignment that the tile has in any other chunking, and
its rows can't see each other. Generated positions are computed one query at a time against their own keys, which is how
decode computes them.

`plan_attention` works out, once a step, what the layers then use: `attend` is called by transformers' own code through
its attention interface.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from services.worker.engine.batch import Chunk
from services.worker.engine.kv_pool import KVPool
from shared.errors import ModelError

NAME = "ghostserve"
TILE = 64
_FUSED_KEYS = 1024


@dataclass(frozen=True, slots=True)
class Query:
    """One generated position: row `row` of the step attends to these gathered keys, [kv_heads, keys, head_dim]."""

    row: int
    keys: torch.Tensor  # views of the scratch, which every layer fills anew
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """A chunk's prompt positions: rows [row, row + rows) of the step, the first one `lead` rows into the first tile."""

    row: int
    rows: int
    lead: int
    count: int
    first_key: int  # gathered row of position 0
    first_end: int  # keys of the first tile; each later one has TILE more
    written: int  # keys that exist


@dataclass(slots=True)
class StepAttention:
    """What attention needs in one step. Made by plan_attention."""

    pool: KVPool
    slots: torch.Tensor  # int64 [layers, 2, rows]: where keys and values of the step's tokens go, in pool.slots
    blocks: torch.Tensor  # int64 [layers, 2 * gathered pages]: pool.blocks to gather, keys first
    gathered: torch.Tensor  # scratch, [2, gathered tokens, kv_heads, head_dim]
    tiles: tuple[Tiles, ...]
    queries: tuple[Query, ...]


def plan_attention(chunks: Sequence[Chunk], pool: KVPool, scratch: "Scratch") -> StepAttention:
    """Work out where the step's tokens are written and what they attend to. Shapes: see StepAttention."""
    page = pool.page_tokens
    slots, pages = [], []
    tiles: list[Tiles] = []
    generated: list[tuple[int, int, int]] = []  # row, first gathered row, gathered rows
    row = first_key = 0
    for chunk in chunks:
        table = chunk.pages[: -(-chunk.end // page)].astype(np.int64)
        positions = np.arange(chunk.start, chunk.end)
        slots.append(table[positions // page] * (pool.layers * 2 * page) + positions % page)
        split = min(max(chunk.prompt_tokens, chunk.start), chunk.end)  # positions from here on were generated
        gathered = len(table) * page
        if split > chunk.start:
            first_tile = chunk.start // TILE
            count = -(-split // TILE) - first_tile
            lead = chunk.start - first_tile * TILE
            ends = (first_tile + 1) * TILE
            tiles.append(Tiles(row, split - chunk.start, lead, count, first_key, ends, chunk.end))
            gathered = max(gathered, (first_tile + count) * TILE)
        generated += [(row + at - chunk.start, first_key, at + 1) for at in range(split, chunk.end)]
        whole = -(-gathered // page)
        pages.append(np.concatenate((table, np.zeros(whole - len(table), dtype=np.int64))))
        first_key += whole * page
        row += len(chunk.tokens)
    slot, block = np.concatenate(slots), np.concatenate(pages) * (pool.layers * 2)
    layer = np.arange(pool.layers)[:, None] * 2
    memory = scratch.take(pool, first_key)
    keys, values = memory[0].transpose(0, 1), memory[1].transpose(0, 1)
    return StepAttention(
        pool=pool,
        slots=torch.from_numpy(np.stack((slot + layer * page, slot + (layer + 1) * page), axis=1)).to(pool.device),
        blocks=torch.from_numpy(np.concatenate((block + layer, block + layer + 1), axis=1)).to(pool.device),
        gathered=memory,
        tiles=tuple(tiles),
        queries=tuple(
            Query(row, keys[:, first : first + count], values[:, first : first + count])
            for row, first, count in generated
        ),
    )


class Scratch:
    """Memory for gathered keys and values, kept from step to step."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, pool: KVPool, tokens: int) -> torch.Tensor:
        """[2, tokens, kv_heads, head_dim] of the pool's dtype, 64-byte aligned like all that torch allocates."""
        values = 2 * tokens * pool.kv_heads * pool.head_dim
        memory = self._memory
        if memory is None or memory.numel() < values or memory.dtype != pool.dtype:
            memory = self._memory = torch.empty(values * 5 // 4, dtype=pool.dtype, device=pool.device)
        return memory[:values].view(2, tokens, pool.kv_heads, pool.head_dim)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: StepAttention,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention: write the step's keys and values to the pool, then attend.

    query: [1, heads, rows, head_dim]; key, value: [1, kv_heads, rows, head_dim]. Returns [1, rows, heads, head_dim].
    """
    pool = step.pool
    layer: int = module.layer_idx  # type: ignore[assignment]
    window = sliding_window
    if softcap is not None or s_aux is not None:
        raise ModelError("attention with a soft cap or sinks is not supported")
    # write, then gather: [rows, kv_heads, head_dim] into slots; blocks of pages into [2, tokens, kv_heads, head_dim]
    slots, blocks = step.slots[layer], step.blocks[layer]
    pool.slots.index_copy_(0, slots[0], key[0].transpose(0, 1))
    pool.slots.index_copy_(0, slots[1], value[0].transpose(0, 1))
    torch.index_select(pool.blocks, 0, blocks, out=step.gathered.view(len(blocks), -1))
    keys, values = step.gathered[0].transpose(0, 1), step.gathered[1].transpose(0, 1)  # [kv_heads, tokens, head_dim]
    heads, rows, dim = query.shape[1:]
    out = torch.empty(rows, heads, dim, dtype=query.dtype, device=query.device)
    packed = query[0].view(pool.kv_heads, heads // pool.kv_heads, rows, dim)
    packed_out = out.view(rows, pool.kv_heads, heads // pool.kv_heads, dim)
    for tiles in step.tiles:
        _attend_tiles(packed, keys, values, packed_out, tiles, scaling, window)
    for one in step.queries:
        seen, worth = one.keys, one.values
        if window is not None:
            seen, worth = seen[:, -window:], worth[:, -window:]
        packed_out[one.row] = _attend_one(packed[:, :, one.row], seen, worth, scaling)
    return out[None], None


def _attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """One token's query [kv_heads, group, head_dim] against keys and values [kv_heads, keys, head_dim].

    Which way is taken depends on the number of keys alone. torch's fused attention is the faster one for few keys; for
    one query it makes slow work of many. (One head is a plain product: a batch of one takes a slow path in oneDNN.)
    """
    if keys.shape[1] < _FUSED_KEYS:
        return nn.functional.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scaling)[0]
    query, keys, values = query * scaling, keys.contiguous(), values.contiguous()
    single = len(keys) == 1
    scores = nn.functional.linear(query[0], keys[0])[None] if single else torch.bmm(query, keys.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), values)


def _attend_tiles(
    query: torch.Tensor,  # [kv_heads, group, rows of the step, head_dim]
    keys: torch.Tensor,  # [kv_heads, gathered tokens, head_dim]
    values: torch.Tensor,
    out: torch.Tensor,  # [rows of the step, kv_heads, group, head_dim]
    tiles: Tiles,
    scaling: float,
    window: int | None,
) -> None:
    kv_heads, group, _, dim = query.shape
    padded = query.new_zeros(kv_heads, group, tiles.count * TILE, dim)
    used = slice(tiles.lead, tiles.lead + tiles.rows)
    padded[:, :, used] = query[:, :, tiles.row : tiles.row + tiles.rows]
    # [tiles, kv_heads, group * TILE, dim]: the heads that share keys are rows of one product
    padded = padded.mul_(scaling).view(kv_heads, group, tiles.count, TILE, dim).permute(2, 0, 1, 3, 4)
    padded = padded.reshape(tiles.count, kv_heads, group * TILE, dim)
    result = torch.empty_like(padded)
    end = tiles.first_end + (tiles.count - 1) * TILE
    if tiles.written < end:
        keys[:, tiles.first_key + tiles.written : tiles.first_key + end] = 0
        values[:, tiles.first_key + tiles.written : tiles.first_key + end] = 0
    # each head's keys and values in one piece [end, head_dim], which the products want
    keys, values = (part[:, tiles.first_key : tiles.first_key + end].contiguous() for part in (keys, values))
    for index in range(tiles.count):
        last = tiles.first_end + index * TILE
        start = 0 if window is None else max(0, (last - TILE - window + 1) // TILE * TILE)
        for head in range(kv_heads):
            scores = torch.mm(padded[index, head], keys[head, start:last].t())  # [group * TILE, keys]
            _mask(scores.view(group, TILE, -1), window)
            torch.mm(torch.softmax(scores, -1), values[head, start:last], out=result[index, head])
    # back to [rows, kv_heads, group, dim]
    flat = result.view(tiles.count, kv_heads, group, TILE, dim).permute(0, 3, 1, 2, 4).reshape(-1, kv_heads, group, dim)
    out[tiles.row : tiles.row + tiles.rows] = flat[used]


def _mask(scores: torch.Tensor, window: int | None) -> None:
    """Hide from a tile's rows what they must not see. scores: [heads, TILE, keys], the last key is the tile's last."""
    diagonal = scores[:, :, -TILE:]
    diagonal += _causal(scores.dtype, scores.device)
    if window is not None:
        count = scores.shape[-1]
        row = torch.arange(TILE, device=scores.device)[:, None] + (count - TILE)
        scores.masked_fill_(torch.arange(count, device=scores.device)[None] <= row - window, -math.inf)


_causal_masks: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _causal(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[TILE, TILE]: 0 on and below the diagonal, -inf above."""
    key = (dtype, device)
    if key not in _causal_masks:
        _causal_masks[key] = torch.full((TILE, TILE), -math.inf, dtype=dtype, device=device).triu_(1)
    return _causal_masks[key]
