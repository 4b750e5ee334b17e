"""Each architecture with a tensor-parallel plan is served as transformers serves it, or refused; none is served wrong.

And a checkpoint that is not what its architecture loads is refused by what it lacks, with no weight read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from services.worker.engine.batch import Chunk
from services.worker.engine.model import check_model
from services.worker.engine.spec import read_spec
from services.worker.engine.tensor_parallel import _PUBLISHED
from shared.errors import ModelError
from tests.worker.rank_threads import SMALL, RankThreads, small_model

SERVED = {
    "arcee", "cwm", "ernie4_5", "exaone4", "gemma", "gemma3_text", "granite", "hyperclovax", "internlm3", "iquestcoder",
    "jais2", "llama", "ministral", "ministral3", "mistral", "olmo", "phi", "qwen2", "qwen3", "seed_oss", "smollm3",
    "starcoder2",
}  # fmt: skip
"""Of the version that development is pinned to; another may have more, which must be right too."""
TOO_LARGE = {"llama4"}  # even its smallest, whose experts do not follow hidden_size
TOKENS = 90


def plans() -> list[str]:
    """The types of model whose plan has nothing that is refused at once."""
    found = []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        plan = getattr(transformers.CONFIG_MAPPING[kind], "base_model_tp_plan", None)
        if plan and set(plan.values()) <= _PUBLISHED.keys() and kind not in TOO_LARGE:
            found.append(kind)
    return found


def make(kind: str, directory: Path) -> torch.nn.Module:
    """A small random model of an architecture, saved. Raises whatever its own code makes of the size."""
    config_type = transformers.CONFIG_MAPPING[kind]
    window = {"sliding_window": 37} if getattr(config_type(), "sliding_window", None) else {}
    torch.manual_seed(1)
    whole = transformers.AutoModelForCausalLM.from_config(
        config_type(**(SMALL | window | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8})),
        dtype=torch.float32,
    )
    for name, parameter in whole.named_parameters():
        if "norm" in name or "bias" in name:  # not the ones and zeros that they begin as
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    whole.eval().save_pretrained(directory)
    return whole  # type: ignore[no-any-return]


def refusal(model: Path) -> str:
    """Why it is not served; empty if it is."""
    try:
        check_model(model, 2, "float32")
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", plans())
@pytest.mark.filterwarnings("ignore")
def test_an_architecture_is_served_as_transformers_serves_it_or_refused(kind: str, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(2, 211, TOKENS).astype(np.int32)
    try:
        whole = make(kind, tmp_path)
        with torch.inference_mode():
            expected = whole(torch.from_numpy(tokens).long()[None]).logits[0]
    except Exception as error:
        assert kind not in SERVED
        pytest.skip(f"can't be made so small: {error}")
    why = refusal(tmp_path)
    assert kind not in SERVED or not why
    assert "\n" not in why
    if why:
        return
    group = RankThreads(tmp_path, 2)
    found = group.step([Chunk(tokens, 0, TOKENS, np.arange(6, dtype=np.int32), "all")])
    group.close()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def rewrite(model: Path, change: Mapping[str, torch.Tensor | None]) -> None:
    """Change tensors of a checkpoint; None takes one away."""
    tensors = load_file(model / "model.safetensors") | change
    save_file({name: value for name, value in tensors.items() if value is not None}, model / "model.safetensors")


def reconfigure(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LINEAR = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.embed_tokens.weight": torch.zeros(200, 48)}, ["model.embed_tokens.weight", "[200, 48]", "[211, 48]"]),
        ({"lm_head.weight": torch.zeros(200, 48)}, ["lm_head.weight", "[200, 48]"]),
        ({"lm_head.weight": None}, ["lm_head.weight is missing"]),
        ({"model.layers.2.input_layernorm.weight": torch.ones(47)}, ["model.layers.2.input_layernorm.weight", "[47]"]),
        ({"model.norm.weight": None}, ["model.norm.weight is missing"]),
        ({LINEAR: torch.zeros(48, 96)}, [LINEAR, "[48, 96]", "[96, 48]"]),
        ({LINEAR: None, LINEAR[:-6] + "qweight": torch.zeros(6, 96)}, [LINEAR + " is missing", "up_proj.qweight"]),
        ({LINEAR: torch.zeros(96, 48).to(torch.float8_e4m3fn)}, [LINEAR, "F8_E4M3"]),
        ({LINEAR: torch.zeros(96, 48, dtype=torch.int8)}, [LINEAR, "I8"]),
        ({LINEAR + "_scale_inv": torch.zeros(1, 1)}, [LINEAR + "_scale_inv"]),
        ({"lm_head.bias": torch.zeros(211)}, ["lm_head.bias"]),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(192)}, ["model.layers.0.self_attn.q_proj.bias"]),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(96, 48)}, ["model.layers.3.mlp.up_proj.weight"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]
) -> None:
    model = small_model(tmp_path, "Llama")
    check_model(model, 2, "float32")
    rewrite(model, change)
    with pytest.raises(ModelError) as caught:
        check_model(model, 2, "float32")
    assert all(name in str(caught.value) for name in named)
    assert "\n" not in str(caught.value)


def test_what_old_checkpoints_hold_besides_is_no_reason_to_refuse(tmp_path: Path) -> None:
    model = small_model(tmp_path, "Llama")
    rewrite(model, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    check_model(model, 2, "float32")


def test_a_head_of_its_own_goes_before_tied_embeddings_as_in_transformers(tmp_path: Path) -> None:
    model = small_model(tmp_path, "Llama", tie_word_embeddings=True)
    rewrite(model, {"lm_head.weight": torch.randn(211, 48, generator=torch.Generator().manual_seed(3))})
    tokens = np.arange(2, 22, dtype=np.int32)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        expected = whole(torch.from_numpy(tokens).long()[None]).logits[0]
    group = RankThreads(model, 2)
    found = group.step([Chunk(tokens, 0, 20, np.arange(2, dtype=np.int32), "all")])
    group.close()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma2"}, "softcap"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits_scaling"),
        ({"model_type": "cohere", "logit_scale": 0.0625}, "logit_scale"),
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "nonsense"}, "config.json"),
        ({"num_attention_heads": "twelve"}, "config.json"),
        ({"num_hidden_layers": None}, "config.json"),
        ({"hidden_size": 47}, "config.json"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}, "longrope"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_that_is_not_served_is_refused_by_what_it_asks(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    model = small_model(tmp_path, "Llama")
    reconfigure(model, **changes)
    with pytest.raises(ModelError, match=named) as caught:
        check_model(model, 2, "float32")
    assert "\n" not in str(caught.value)


def test_yarn_reaches_as_far_as_it_says(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    model = small_model(tmp_path, "Llama", rope_parameters=yarn | {"rope_theta": 10000.0})
    assert read_spec(model, 2).max_positions == 4096
    tokens = np.random.default_rng(0).integers(2, 211, 1500).astype(np.int32)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        expected = whole(torch.from_numpy(tokens).long()[None]).logits[0, -1:]
    group = RankThreads(model, 2, pages=128)
    found = group.step([Chunk(tokens, 0, len(tokens), np.arange(94, dtype=np.int32), "last")])
    group.close()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
