"""Pages of a real KV cache of vLLM, of one rank that is alone."""

import mmap
import multiprocessing
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from services.worker.memory import to_host
from tests.vllm.server import CLASSES, ENVIRONMENT

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def worker(tiny_llama: Path) -> Any:
    """vLLM's worker of rank 1 of three, after its warm-up, with a KV cache."""
    os.environ.update(ENVIRONMENT)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    from services.vllm import process

    names = {flag.removeprefix("--").replace("-", "_"): name for flag, name in CLASSES.items()}
    arguments = EngineArgs(str(tiny_llama), dtype="float32", tensor_parallel_size=3, enforce_eager=True,
                           max_model_len=512, block_size=32, max_num_seqs=4, **names)  # fmt: skip
    config = arguments.create_engine_config()
    worker = process._make(pickle.loads(pickle.dumps(config)), 1, multiprocessing.get_context("spawn").Lock())
    spec = worker.get_kv_cache_spec()
    worker.set_kv_cache_layout("LBHNC")
    config.cache_config.kv_cache_layout = worker.worker.cache_config.kv_cache_layout
    (cache,) = get_kv_cache_configs(config, [spec], [1 << 24])
    worker.initialize_from_config([cache] * 3)
    return worker.worker


def test_a_page_holds_what_each_layer_holds_of_a_block(worker: Any) -> None:
    pages = worker.pages()
    caches = worker.model_runner.kv_caches  # each [blocks, heads, tokens, content]
    for number, cache in enumerate(caches):
        cache.copy_(cache.new_ones(cache.shape) * number)
        cache[5] += 0.5
    (row,) = pages.rows(np.array([5]), pages.empty)
    page = to_host(row).view(np.float32).reshape(len(caches), -1)
    assert [set(layer) for layer in page.tolist()] == [{number + 0.5} for number in range(len(caches))]
    assert page.nbytes == sum(cache[5].numel() for cache in caches) * 4


def test_the_cache_takes_no_memory_until_it_is_written_and_then_huge_pages() -> None:
    from services.vllm import warm

    memory = torch.ones(8 << 20, dtype=torch.uint8)
    warm.give_back(memory)
    assert not memory[mmap.PAGESIZE : -mmap.PAGESIZE].any()
    middle = memory.data_ptr() + memory.nbytes // 2
    entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    (entry,) = [each for each in entries[1:] if _covers(each, middle)]
    assert "hg" in re.search(r"VmFlags:(.*)", entry)[1].split()  # type: ignore[index]


def _covers(entry: str, address: int) -> bool:
    start, end = (int(each, 16) for each in entry.split(maxsplit=1)[0].split("-"))
    return start <= address < end


def test_a_page_written_elsewhere_is_that_block(worker: Any) -> None:
    pages = worker.pages()
    caches = worker.model_runner.kv_caches
    for cache in caches:
        cache.normal_()
    pages.wrote(np.array([7]), pages.rows(np.array([3]), pages.empty))
    for cache in caches:
        assert bool((cache[7] == cache[3]).all())
        assert not bool((cache[8] == cache[3]).all())
