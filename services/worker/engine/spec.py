"""What a model is, as its files say, and whether it can be split as asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig

from services.worker.engine.checkpoint import (
    CONFIG,
    check_features,
    check_size,
    max_positions,
    one_line,
    read_json,
    weight_files,
)
from services.worker.engine.tensor_parallel import check_plan
from shared.errors import ModelError
from shared.types import ModelInfo

_SAMPLE_BYTES = 1 << 20


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
    config = read_config(model_dir)
    check_plan(config.base_model_tp_plan, model_dir.name)
    try:
        check_size(model_dir, config.to_dict(), size)
        heads = config.num_attention_heads
        return ModelSpec(
            architecture=(config.architectures or [config.model_type])[0],
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden=config.hidden_size,
            vocab_size=config.vocab_size,
            max_positions=max_positions(config.to_dict()),
            dtype=str(dtype).removeprefix("torch."),
            eos_token_ids=_eos_token_ids(model_dir, config),
            fingerprint=_fingerprint(model_dir),
        )
    except (AttributeError, KeyError, TypeError, ArithmeticError) as error:
        raise ModelError(f"model {model_dir}: {CONFIG}: {type(error).__name__}: {one_line(error)}") from error


def model_info(model_dir: Path, spec: ModelSpec, page_bytes: int) -> ModelInfo:
    """What the coordinator is told of a model, of which a rank's page takes `page_bytes`."""
    return ModelInfo(
        model_dir=str(model_dir),
        fingerprint=spec.fingerprint,
        architecture=spec.architecture,
        dtype=spec.dtype,
        vocab_size=spec.vocab_size,
        max_positions=spec.max_positions,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        eos_token_ids=spec.eos_token_ids,
        page_bytes=page_bytes,
    )


def read_config(directory: Path) -> Any:
    """A model's configuration. Raises ModelError where it is not one that can be served."""
    check_features(directory, read_json(directory / CONFIG))
    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers' checks of a configuration raise a dozen kinds
        raise ModelError(f"model {directory}: {CONFIG} can't be read: {one_line(error)}") from error
    if not getattr(config, "base_model_tp_plan", None):
        raise ModelError(f"model {directory}: architecture {config.model_type!r} publishes no tensor-parallel plan")
    check_features(directory, config.to_dict())
    return config


def _eos_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    ids = config.eos_token_id
    generation = directory / "generation_config.json"
    if generation.is_file():
        ids = read_json(generation).get("eos_token_id", ids)
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)


def _fingerprint(directory: Path) -> str:
    """A hash over the configuration and a sample of the weights: the first and the last MiB of each file."""
    state = xxhash.xxh3_128()
    state.update((directory / "config.json").read_bytes())
    for path in weight_files(directory):
        size = path.stat().st_size
        state.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            state.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            state.update(file.read(_SAMPLE_BYTES))
    return state.hexdigest()
