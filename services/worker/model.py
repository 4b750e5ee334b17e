"""One rank's slice of a transformers model, with attention over our pool.

The code that runs is transformers' own for the architecture. What is changed in it: linears are one rank's slices
(tensor_parallel), attention is ours (attention), and plain RMSNorms are torch's fused one.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from services.worker import attention
from services.worker.batch import Chunk
from services.worker.communicator.base import Communicator
from services.worker.kv_pool import KVPool
from services.worker.rotary import replace_rotary
from services.worker.tensor_parallel import Packed, PackedLinear, Ranks, Sharded, check_plan, set_module, shard_linears
from shared.errors import ModelError

_SAMPLE_BYTES = 1 << 20
_VECTOR_BLOCK = 64  # values: two AVX-512 registers of half precision
# settings by which an architecture changes its logits after the head: we call the head ourselves
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")

ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.attend)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the rest of the service needs to know of a model."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int  # of the whole model
    head_dim: int
    hidden: int
    vocab_size: int
    max_positions: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    fingerprint: str  # differs where the configuration or the weights differ


def read_spec(model_dir: Path, size: int, dtype: torch.dtype = torch.bfloat16) -> ModelSpec:
    """Read what a model is. Raises ModelError where it can't be split into `size` ranks, naming the sizes that do."""
    config = _read_config(model_dir)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    allowed = [k for k in range(1, kv_heads + 1) if kv_heads % k == 0 and config.intermediate_size % k == 0]
    if size not in allowed:
        raise ModelError(
            f"{model_dir.name} has {kv_heads} KV heads and can't be split into {size} ranks; "
            f"allowed: {', '.join(map(str, allowed))}"
        )
    check_plan(config.base_model_tp_plan, model_dir.name)
    return ModelSpec(
        architecture=(config.architectures or [config.model_type])[0],
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        dtype=str(dtype).removeprefix("torch."),
        eos_token_ids=_eos_token_ids(model_dir, config),
        fingerprint=_fingerprint(model_dir),
    )


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
        config = _read_config(model_dir)
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
        self._tied = bool(config.tie_word_embeddings)
        self._base: nn.Module = whole.base_model
        self._prefix = whole.base_model_prefix + "."
        self._vocab_share = -(-self.spec.vocab_size // size)  # the last rank's is filled up with zeros
        self._head = PackedLinear(self.spec.hidden, self._vocab_share, "colwise", self._ranks, dtype, self.device)
        plan = config.base_model_tp_plan
        self._sharded = shard_linears(self._base, plan, size, self._ranks, dtype, self.device)
        _replace_rms_norms(self._base, self.device)
        _replace_activations(self._base)
        replace_rotary(self._base)
        _fill_buffers(self._base, config, self.device)
        self._base.eval()
        self._shared_loaded = False
        self._ready: dict[int, list[Packed]] = {}

    def load(self, rank: int) -> None:
        """Take `rank`'s slice, which is read (and no other) unless `prepare` has. May be called again for another."""
        self.load_shared()
        slices = self._ready.get(rank) or self._read(rank)
        for linear, packed in zip(self._all_linears(), slices, strict=True):
            linear.take(packed)
        self.rank = rank

    def prepare(self, rank: int) -> None:
        """Hold `rank`'s slice ready, for the memory it takes, so that `load` need only take it."""
        self.load_shared()
        if rank not in self._ready:
            self._ready[rank] = self._read(rank)

    def forget_prepared(self) -> None:
        """Give back the memory of slices that were prepared; the one that is loaded stays."""
        self._ready.clear()

    def _all_linears(self) -> list[PackedLinear]:
        return [*(sharded.linear for sharded in self._sharded), self._head]

    def _read(self, rank: int) -> list[Packed]:
        """Read and pack a rank's slices of all linears, the head's last."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} of {self.size}")
        with _Weights(self._dir, self.device, self.dtype) as weights, torch.inference_mode():
            slices = [self._read_linear(weights, sharded, rank) for sharded in self._sharded]
            return [*slices, self._read_head(weights, rank)]

    def load_shared(self) -> None:
        """Read the weights that are the same on every rank, which a spare can do before it has one."""
        if self._shared_loaded:
            return
        with _Weights(self._dir, self.device, self.dtype) as weights, torch.inference_mode():
            for name, module in self._base.named_modules():
                for parameter, value in list(module._parameters.items()):
                    if value is not None:
                        content = weights.read(f"{self._prefix}{name}.{parameter}")
                        module._parameters[parameter] = nn.Parameter(content, requires_grad=False)
        self._shared_loaded = True

    def _read_linear(self, weights: "_Weights", sharded: Sharded, rank: int) -> Packed:
        linear = sharded.linear
        names = [self._prefix + name for name in sharded.sources]
        split = {"colwise": 0, "rowwise": 1}.get(linear.style)
        weight = torch.cat([weights.read(name + ".weight", split, rank, self.size) for name in names])
        bias = None
        if weights.has(names[0] + ".bias") and (linear.style != "rowwise" or rank == 0):  # one rank's: it is summed
            split = 0 if linear.style == "colwise" else None
            bias = torch.cat([weights.read(name + ".bias", split, rank, self.size) for name in names])
        return linear.pack(weight, bias)

    def _read_head(self, weights: "_Weights", rank: int) -> Packed:
        name = "lm_head.weight"
        if self._tied or not weights.has(name):
            name = self._prefix + "embed_tokens.weight"
        first = rank * self._vocab_share
        weight = weights.read_rows(name, first, min(first + self._vocab_share, self.spec.vocab_size))
        if len(weight) < self._vocab_share:
            weight = nn.functional.pad(weight, (0, 0, 0, self._vocab_share - len(weight)))
        return self._head.pack(weight, None)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], pool: KVPool, comm: Communicator | None) -> torch.Tensor:
        """Run one step: write the chunks' KV to the pool and return the logits that they ask for.

        Returns float32 [rows, vocab_size] on the model's device, rows in the order of the chunks; [0, vocab_size]
        where none are asked for. comm connects the ranks; None where there is one. All ranks return the same bits.
        """
        self._check(chunks, pool, comm)
        self._ranks.communicator = comm
        tokens = torch.from_numpy(np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int64))
        positions = torch.from_numpy(np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks]))
        step = attention.plan_attention(chunks, pool, self._scratch)
        hidden = self._base(
            input_ids=tokens.to(self.device)[None],
            position_ids=positions.to(self.device)[None],
            use_cache=False,
            step=step,
        ).last_hidden_state[0]
        rows = _wanted_rows(chunks)
        if not rows:
            return torch.empty(0, self.spec.vocab_size, device=self.device)
        return self._logits(hidden[torch.tensor(rows, device=self.device)], comm)

    def _logits(self, hidden: torch.Tensor, comm: Communicator | None) -> torch.Tensor:
        """hidden [rows, hidden] -> float32 [rows, vocab_size], gathered from all ranks."""
        own: torch.Tensor = self._head(hidden)
        if comm is None:
            return own.float()
        parts = own.new_empty(self.size, *own.shape)
        comm.all_gather(own, parts)
        whole = parts.float().permute(1, 0, 2).reshape(len(hidden), -1)
        return whole[:, : self.spec.vocab_size]

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


class _FusedRMSNorm(nn.Module):
    """RMSNorm in few operations, in float32 until its end. x [..., n]."""

    def __init__(self, weight: nn.Parameter, epsilon: float, device: torch.device) -> None:
        super().__init__()
        self.weight = weight
        self._epsilon = torch.tensor(epsilon, device=device)
        self._inverse = 1.0 / weight.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, norm, norm, value=self._inverse).rsqrt_()
        return (x * scale).mul_(self.weight).to(x.dtype)


class _RowwiseActivation(nn.Module):
    """An activation that gives a row the same bits wherever it stands. x [..., n].

    torch computes whole blocks of a tensor with vector instructions and the rest, by other code, one by one; so rows
    are made whole blocks.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = x.shape[-1] % _VECTOR_BLOCK
        if not rest:
            out: torch.Tensor = self.inner(x)
            return out
        padded = nn.functional.pad(x, (0, _VECTOR_BLOCK - rest))
        out = self.inner(padded)
        return out[..., : x.shape[-1]]


def _replace_activations(base: nn.Module) -> None:
    for name, module in list(base.named_modules()):
        if name.endswith(".act_fn"):
            set_module(base, name, _RowwiseActivation(module))


def _replace_rms_norms(base: nn.Module, device: torch.device) -> None:
    for name, module in list(base.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and _is_plain_rms_norm(type(module)):
            epsilon = getattr(module, "variance_epsilon", None) or module.eps
            set_module(base, name, _FusedRMSNorm(module.weight, float(epsilon), device))


def _is_plain_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether the class computes what torch's rms_norm does (Gemma's, for one, adds one to its weight): by trying."""
    generator = torch.Generator().manual_seed(1)
    try:
        norm = kind(16, eps=1e-5)
    except TypeError:
        return False
    if list(norm._parameters) != ["weight"]:
        return False
    x = torch.randn(4, 16, generator=generator)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))  # type: ignore[operator]
        return torch.allclose(norm(x), torch.rms_norm(x, (16,), norm.weight, 1e-5))  # type: ignore[arg-type]


def _fill_buffers(base: nn.Module, config: Any, device: torch.device) -> None:
    """Make the modules anew that compute their own buffers (rotary embeddings): the skeleton's hold no values."""
    for name, module in list(base.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            set_module(base, name, type(module)(config=config).to(device))


class _Weights:
    """The safetensors of a model, of which slices are read."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._directory = directory
        self._device = device
        self._dtype = dtype
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # tensor name -> open file

    def __enter__(self) -> "_Weights":
        for path in _weight_files(self._directory):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, dimension: int | None = None, rank: int = 0, size: int = 1) -> torch.Tensor:
        """A tensor, or of its `dimension` (0 or 1) the rank's part of `size` equal ones."""
        if dimension is None:
            return self._finish(self._file(name).get_tensor(name))
        content = self._file(name).get_slice(name)
        step = content.get_shape()[dimension] // size
        part = slice(rank * step, (rank + 1) * step)
        return self._finish(content[part] if dimension == 0 else content[:, part])

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a tensor."""
        return self._finish(self._file(name).get_slice(name)[first:last])

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise ModelError(f"{self._directory}: weight {name} is missing")
        return self._files[name]

    def _finish(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)


def _weight_files(directory: Path) -> Iterator[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return (directory / name for name in names)
    return iter(sorted(directory.glob("*.safetensors")))


def _read_config(directory: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(directory)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{directory}: config.json can't be read: {error}") from error
    if not getattr(config, "base_model_tp_plan", None):
        raise ModelError(f"{directory}: architecture {config.model_type!r} publishes no tensor-parallel plan")
    for setting in _LOGIT_CHANGES:
        if getattr(config, setting, None) not in (None, 1, 1.0):
            raise ModelError(f"{directory}: {setting} is not supported")
    return config


def _eos_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    ids = config.eos_token_id
    generation = directory / "generation_config.json"
    if generation.is_file():
        ids = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id", ids)
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)


def _fingerprint(directory: Path) -> str:
    """A hash over the configuration and a sample of the weights: the first and the last MiB of each file."""
    state = xxhash.xxh3_128()
    state.update((directory / "config.json").read_bytes())
    for path in _weight_files(directory):
        size = path.stat().st_size
        state.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            state.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            state.update(file.read(_SAMPLE_BYTES))
    return state.hexdigest()
