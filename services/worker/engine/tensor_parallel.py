"""Shard a transformers model by the tensor-parallel plan that its architecture publishes.

colwise: a rank holds some of a linear layer's outputs. rowwise: it holds some of the inputs, and the ranks' results are
summed. Linears are packed by oneDNN, which gives a row the same bits whatever rows stand beside it; where it takes
another path for few rows (it does for one row of a long one), rows are added until it doesn't (`_least_rows`).
"""

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import nn

from services.worker.communicator.base import Communicator
from services.worker.engine.placed import content, metadata, placed
from services.worker.memory import Bytes
from shared.errors import ModelError

Style = Literal["colwise", "rowwise", "replicated"]
_PUBLISHED: Mapping[str, Style] = {
    "colwise": "colwise",
    "colwise_gather_output": "colwise",
    "rowwise": "rowwise",
    "replicate": "replicated",
    "replicated_with_grad_allreduce": "replicated",
}
_TRIED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256)
_LARGE = 4 << 20
_ALIGN = 4096  # what oneDNN gives its own memory
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default


@dataclass(slots=True)
class Ranks:
    """The communicator of the step that is running; shared by all sharded layers of a model."""

    communicator: Communicator | None = None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if self.communicator is not None:
            self.communicator.all_reduce(tensor)


@dataclass(frozen=True, slots=True)
class Packed:
    """One rank's weights of a linear, in the form that it computes with."""

    packed: torch.Tensor | None  # by oneDNN
    weight: torch.Tensor | None  # plain, where oneDNN is not to be had
    bias: torch.Tensor | None
    memory: Bytes | None = None  # what they lie in, where it is not their own


class PackedLinear(nn.Module):
    """y [..., out] = x [..., in] W^T + b for one rank's slice, with a row's bits independent of the other rows.

    `take` gives it weights that `pack` made; before that it has a shape only. A rowwise slice sums over the ranks.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: Style,
        ranks: Ranks,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.style = style
        self._ranks = ranks
        self._sums = style == "rowwise"
        self._packed: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None  # where oneDNN is not to be had: the plain one
        self._bias: torch.Tensor | None = None
        self._memory: Bytes | None = None  # kept as long as the tensors in it
        self._where = torch.device(device)
        self._packs = self._where.type == "cpu"
        self._least_rows = _least_rows(inputs, outputs, dtype) if self._packs else 1
        self._held_as = _computed_in(dtype) if self._packs else dtype

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        """Weight [outputs, inputs] and bias [outputs], of the model's dtype, ready to be taken.

        Where they are; `take` brings them to the model's device.
        """
        if weight.shape != (self.outputs, self.inputs):
            raise ModelError(f"a weight has shape {tuple(weight.shape)}, not {(self.outputs, self.inputs)}")
        bias = None if bias is None else bias.to(self._held_as).contiguous().clone()
        if self._packs:
            return Packed(_pack(weight.to(self._held_as)), None, bias)
        return Packed(None, weight.contiguous(), bias)

    @property
    def room(self) -> int:
        """The bytes that `store` takes: the weight, then the bias, then one that says whether there is a bias."""
        return _aligned(self.form[0]) + _aligned(self.outputs * self._held_as.itemsize + 1)

    def store(self, slice_: Packed, memory: Bytes) -> None:
        """Write what `pack` made of weights in host memory to `room` bytes."""
        weight = slice_.weight if slice_.packed is None else slice_.packed
        assert weight is not None
        size, at = self.form[0], _aligned(self.form[0])
        memory[:size] = content(weight)
        if slice_.bias is not None:
            memory[at : at + slice_.bias.nbytes] = content(slice_.bias)
        memory[-1] = slice_.bias is not None

    def stored(self, memory: Bytes) -> Packed:
        """What `store` has written there: the same bytes, not a copy."""
        size, form = self.form
        weight = placed(memory, (self.outputs, self.inputs), self._held_as, form)
        bias = placed(memory[_aligned(size) :], (self.outputs,), self._held_as) if memory[-1] else None
        return Packed(weight, None, bias, memory) if self._packs else Packed(None, weight, bias, memory)

    @property
    def form(self) -> tuple[int, bytes]:
        """The bytes of a weight, and oneDNN's metadata of it."""
        if self._packs:
            return _packed_form(self.inputs, self.outputs, self._held_as, torch.get_num_threads())
        return self.inputs * self.outputs * self._held_as.itemsize, b""

    def take(self, slice_: Packed) -> None:
        """Compute with these weights from now on."""
        self._packed, self._weight, self._bias = slice_.packed, slice_.weight, slice_.bias
        self._memory = slice_.memory
        if not self._packs:
            self._weight = self._here(slice_.weight)
            self._bias = self._here(slice_.bias)

    def _here(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(self._where, non_blocking=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self._packed
        if packed is None:
            out = nn.functional.linear(x, self._weight, self._bias)  # type: ignore[arg-type]
        elif x.shape[-2] >= self._least_rows:
            out = _multiply(x, packed, self._bias)
        else:
            padded = nn.functional.pad(x, (0, 0, 0, self._least_rows - x.shape[-2]))
            out = _multiply(padded, packed, self._bias)[..., : x.shape[-2], :].contiguous()
        if self._sums:
            self._ranks.all_reduce(out)
        return out


class FusedPart(nn.Module):
    """One of several linears of the same input (queries, keys and values, say) that are computed as one.

    The first computes all of them and keeps the others' parts until they are asked for with the same input.
    """

    def __init__(self, whole: PackedLinear, parts: tuple[int, ...], index: int, results: "FusedResults") -> None:
        super().__init__()
        self._whole = (whole,)  # in a tuple, so that it is no submodule of each of its parts
        self._parts = parts
        self._index = index
        self._results = results

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = self._results
        if self._index == 0 or results.x is not x:
            results.x = x
            results.parts = torch.split_with_sizes(self._whole[0].forward(x), self._parts, -1)
        return results.parts[self._index]


@dataclass(slots=True)
class FusedResults:
    """What the first of fused linears computed, for the others."""

    x: torch.Tensor | None = None
    parts: Sequence[torch.Tensor] = ()


@dataclass(frozen=True, slots=True)
class Sharded:
    """A linear of ours and the names of the transformers' ones whose rows it holds, one after the other."""

    linear: PackedLinear
    sources: tuple[str, ...]


def shard_linears(
    base: nn.Module, plan: Mapping[str, str], size: int, ranks: Ranks, dtype: torch.dtype, device: torch.device
) -> list[Sharded]:
    """Put slices in the place of all linears of a model without its head; those of one input become one."""
    groups: dict[tuple[str, ...], list[tuple[str, nn.Linear]]] = {}
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear):
            style = plan_style(plan, name)
            parent = name.rpartition(".")[0]
            alike = (parent, str(module.in_features), str(module.bias is None))
            groups.setdefault((style, *alike) if style == "colwise" else (style, name), []).append((name, module))
    sharded = []
    for members in groups.values():
        name, first = members[0]
        style = plan_style(plan, name)
        inputs = share(first.in_features, size, name) if style == "rowwise" else first.in_features
        parts = tuple(share(m.out_features, size, n) if style == "colwise" else m.out_features for n, m in members)
        linear = PackedLinear(inputs, sum(parts), style, ranks, dtype, device)
        results = FusedResults()
        for index, (name, _) in enumerate(members):
            set_module(base, name, FusedPart(linear, parts, index, results) if len(parts) > 1 else linear)
        sharded.append(Sharded(linear, tuple(name for name, _ in members)))
    return sharded


def set_module(base: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with this full name."""
    parent, _, child = name.rpartition(".")
    setattr(base.get_submodule(parent), child, module)


@cache
def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """What oneDNN multiplies weights of `dtype` in here: float32 where the processor lacks instructions for them."""
    try:
        _pack(torch.zeros(16, 16, dtype=dtype))
    except RuntimeError:
        return torch.float32
    return dtype


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


@lru_cache(maxsize=256)
def _packed_form(inputs: int, outputs: int, dtype: torch.dtype, threads: int) -> tuple[int, bytes]:
    """How many bytes oneDNN's form of a weight takes, and its metadata: equal for all weights of a shape.

    `threads`: what the calling thread may use, on which the form depends; once torch is asked, that is settled.
    """
    packed = _pack(torch.zeros(outputs, inputs, dtype=dtype))
    return len(content(packed)), metadata(packed)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b in the dtype of x."""
    out: torch.Tensor = _linear_pointwise(x.to(_computed_in(x.dtype)), packed, bias, "none", [], "")
    return out.to(x.dtype)


@lru_cache(maxsize=256)
def _least_rows(inputs: int, outputs: int, dtype: torch.dtype) -> int:
    """The number of rows from which on oneDNN gives each row the bits it has among many, found by trying."""
    large = inputs * outputs > _LARGE
    tried = _TRIED_ROWS[: 10 if large else None]
    generator = torch.Generator().manual_seed(inputs * 1_000_003 + outputs)
    weight = torch.randn(min(outputs, 1024), inputs, generator=generator).to(dtype)
    weight = weight.repeat(-(-outputs // len(weight)), 1)[:outputs]
    x = torch.randn(tried[-1], inputs, generator=generator).to(dtype)
    packed = _pack(weight.to(_computed_in(dtype)))
    whole = _multiply(x, packed, None)
    least = 1
    for rows, following in itertools.pairwise(tried):
        for first in range(
            0, tried[-1] - rows, 32 if large else 8
        ):  # half precision hides most differences: many tries
            part = _multiply(x[first : first + rows], packed, None)
            if not torch.equal(part, whole[first : first + rows]):
                least = following
                break
    return least


def check_plan(plan: Mapping[str, str], model: str) -> None:
    """Raise ModelError where a plan splits anything in a way that is not supported (mixtures of experts, say)."""
    unknown = sorted(set(plan.values()) - set(_PUBLISHED))
    if unknown:
        raise ModelError(
            f"{model}: its tensor-parallel plan has {', '.join(unknown)}; supported: {', '.join(_PUBLISHED)}"
        )


def plan_style(plan: Mapping[str, str], name: str) -> Style:
    """How a plan splits the module `name` ("layers.3.mlp.up_proj"): replicated where it says nothing."""
    for pattern, published in plan.items():
        if fnmatch.fnmatchcase(name, pattern):
            return _PUBLISHED[published]
    return "replicated"


def share(total: int, size: int, what: str) -> int:
    """A rank's share of `total`, which must be split evenly."""
    if total % size:
        raise ModelError(f"{what} ({total}) can't be split evenly into {size} ranks")
    return total // size
