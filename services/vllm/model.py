"""What GhostServe's coordinator is told of the model that vLLM serves."""

import hashlib

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from services.vllm.pages import page_bytes
from shared.types import ModelInfo


def model_info(config: VllmConfig, cache: KVCacheConfig) -> tuple[ModelInfo, int, int, int]:
    """The model, the number of its blocks, and the tokens of one and of a step at most. The same on all ranks."""
    model, size = config.model_config, config.parallel_config.tensor_parallel_size
    placements = [
        (tuple(tensor.layers), tensor.layer_stride, tensor.block_stride, tensor.offset)
        for tensor in cache.kv_cache_tensors
    ]
    told = (model.model, model.revision, str(model.dtype), size, cache.num_blocks, placements)
    info = ModelInfo(
        model_dir=str(model.model),
        fingerprint=hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest(),
        architecture=", ".join(getattr(model.hf_config, "architectures", None) or ["unknown"]),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.get_vocab_size(),
        max_positions=model.max_model_len,
        layers=model.get_num_layers(config.parallel_config),
        kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        eos_token_ids=(),
        page_bytes=page_bytes(cache.kv_cache_tensors),
    )
    block_tokens = min(group.kv_cache_spec.block_size for group in cache.kv_cache_groups)
    return info, cache.num_blocks, block_tokens, config.scheduler_config.max_num_batched_tokens


def is_alike(config: VllmConfig) -> bool:
    """Whether a rank's KV is another's too: latent attention, or one KV head for all of them."""
    alike = bool(config.model_config.use_mla) or config.model_config.get_total_num_kv_heads() == 1
    return alike and bool(config.parallel_config.tensor_parallel_size > 1)
