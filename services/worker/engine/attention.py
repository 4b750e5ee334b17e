"""Attention over the pool, such that the bits of a token's KV don't depend on how its tokens were put into steps.

A prompt's positions are computed in tiles of TILE rows that begin at multiples of TILE. A tile is always computed
whole, against all keys up to its end: rows that are not in the step are zero and thrown away, keys that do not exist
yet are zero and masked. So every operation has the shape and the alignment that the tile has in any other chunking, and
its rows can't see each other. Generated positions are computed one query at a time against their own keys, which is how
decode computes them.

Keys are gathered and attended to in portions (`looks`), so a layer's memory does not grow with the context, and one
with a sliding window costs what its window does. What the portions give is added up as their shares of the whole.

`attend` is called by transformers' own code through its attention interface, once a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from services.worker.engine.batch import Chunk
from services.worker.engine.kv_pool import KVPool
from services.worker.engine.looks import TILE, QueryLook, Round, Tile, TileLook, most_gathered, plan_rounds
from shared.errors import ModelError

NAME = "ghostserve"
_FUSED_KEYS = 1024


class Scratch:
    """Memory for gathered keys and values, kept from step to step."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, pool: KVPool) -> torch.Tensor:
        """[2 * tokens, kv_heads, head_dim] for a round's, 64-byte aligned like all that torch allocates."""
        shape = (2 * most_gathered(pool.page_tokens), pool.kv_heads, pool.head_dim)
        memory = self._memory
        if memory is None or memory.shape != shape or memory.dtype != pool.dtype:
            memory = self._memory = torch.empty(shape, dtype=pool.dtype, device=pool.device)
        return memory


@dataclass(frozen=True, slots=True)
class Gathering:
    """A round as the layers use it. Keys and values are views of the scratch, which every layer fills anew."""

    blocks: torch.Tensor  # int64 [2 * pages]: pool.blocks of layer 0 to gather, keys first
    into: torch.Tensor  # [2 * pages, values of a block]
    blank: tuple[torch.Tensor, ...]  # what is to be zero
    tiles: tuple[tuple[TileLook, torch.Tensor, torch.Tensor], ...]  # keys and values [kv_heads, keys, head_dim]
    queries: tuple[tuple[QueryLook, torch.Tensor, torch.Tensor], ...]


@dataclass(slots=True)
class StepAttention:
    """What attention needs in one step."""

    chunks: Sequence[Chunk]
    pool: KVPool
    slots: torch.Tensor  # int64 [layers, 2, rows]: where keys and values of the step's tokens go, in pool.slots
    scratch: torch.Tensor  # [2 * tokens, kv_heads, head_dim]
    _rounds: dict[int | None, tuple[Gathering, ...]] = field(default_factory=dict)

    def rounds(self, window: int | None) -> tuple[Gathering, ...]:
        """Those of a layer with such a window; worked out once a step."""
        if (known := self._rounds.get(window)) is None:
            rounds = plan_rounds(self.chunks, window, self.pool.page_tokens)
            known = self._rounds[window] = tuple(map(self._gathering, rounds))
        return known

    def _gathering(self, of: Round) -> Gathering:
        pages = np.concatenate(of.pages).astype(np.int64) * (self.pool.layers * 2)
        memory = self.scratch[: 2 * of.keys].view(2, of.keys, *self.scratch.shape[1:])
        keys, values = memory.transpose(1, 2)

        def seen(look: TileLook | QueryLook) -> tuple[torch.Tensor, torch.Tensor]:
            last = look.first + look.count
            return keys[:, look.first : last], values[:, look.first : last]

        return Gathering(
            blocks=torch.from_numpy(np.concatenate((pages, pages + 1))).to(self.pool.device),
            into=memory.view(2 * len(pages), -1),
            blank=tuple(memory[:, first:last] for first, last in of.blank),
            tiles=tuple((look, *seen(look)) for look in of.tiles),
            queries=tuple((look, *seen(look)) for look in of.queries),
        )


def plan_attention(chunks: Sequence[Chunk], pool: KVPool, scratch: Scratch) -> StepAttention:
    """Work out where the step's tokens are written. Shapes: see StepAttention."""
    page, slots = pool.page_tokens, []
    for chunk in chunks:
        positions = np.arange(chunk.start, chunk.end)
        slots.append(chunk.pages[positions // page].astype(np.int64) * (pool.layers * 2 * page) + positions % page)
    slot, layer = np.concatenate(slots), np.arange(pool.layers)[:, None] * 2
    both = np.stack((slot + layer * page, slot + (layer + 1) * page), axis=1)
    return StepAttention(chunks, pool, torch.from_numpy(both).to(pool.device), scratch.take(pool))


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
    if softcap is not None or s_aux is not None:
        raise ModelError("attention with a soft cap or sinks is not supported")
    slots = step.slots[layer]  # of rows [kv_heads, head_dim]
    pool.slots.index_copy_(0, slots[0], key[0].transpose(0, 1))
    pool.slots.index_copy_(0, slots[1], value[0].transpose(0, 1))
    heads, rows, dim = query.shape[1:]
    out = torch.empty(rows, heads, dim, dtype=query.dtype, device=query.device)
    packed = query[0].view(pool.kv_heads, heads // pool.kv_heads, rows, dim)
    packed_out = out.view(rows, pool.kv_heads, heads // pool.kv_heads, dim)
    unfinished: dict[int, list[_Shares]] = {}  # by row
    for gathering in step.rounds(sliding_window):
        torch.index_select(pool.blocks, 0, gathering.blocks + 2 * layer, out=gathering.into)
        for part in gathering.blank:
            part.zero_()
        for look, keys, values in gathering.tiles:
            tile = look.tile
            shares = unfinished.pop(tile.row) if not look.begins else _shares_of_tile(packed, tile, scaling)
            for head, each in enumerate(shares):
                each.add(look, keys[head], values[head])
            if look.ends:
                packed_out[tile.row : tile.row + tile.rows] = _rows_of_tile(shares, tile, dim)
            else:
                unfinished[tile.row] = shares
        for one, keys, values in gathering.queries:
            if one.begins and one.ends and one.count < _FUSED_KEYS:
                packed_out[one.row] = _fused(packed[:, :, one.row], keys, values, scaling)
                continue
            (share,) = unfinished.pop(one.row) if not one.begins else [_Shares(packed[:, :, one.row] * scaling)]
            share.add(one, keys.contiguous(), values.contiguous())
            if one.ends:
                packed_out[one.row] = share.out
            else:
                unfinished[one.row] = [share]
    return out[None], None


def _fused(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """One token's query [kv_heads, group, head_dim] against all its keys and values [kv_heads, keys, head_dim].

    The faster way for few keys; for one query torch's fused attention makes slow work of many. Which way is taken
    depends on the number of keys alone.
    """
    return nn.functional.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scaling)[0]


class _Shares:
    """Attention of some scaled queries [..., rows, head_dim] that is told their keys in portions.

    `out` [..., rows, head_dim] is what was told so far comes to. Of several portions each has the share that the sum
    of its exponentials has in that of all, of which the logarithm is kept.
    """

    def __init__(self, query: torch.Tensor) -> None:
        self._query = query
        self._size: torch.Tensor | None = None
        self.out: torch.Tensor

    def add(self, look: TileLook | QueryLook, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The next portion, [..., keys, head_dim]."""
        scores = _products(self._query, keys.transpose(-1, -2))
        if isinstance(look, TileLook):
            _mask(scores.view(-1, TILE, scores.shape[-1]), look)
        weights = torch.softmax(scores, -1, dtype=torch.float32)
        out = _products(weights.to(values.dtype), values)
        if look.begins and look.ends:
            self.out = out
            return
        # the largest weight is 1 / the sum of exponentials of what lies below the largest score
        size = scores.amax(-1, keepdim=True).float() - weights.amax(-1, keepdim=True).log_()
        if self._size is None:
            self.out, self._size = out.float(), size
            return
        whole = torch.logaddexp(self._size, size)
        self.out = self.out.mul_((self._size - whole).exp_()).add_(out * (size - whole).exp_())
        self._size = whole


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b. A batch of one is a plain product, since it takes a slow path in oneDNN."""
    return torch.matmul(a[0], b[0])[None] if a.dim() == 3 and len(a) == 1 else torch.matmul(a, b)


def _shares_of_tile(query: torch.Tensor, tile: Tile, scaling: float) -> list[_Shares]:
    """Of each KV head the rows [group * TILE, head_dim] of a tile: heads that share keys are rows of one product.

    query: [kv_heads, group, rows of the step, head_dim].
    """
    kv_heads, group, _, dim = query.shape
    padded = query.new_zeros(kv_heads, group, TILE, dim)
    padded[:, :, tile.lead : tile.lead + tile.rows] = query[:, :, tile.row : tile.row + tile.rows]
    return [_Shares(each) for each in padded.mul_(scaling).view(kv_heads, group * TILE, dim)]


def _rows_of_tile(shares: list[_Shares], tile: Tile, dim: int) -> torch.Tensor:
    """What came of the rows of a tile that are in the step: [rows, kv_heads, group, head_dim]."""
    whole = torch.stack([each.out for each in shares]).view(len(shares), -1, TILE, dim)
    return whole[:, :, tile.lead : tile.lead + tile.rows].permute(2, 0, 1, 3)


def _mask(scores: torch.Tensor, look: TileLook) -> None:
    """Hide from a tile's rows what they must not see. scores: [heads, TILE, keys]."""
    if look.ends:
        diagonal = scores[:, :, -TILE:]
        diagonal += _causal(scores.dtype, scores.device)
    if (before := min(look.count, look.hidden + TILE)) > 0:
        outside = torch.ones(TILE, before, dtype=torch.bool, device=scores.device).tril_(look.hidden)
        # a number, so that a row of which all is hidden has a share, if none to speak of
        scores[:, :, :before].masked_fill_(outside, torch.finfo(scores.dtype).min)


_causal_masks: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _causal(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[TILE, TILE]: 0 on and below the diagonal, -inf above."""
    key = (dtype, device)
    if key not in _causal_masks:
        _causal_masks[key] = torch.full((TILE, TILE), -math.inf, dtype=dtype, device=device).triu_(1)
    return _causal_masks[key]
