"""One rank's slice of a transformers model, with attention over our pool.

The code that runs is transformers' own for the architecture. What is changed in it: linears are one rank's slices
(tensor_parallel), attention is ours (attention), and plain RMSNorms are torch's fused one.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from services.worker.communicator.base import Communicator
from services.worker.device import make_device
from services.worker.engine import architecture, attention, placed
from services.worker.engine.batch import Chunk
from services.worker.engine.checkpoint import weight_files
from services.worker.engine.host_slices import HostSlices
from services.worker.engine.kv_pool import KVPool, page_bytes
from services.worker.engine.modules import fill_buffers, replace_activations, replace_rms_norms
from services.worker.engine.rotary import replace_rotary
from services.worker.engine.spec import read_config, read_spec
from services.worker.engine.tensor_parallel import Packed, PackedLinear, Ranks, Sharded, shard_linears
from services.worker.engine.weights import Weights
from services.worker.memory import Bytes
from shared.errors import ModelError

ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.attend)


class RankModel:
    """One rank's slice of a model. Made without a rank, as a spare does ahead of time; `load` gives it one.

    `host_memory`: where the host's workers hold one copy of all slices; without it a slice is read when it is taken.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        host_memory: int | None = None,
    ) -> None:
        self.spec = read_spec(model_dir, size, dtype)
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self._device = make_device(self.device)
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
        self._parameters = [
            (module, key, self._names[parameter], parameter.shape)
            for module in self._base.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._shared_loaded = False
        self._ready: dict[int, list[Packed]] = {}
        self._pinned: list[Bytes] = []
        self._shared_memory: Bytes | None = None
        self._host_memory = host_memory

    def load(self, rank: int) -> None:
        """Take `rank`'s slice: the host's copy, where there is one, else it is read. Again for another, if need be."""
        self.load_shared()
        slices = self._ready.get(rank) or self._wait_for(rank) or list(self._read(rank, self.device))
        for linear, packed in zip(self._all_linears(), slices, strict=True):
            linear.take(packed)
        self.rank = rank

    def prepare(self, rank: int) -> bool:
        """Have the host hold `rank`'s slice, so that `load` need only take it. False: another process is filling it."""
        self.load_shared()
        if rank not in self._ready:
            assert self._host is not None, "a model without the host's memory holds nothing"
            memory = self._host.hold(rank, partial(self._fill, rank), writable=self._pins)
            if memory is None:
                return False
            self._held(rank, memory)
        return True

    def forget_prepared(self) -> None:
        """Let go of slices that were prepared, which the host still holds; the one that is loaded stays."""
        self._ready.clear()
        if self._pinned:
            self._device.finish()  # what is copied from there
        while self._pinned:
            self._device.unpin(self._pinned.pop())
        if self._host is not None:
            self._host.forget()

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

    @cached_property
    def _host(self) -> HostSlices | None:
        """Made by the thread that computes: how oneDNN packs weights depends on the number of threads it may use."""
        if self._host_memory is None:
            return None
        slices = [sum(linear.room for linear in self._all_linears())] * self.size
        shared = sum(shape.numel() * self.dtype.itemsize for *_, shape in self._parameters)
        return HostSlices(self._host_memory, self._weights_name(), [*slices, shared])

    @property
    def _pins(self) -> bool:
        return self.device.type != "cpu"

    def _wait_for(self, rank: int) -> list[Packed] | None:
        if self._host is None:
            return None
        memory = self._host.wait(rank, partial(self._fill, rank), writable=self._pins)
        return None if memory is None else self._held(rank, memory)

    def _held(self, rank: int, memory: Bytes) -> list[Packed]:
        """A slice that the host holds; what goes to a device goes there by itself from now on."""
        self._device.pin(memory)
        self._pinned.append(memory)
        parts = zip(self._all_linears(), self._parts(memory), strict=True)
        self._ready[rank] = [linear.stored(part) for linear, part in parts]
        return self._ready[rank]

    def _parts(self, memory: Bytes) -> list[Bytes]:
        ends = np.cumsum([linear.room for linear in self._all_linears()])
        return np.split(memory, ends[:-1])

    def _fill(self, rank: int, memory: Bytes) -> Iterator[None]:
        """Write a slice to the host's memory, a linear a turn."""
        slices = self._read(rank, torch.device("cpu"))
        for linear, packed, part in zip(self._all_linears(), slices, self._parts(memory), strict=True):
            linear.store(packed, part)
            yield
        self._check_same()

    def _read(self, rank: int, where: torch.device) -> Iterator[Packed]:
        """Read and pack a rank's slices of all linears, the head's last; on a GPU only if it is to be taken at once."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} of {self.size}")
        with Weights(self._dir, where, self.dtype) as weights:
            for sharded in self._sharded:
                yield self._read_linear(weights, sharded, rank)
            yield self._read_head(weights, rank)

    def load_shared(self) -> None:
        """Take the weights that are the same on every rank, which a spare can do before it has one."""
        if self._shared_loaded:
            return
        memory = None if self._host is None else self._host.wait(self.size, self._fill_shared)
        values = self._read_shared(self.device) if memory is None else self._stored_shared(memory)
        for (module, key, *_), content in zip(self._parameters, values, strict=True):
            module._parameters[key] = nn.Parameter(content.to(self.device), requires_grad=False)
        self._shared_memory = memory  # kept as long as the tensors in it
        self._shared_loaded = True

    def _read_shared(self, where: torch.device) -> Iterator[torch.Tensor]:
        with Weights(self._dir, where, self.dtype) as weights:
            for *_, name, _ in self._parameters:
                yield weights.read(name)

    def _fill_shared(self, memory: Bytes) -> Iterator[None]:
        at = 0
        for tensor in self._read_shared(torch.device("cpu")):
            memory[at : at + tensor.nbytes] = placed.content(tensor.contiguous())
            at += tensor.nbytes
            yield
        self._check_same()

    def _stored_shared(self, memory: Bytes) -> Iterator[torch.Tensor]:
        at = 0
        for *_, shape in self._parameters:
            yield placed.placed(memory[at:], shape, self.dtype)
            at += shape.numel() * self.dtype.itemsize

    def _weights_name(self) -> bytes:
        """Equal for models that would read equal slices: by their files, as these are now."""
        files = [(path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in _stats(self._dir)]
        forms = [linear.form for linear in self._all_linears()]
        told = (str(self._dir.resolve()), str(self.dtype), self.size, self.device.type, forms, files)
        return hashlib.sha256(repr(told).encode()).digest()

    def _check_same(self) -> None:
        if self._host is not None and self._weights_name() != self._host.name:
            raise ModelError(f"model {self._dir}: its weights were replaced while they were read")

    @torch.inference_mode()
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

    @torch.inference_mode()
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


def _stats(directory: Path) -> list[tuple[Path, os.stat_result]]:
    return [(path, path.stat()) for path in weight_files(directory)]


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
