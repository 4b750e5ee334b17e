"""Pages of the KV caches that vLLM lays out for its GPU backends, built by vLLM's own code in memory of a CPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from services.vllm.flags import BLOCKS_OUTERMOST, GPU_ENVIRONMENT
from services.vllm.pages import BlockPages, pages_of
from services.worker.memory import Bytes, to_host
from tests.vllm.server import ENVIRONMENT

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK, BLOCKS = 16, 7
BACKENDS = {
    "FlashAttention": "flash_attn:FlashAttentionBackend",
    "Triton": "triton_attn:TritonAttentionBackend",
    "FlashMLA": "mla.flashmla:FlashMLABackend",
    "Triton MLA": "mla.triton_mla:TritonMLABackend",
}


@pytest.fixture(scope="module")
def config(tiny_llama: Path) -> Any:
    os.environ.update(ENVIRONMENT)
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(tiny_llama), dtype="float32", enforce_eager=True, max_model_len=512).create_engine_config()


def groups_of(kind: str) -> list[Any]:
    """KV cache groups as vLLM makes them of a kind of model."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MLAAttentionSpec, SlidingWindowSpec

    shape = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    if kind == "latent":
        spec = MLAAttentionSpec(**shape | {"num_kv_heads": 1, "head_size": 576})
        return [KVCacheGroupSpec(["a", "b", "c"], spec)]
    full = KVCacheGroupSpec(["a", "b", "c"], FullAttentionSpec(**shape))
    if kind == "full":
        return [full]
    return [full, KVCacheGroupSpec(["x", "y"], SlidingWindowSpec(**shape, sliding_window=128))]


def laid_out(config: Any, kind: str, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """What vLLM's GPU workers allocate, in memory of a CPU: the configuration, and each layer's [B, H, N, C]."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    config.cache_config.kv_cache_layout = name
    config.cache_config.num_gpu_blocks_override = BLOCKS
    groups = groups_of(kind)
    made = get_kv_cache_config_from_groups(config, groups, 1 << 30)
    return made, allocate_kv_cache(made, torch.device("cpu"), KVCacheLayout[name], [BLOCK] * len(groups))


def page_of(pages: BlockPages, page: int) -> Bytes:
    return to_host(next(iter(pages.rows(np.array([page]), pages.empty))))


@pytest.mark.parametrize("name", BLOCKS_OUTERMOST)
@pytest.mark.parametrize("kind", ["full", "windows", "latent"])
def test_a_page_is_one_range_with_all_that_the_layers_hold_of_a_block_and_nothing_else(
    config: Any, kind: str, name: str
) -> None:
    made, caches = laid_out(config, kind, name)
    pages = pages_of(caches["a"], made.kv_cache_tensors, made.num_blocks)
    for group in made.kv_cache_groups:  # a block belongs to one group at a time
        for number, layer in enumerate(group.layer_names):
            caches[layer].zero_()
            caches[layer][3] = 1.5 + number
        page = page_of(pages, 3).view(np.uint16)
        for number, layer in enumerate(group.layer_names):
            written = torch.tensor(1.5 + number, dtype=torch.bfloat16).view(torch.int16).item()
            assert (page == written).sum() == caches[layer][3].numel()
        assert not any(page_of(pages, other).any() for other in (0, 2, 4, BLOCKS - 1))
        caches[group.layer_names[0]].untyped_storage().fill_(0)


@pytest.mark.parametrize("name", BLOCKS_OUTERMOST)
def test_a_page_is_decoded_where_it_lies_and_is_that_block_for_every_layer(config: Any, name: str) -> None:
    made, caches = laid_out(config, "full", name)
    pages = pages_of(caches["a"], made.kv_cache_tensors, made.num_blocks)
    for cache in caches.values():
        cache.copy_(torch.randn(cache.shape))
    target = pages.targets(np.array([5]), pages.empty)
    to_host(next(iter(target)))[:] = page_of(pages, 2)
    pages.wrote(np.array([5]), target)
    for cache in caches.values():
        assert torch.equal(cache[5], cache[2])
        assert not torch.equal(cache[4], cache[2])
        assert not torch.equal(cache[6], cache[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_for_gpus_takes_the_layout_that_is_asked_for(config: Any, backend: str) -> None:
    assert GPU_ENVIRONMENT["VLLM_KV_CACHE_LAYOUT"] in supported(BACKENDS[backend])


def test_a_backend_that_cannot_have_whole_blocks_is_refused_by_vllm_with_the_layouts_name(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", GPU_ENVIRONMENT["VLLM_KV_CACHE_LAYOUT"])
    config.cache_config.kv_cache_layout = None
    with pytest.raises(ValueError, match=r"VLLM_KV_CACHE_LAYOUT=BLNHC.*LBNHC"):
        resolve_kv_cache_layout(config, [supported("flex_attention:FlexAttentionBackend")])


def supported(name: str) -> list[str]:
    """The layouts that one of vLLM's backends takes, by its own word."""
    import importlib

    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

    module, _, kind = name.partition(":")
    backend = getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), kind)
    return [layout.name for layout in get_supported_kv_cache_layouts([backend])]
