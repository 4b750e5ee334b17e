"""Small random models that vLLM's CPU build runs on three ranks, with a tokenizer; made without a network."""

from pathlib import Path
from typing import Any

from tests.tiny_tokenizer import make_tokenizer_dir

SMALL = {
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "vocab_size": 576,
    "max_position_embeddings": 8192,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_model_dir(folder: Path, family: str = "Llama", config_class: str = "", **changes: Any) -> Path:
    """Save a random model of `family` (a transformers class name less "ForCausalLM"); the same weights every time."""
    import torch
    import transformers

    make_tokenizer_dir(folder)
    config = getattr(transformers, config_class or f"{family}Config")(**(SMALL | changes))
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.to(torch.float32).save_pretrained(folder)
    return folder
