"""One rank's slice of a transformers model, with attention over our pool.

The code that runs is transformers' own for the architecture. What is changed in it: linears are one rank's slices
(tensor_parallel), attention is ours (attention), and plain RMSNorms are torch's fused one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from services.worker.communicator.base import Communicator
from services.worker.engine import architecture, attention
from services.worker.engine.batch import Chunk
from services.worker.engine.kv_pool import KVPool, page_bytes
from services.worker.engine.modules import fill_buffers, replace_activations, replace_rms_norms
from services.worker.engine.rotary import replace_rotary
from services.worker.engine.spec import read_config, read_spec
from services.worker.engine.tensor_parallel import Packed, PackedLinear, Ranks, Sharded, shard_linears
from services.worker.engine.weights import Weights
from shared.errors import ModelError

ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.attend)


class RankModel:
    """One rank's slice of a model. Made without a rank, as a spare does ahead of time; `load` gives it one."""

    def __init__(self, model_dir: Path, *, size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.spec = read_spec(model_dir, size, dtype)
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self.rank: int | None = None
        self._dir = model_dir
        self._ranks = Ranks()
        self._scratch = attention.Scratch()
        config = read_config(model_dir)
        whole = architecture.skeleton(model_dir, config, dtype)
        self._base: nn.Module = whole.base_model
        self._prefix = whole.base_model_prefix + "."
        self._names = {parameter: name for name, parameter in whole.named_parameters()}
        self._embeddings, self._head_name = architecture.embeddings(whole), architecture.head(whole)
        self._vocab_share = -(-self.spec.vocab_size // size)  # the last rank's is filled up with zeros
        self._head = PackedLinear(self.spec.hidden, self._vocab_share, "colwise", self._ranks, dtype, self.device)
        plan = config.base_model_tp_plan
        self._sharded = shard_linears(self._base, plan, size, self._ranks, dtype, self.device)
        fill_buffers(whole, self.device)
        replace_rms_norms(self._base, self.device)
        replace_activations(self._base)
        replace_rotary(self._base)
        self._shared_loaded = False
        self._ready: dict[int, list[Packed]] = {}

    def load(self, rank: int) -> None:
        """Take `rank`'s slice, which is read (and no other) unless `prepare` has. May be called again for another."""
        self.load_shared()
        slices = self._ready.get(rank) or self._read(rank, self.device)
        for linear, packed in zip(self._all_linears(), slices, strict=True):
            linear.take(packed)
        self.rank = rank

    def prepare(self, rank: int) -> None:
        """Hold `rank`'s slice ready in host memory, for what it takes, so that `load` need only take it."""
        self.load_shared()
        if rank not in self._ready:
            self._ready[rank] = self._read(rank, torch.device("cpu"))

    def forget_prepared(self) -> None:
        """Give back the memory of slices that were prepared; the one that is loaded stays."""
        self._ready.clear()

    def make_pool(self, page_tokens: int, *, memory_bytes: int) -> KVPool:
        """A pool for one rank's KV, of as many pages as there is memory for, and one at least."""
        spec, kv_heads = self.spec, self.spec.kv_heads // self.size
        each = page_bytes(spec.layers, page_tokens, kv_heads, spec.head_dim, self.dtype)
        return KVPool(
            pages=max(1, memory_bytes // each),
            layers=spec.layers,
            page_tokens=page_tokens,
            kv_heads=kv_heads,
            head_dim=spec.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def _all_linears(self) -> list[PackedLinear]:
        return [*(sharded.linear for sharded in self._sharded), self._head]

    def _read(self, rank: int, where: torch.device) -> list[Packed]:
        """Read and pack a rank's slices of all linears, the head's last; on a GPU only if it is to be taken at once."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} of {self.size}")
        with Weights(self._dir, where, self.dtype) as weights, torch.inference_mode():
            slices = [self._read_linear(weights, sharded, rank) for sharded in self._sharded]
            return [*slices, self._read_head(weights, rank)]

    def load_shared(self) -> None:
        """Read the weights that are the same on every rank, which a spare can do before it has one."""
        if self._shared_loaded:
            return
        with Weights(self._dir, self.device, self.dtype) as weights, torch.inference_mode():
            for module in self._base.modules():
                for parameter, value in list(module._parameters.items()):
                    if value is not None:
                        content = weights.read(self._names[value])
                        module._parameters[parameter] = nn.Parameter(content, requires_grad=False)
        self._shared_loaded = True

    def _read_linear(self, weights: Weights, sharded: Sharded, rank: int) -> Packed:
        linear = sharded.linear
        names = [self._prefix + name for name in sharded.sources]
        split = {"colwise": 0, "rowwise": 1}.get(linear.style)
        weight = torch.cat([weights.read(name + ".weight", split, rank, self.size) for name in names])
        bias = None
        if weights.has(names[0] + ".bias") and (linear.style != "rowwise" or rank == 0):  # one rank's: it is summed
            split = 0 if linear.style == "colwise" else None
            bias = torch.cat([weights.read(name + ".bias", split, rank, self.size) for name in names])
        return linear.pack(weight, bias)

    def _read_head(self, weights: Weights, rank: int) -> Packed:
        """The rank's rows of the head; of the embeddings, where the files have no head because the two are tied."""
        name, bias = self._head_name + ".weight", self._head_name + ".bias"
        weight = self._vocab_rows(weights, name if weights.has(name) else self._embeddings, rank)
        return self._head.pack(weight, self._vocab_rows(weights, bias, rank) if weights.has(bias) else None)

    def _vocab_rows(self, weights: Weights, name: str, rank: int) -> torch.Tensor:
        """A rank's share of a tensor with a row for each token of the vocabulary."""
        first = rank * self._vocab_share
        rows = weights.read_rows(name, first, min(first + self._vocab_share, self.spec.vocab_size))
        missing = self._vocab_share - len(rows)
        return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], pool: KVPool, comm: Communicator | None) -> torch.Tensor:
        """Run one step: write the chunks' KV to the pool and return what the logits that they ask for are made of.

        Returns [rows, hidden] of the model's dtype on its device, rows in the order of the chunks; [0, hidden] where
        none are asked for. comm connects the ranks; None where there is one. All ranks return the same bits.
        """
        self._check(chunks, pool, comm)
        self._ranks.communicator = comm
        tokens = torch.from_numpy(np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int64))
        positions = torch.from_numpy(np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks]))
        step = attention.plan_attention(chunks, pool, self._scratch)
        hidden: torch.Tensor = self._base(
            input_ids=tokens.to(self.device)[None],
            position_ids=positions.to(self.device)[None],
            use_cache=False,
            step=step,
        ).last_hidden_state[0]
        return hidden[torch.tensor(_wanted_rows(chunks), dtype=torch.int64, device=self.device)]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Some rows of what `forward` returned, [rows, hidden] -> float32 [rows, vocab_size], gathered from all ranks.

        Each rank must ask for the same rows in turn. A row's bits don't depend on those beside it.
        """
        if not len(hidden):
            return torch.empty(0, self.spec.vocab_size, device=self.device)
        own: torch.Tensor = self._head(hidden)
        if (comm := self._ranks.communicator) is None:
            return own.float()
        parts = own.new_empty(self.size, *own.shape)
        comm.all_gather(own, parts)
        whole = torch.empty(len(hidden), self.size, self._vocab_share, device=self.device)
        whole.copy_(parts.transpose(0, 1))
        return whole.view(len(hidden), -1)[:, : self.spec.vocab_size]

    def logits_in_pieces(self, hidden: torch.Tensor, limit_bytes: int) -> Iterator[torch.Tensor]:
        """The logits of all rows of `hidden`, as many rows at a time as take `limit_bytes`, and one at least."""
        rows = max(1, limit_bytes // (4 * self.spec.vocab_size))
        return (self.logits(hidden[at : at + rows]) for at in range(0, len(hidden), rows))

    def _check(self, chunks: Sequence[Chunk], pool: KVPool, comm: Communicator | None) -> None:
        if self.rank is None:
            raise ModelError("the model has no rank yet: load it first")
        if (comm.size if comm else 1) != self.size or (comm and comm.rank != self.rank):
            raise ModelError(f"the communicator is not that of rank {self.rank} of {self.size}")
        spec = self.spec
        if (pool.layers, pool.kv_heads, pool.head_dim) != (spec.layers, spec.kv_heads // self.size, spec.head_dim):
            raise ModelError("the pool has another shape than the model")
        if not chunks:
            raise ValueError("a step has at least one chunk")
        for chunk in chunks:
            if not len(chunk.tokens) or len(chunk.pages) * pool.page_tokens < chunk.end:
                raise ValueError(f"chunk at {chunk.start}: {len(chunk.tokens)} tokens, {len(chunk.pages)} pages")
            if chunk.end > spec.max_positions:
                raise ValueError(f"position {chunk.end - 1} is beyond the model's {spec.max_positions}")


def _wanted_rows(chunks: Sequence[Chunk]) -> list[int]:
    rows: list[int] = []
    at = 0
    for chunk in chunks:
        at += len(chunk.tokens)
        rows.extend(range(at - chunk.rows, at))
    return rows


def check_model(model_dir: Path, size: int, dtype: str) -> None:
    """Raise ModelError unless a model can be served by `size` ranks; only the headers of its weights are read."""
    of: torch.dtype = getattr(torch, dtype)
    read_spec(model_dir, size, of)
    architecture.skeleton(model_dir, read_config(model_dir), of)
