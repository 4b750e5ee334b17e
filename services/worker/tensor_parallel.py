"""Shard a transformers model by the tensor-parallel plan that its architecture publishes.

colwise: a rank holds some of the outputs of a linear layer. rowwise: it holds some of the inputs, and the ranks' results
are summed. Linears are packed by oneDNN, which gives a row the same bits whatever rows stand beside it; where it takes
another path for few rows (it does for one row of a long one), rows are added until it doesn't (`_least_rows`).
"""

import fnmatch
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from services.worker.communicator.base import Communicator
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


@dataclass(slots=True)
class Ranks:
    """The communicator of the step that is running; shared by all sharded layers of a model."""

    communicator: Communicator | None = None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if self.communicator is not None:
            self.communicator.all_reduce(tensor)


class PackedLinear(nn.Module):
    """y [..., out] = x [..., in] W^T + b for one rank's slice, with a row's bits independent of the other rows.

    `pack` gives it its weights; before that it has a shape only. A rowwise slice sums over the ranks.
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
        self._least_rows = _least_rows(inputs, outputs, dtype) if torch.device(device).type == "cpu" else 1

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take weight [outputs, inputs] and bias [outputs], of the model's dtype and on its device."""
        if weight.shape != (self.outputs, self.inputs):
            raise ModelError(f"a weight has shape {tuple(weight.shape)}, not {(self.outputs, self.inputs)}")
        self._bias = None if bias is None else bias.contiguous().clone()
        if weight.device.type == "cpu":
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        else:
            self._weight = weight.contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            out = nn.functional.linear(x, self._weight, self._bias)  # type: ignore[arg-type]
        else:
            out = _packed_linear(x, self._packed, self._bias, self._least_rows)
        if self._sums:
            self._ranks.all_reduce(out)
        return out


def _packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, least_rows: int) -> torch.Tensor:
    rows = x.shape[-2]
    if rows >= least_rows:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]
    padded = nn.functional.pad(x, (0, 0, 0, least_rows - rows))
    return torch.ops.mkldnn._linear_pointwise(padded, packed, bias, "none", [], "")[..., :rows, :]  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def _least_rows(inputs: int, outputs: int, dtype: torch.dtype) -> int:
    """The number of rows from which on oneDNN gives each row the bits it has among many, found by trying."""
    large = inputs * outputs > _LARGE
    tried = _TRIED_ROWS[: 10 if large else None]
    generator = torch.Generator().manual_seed(inputs * 1_000_003 + outputs)
    weight = torch.randn(min(outputs, 1024), inputs, generator=generator).to(dtype)
    weight = weight.repeat(-(-outputs // len(weight)), 1)[:outputs]
    x = torch.randn(tried[-1], inputs, generator=generator).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    whole = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    least = 1
    for rows, following in itertools.pairwise(tried):
        for first in range(
            0, tried[-1] - rows, 32 if large else 8
        ):  # half precision hides most differences: many tries
            part = torch.ops.mkldnn._linear_pointwise(x[first : first + rows], packed, None, "none", [], "")
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
    """How the plan (see check_plan) splits the module `name` ("layers.3.mlp.up_proj"): replicated where it is silent."""
    for pattern, published in plan.items():
        if fnmatch.fnmatchcase(name, pattern):
            return _PUBLISHED[published]
    return "replicated"


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every nn.Linear of a model with its full name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def share(total: int, size: int, what: str) -> int:
    """A rank's share of `total`, which must be split evenly."""
    if total % size:
        raise ModelError(f"{what} ({total}) can't be split evenly into {size} ranks")
    return total // size
