"""An architecture without its weights: what it expects of a checkpoint, and whether what runs around it is ours to do.

Its skeleton lies on the meta device, so that nothing is allocated or computed. Instead of a list of architectures that
are known to be right, two things are tried: the skeleton is run once, which shows how it calls attention, and its head
is given values, which shows whether logits are changed after it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from services.worker.engine import attention
from services.worker.engine.checkpoint import CONFIG, Expected, compare, one_line, read_tensors
from shared.errors import ModelError

_PROBE = "ghostserve-probe"
_HARMLESS = frozenset({"scaling", "sliding_window", "dropout", "position_ids", "use_cache", "output_attentions"})
"""What attention may be told: ours follows the first two, and the others change nothing when a model serves."""
_ROWS = 4


def skeleton(directory: Path, config: Any, dtype: torch.dtype) -> Any:
    """The whole model as transformers writes it, on the meta device; its weights are all there, in their shapes.

    Raises ModelError if it can't be served, or its files are not what it expects.
    """
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False
            )
    except Exception as error:  # whatever a model's constructor makes of a strange configuration
        raise ModelError(f"model {directory}: {CONFIG}: {type(error).__name__}: {one_line(error)}") from error
    whole.eval()
    _check_attention(directory, whole)
    _check_head(directory, whole)
    compare(directory, read_tensors(directory), expected(directory, whole))
    return whole


def expected(directory: Path, whole: Any) -> Expected:
    """What `whole`, as `build` gave it, loads of a checkpoint."""
    parameters = {name: tuple(value.shape) for name, value in whole.named_parameters(remove_duplicate=False)}
    for name in whole.state_dict():
        if name not in parameters:
            raise ModelError(f"model {directory}: {name} is a buffer that the weights hold, which is not served")
    tied: Mapping[str, str] = getattr(whole, "all_tied_weights_keys", None) or {}
    ignored = [*(getattr(whole, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    return Expected(parameters, frozenset(tied), re.compile("|".join(f"(?:{pattern})" for pattern in ignored)))


def embeddings(whole: Any) -> str:
    """The full name of the input embeddings' weight."""
    return _name_of(whole, whole.get_input_embeddings()) + ".weight"


def head(whole: Any) -> str:
    """The full name of the output head."""
    return _name_of(whole, whole.get_output_embeddings())


def _name_of(whole: Any, wanted: nn.Module) -> str:
    name: str = next(name for name, module in whole.named_modules() if module is wanted)
    return name


class _Seen:
    """How a skeleton called attention: which layers, in what order; anything that is not plain is refused."""

    def __init__(self, config: Any) -> None:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._shapes = (1, heads, _ROWS, dim), (1, kv_heads, _ROWS, dim), (1, kv_heads, _ROWS, dim)
        self.layers: list[int] = []

    def note(self, layer: int, shapes: tuple[tuple[int, ...], ...], others: Mapping[str, Any]) -> None:
        if shapes != self._shapes:
            raise ModelError(f"attention has queries, keys and values of shapes {shapes}, not {self._shapes}")
        if odd := sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS):
            raise ModelError(f"attention with {', '.join(odd)}")
        self.layers.append(layer)


def _probe(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: _Seen | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if step is None:
        raise ModelError("its attention is not told where keys and values lie")
    if not getattr(module, "is_causal", True):
        raise ModelError("its attention is not causal")
    step.note(int(module.layer_idx), (tuple(query.shape), tuple(key.shape), tuple(value.shape)), others)  # type: ignore[arg-type]
    return query.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(_PROBE, _probe)


def _check_attention(directory: Path, whole: Any) -> None:
    """Raise ModelError unless each layer attends once a step to its own keys and values, and in no way of its own."""
    config = whole.config
    tokens = torch.zeros(1, _ROWS, dtype=torch.int64, device="meta")
    try:
        seen = _Seen(config)
        config._attn_implementation = _PROBE
        with torch.inference_mode():
            whole.base_model(input_ids=tokens, position_ids=tokens, use_cache=False, step=seen)
    except Exception as error:  # what its code can't do without values or a cache
        raise ModelError(f"model {directory}: {_kind(config)} is not served: {one_line(error)}") from error
    finally:
        config._attn_implementation = attention.NAME
    if seen.layers != list(range(config.num_hidden_layers)):
        raise ModelError(
            f"model {directory}: {_kind(config)} is not served: its {config.num_hidden_layers} layers attend "
            f"{len(seen.layers)} times in a step, not once each"
        )


class _Given(nn.Module):
    """In the place of a model's base: gives the values that it was made with."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)


def _check_head(directory: Path, whole: Any) -> None:
    """Raise ModelError if logits are anything but what the head gives: we call it ourselves, and nothing after it."""
    hidden = torch.linspace(-3, 3, 8).view(1, 2, 4)
    prefix, name, config = whole.base_model_prefix, head(whole), whole.config
    base, own_head = getattr(whole, prefix), whole.get_submodule(name)
    try:
        setattr(whole, prefix, _Given(hidden))
        whole.set_submodule(name, nn.Identity())
        changed = not torch.equal(whole(input_ids=torch.zeros(1, 2, dtype=torch.int64)).logits, hidden)
    except Exception as error:  # a head that is more than a product
        raise ModelError(f"model {directory}: {_kind(config)} is not served: its head: {one_line(error)}") from error
    finally:
        setattr(whole, prefix, base)
        whole.set_submodule(name, own_head)
    if changed:
        keys = sorted(
            key for key, value in config.to_dict().items() if "logit" in key and value not in (None, 1, False)
        )
        by = f" ({', '.join(keys)})" if keys else ""
        raise ModelError(f"model {directory}: {_kind(config)} changes logits after its head{by}, which is not served")


def _kind(config: Any) -> str:
    return f"architecture {config.model_type!r}"
