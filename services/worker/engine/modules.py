"""Parts of a transformers model that ours take the place of: fused norms, activations that are exact row by row."""

from typing import Any

import torch
from torch import nn

from services.worker.engine.tensor_parallel import set_module
from shared.errors import ModelError

_VECTOR_BLOCK = 64  # values: two AVX-512 registers of half precision


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


def replace_activations(base: nn.Module) -> None:
    """Make the activations of a model row by row."""
    for name, module in list(base.named_modules()):
        if name.endswith(".act_fn"):
            set_module(base, name, _RowwiseActivation(module))


def replace_rms_norms(base: nn.Module, device: torch.device) -> None:
    """Put the fused RMSNorm in the place of plain ones."""
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


def fill_buffers(whole: Any, device: torch.device) -> None:
    """Give the buffers that a model's modules compute their values on `device`: the skeleton's hold none.

    Raises ModelError for one that transformers' own initialisation leaves without.
    """
    for name, module in whole.base_model.named_modules():
        buffers = {key: buffer for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        if not buffers:
            continue
        filled = {
            key: torch.full_like(buffer, float("nan") if buffer.is_floating_point() else 0, device=device)
            for key, buffer in buffers.items()
        }
        module._buffers.update(filled)
        whole._init_weights(module)
        for key, buffer in filled.items():
            if not buffer.is_floating_point() or buffer.isnan().any():
                raise ModelError(f"{name}.{key}: nothing is known of what this buffer holds")
