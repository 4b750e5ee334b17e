"""Makes a worker's first steps fast: what is compiled or looked up once has been, before a request waits for it."""

import ctypes
import mmap
from typing import Any

from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

PROMPT_TOKENS = 48
REQUESTS = 2
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14
_libc = ctypes.CDLL(None, use_errno=True)


def run_steps(worker: Any) -> None:
    """Run a prefill and two decode steps of made-up requests. All ranks do it at once, or one does that is alone."""
    runner = worker.model_runner
    groups = runner.kv_cache_config.kv_cache_groups
    if runner.is_pooling_model or not groups:
        return
    sizes = [group.kv_cache_spec.block_size for group in groups]
    counts = [-(-(PROMPT_TOKENS + 2) // size) for size in sizes]
    requests = min(REQUESTS, runner.max_num_reqs, runner.max_num_tokens // PROMPT_TOKENS)
    if not requests or 1 + requests * sum(counts) > runner.kv_cache_config.num_blocks:
        return
    ids = iter(range(1, 1 + requests * sum(counts)))  # block 0 is vLLM's null block
    names = [f"_warm_{number}" for number in range(requests)]
    first = SchedulerOutput.make_empty()
    first.scheduled_new_reqs = [
        NewRequestData(
            req_id=name,
            prompt_token_ids=list(range(PROMPT_TOKENS)),
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=3),
            pooling_params=None,
            block_ids=tuple([next(ids) for _ in range(count)] for count in counts),
            num_computed_tokens=0,
            lora_request=None,
        )
        for name in names
    ]
    _step(worker, first, dict.fromkeys(names, PROMPT_TOKENS))
    for batch in (names, names[:1]):
        following = SchedulerOutput.make_empty()
        data = CachedRequestData.make_empty()
        done = [runner.requests[name].num_tokens - 1 for name in batch]
        data.req_ids, data.num_computed_tokens = list(batch), done
        data.num_output_tokens = [tokens - PROMPT_TOKENS + 1 for tokens in done]
        data.new_block_ids = [None] * len(batch)
        following.scheduled_cached_reqs = data
        _step(worker, following, dict.fromkeys(batch, 1))


def _step(worker: Any, output: SchedulerOutput, tokens: dict[str, int]) -> None:
    output.num_scheduled_tokens = tokens
    output.total_num_scheduled_tokens = sum(tokens.values())
    if worker.execute_model(output) is None:
        worker.sample_tokens(None)


def give_back(memory: Any) -> None:
    """Let the kernel have the pages of a tensor's storage; they read as zeros, and come back when they are written.

    They come back as huge ones, where there are any: by faults of 4 KiB a new rank's KV takes several times as long to
    be written, and a killed rank 0.1 s longer for each GiB to have ended, which is how its loss is noticed.
    """
    storage = memory.untyped_storage()
    page = mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if end <= start:
        return
    if _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)  # a kernel may have none
