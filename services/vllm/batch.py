"""What a worker's model runner knows of requests: wiped after a loss, and for V1 made known again by the scheduler."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


@dataclass(frozen=True, slots=True)
class Known:
    """A request that was scheduled before: what a rank that knows nothing of it needs. Filled by the scheduler."""

    request: NewRequestData
    output_token_ids: list[int]
    draw: bytes
    """The state of its generator; empty if it has none."""


def wipe(runner: Any) -> None:
    """Empty the batch and forget every request, as a runner that was only just made."""
    runner.execute_model_state = None
    if hasattr(runner, "req_states"):  # V2, which is sent requests that resume as if they were new
        for request_id in list(runner.req_states.req_id_to_index):
            runner._remove_request(request_id)
        return
    runner.kv_connector_output = None
    for request_id in list(runner.input_batch.req_id_to_index):
        runner.input_batch.remove_request(request_id)
    runner.input_batch.condense()
    runner.input_batch.refresh_metadata()
    runner.input_batch.req_prompt_embeds.clear()
    runner.requests.clear()
    runner.num_prompt_logprobs.clear()


def make_known(runner: Any, known: Sequence[Known]) -> None:
    """Give the runner requests as if it had run them itself; the step that follows resumes them with its own blocks."""
    if not known:
        return
    news = SchedulerOutput.make_empty()
    news.scheduled_new_reqs = [each.request for each in known]
    news.num_scheduled_tokens = {each.request.req_id: 1 for each in known}
    runner._update_states(news)
    for each in known:
        state = runner.requests[each.request.req_id]
        state.output_token_ids = list(each.output_token_ids)
        if each.output_token_ids:
            runner.num_prompt_logprobs.pop(each.request.req_id, None)  # told with its first token
        if state.generator is not None and each.draw:
            state.generator.set_state(torch.frombuffer(bytearray(each.draw), dtype=torch.uint8))
        runner.input_batch.remove_request(each.request.req_id)  # added again by the step, with its output tokens


@contextmanager
def no_draws_for_partial_prompts(runner: Any) -> Iterator[None]:
    """Whose prompt is not whole yet does not draw: vLLM would take the draw back, which a CPU's generator can't."""
    generators, partial = runner.input_batch.generators, runner.discard_request_mask.np
    kept = {row: generators.pop(row) for row in list(generators) if partial[row]}
    try:
        yield
    finally:
        generators.update(kept)


def draws(runner: Any) -> dict[str, bytes]:
    """The states of the generators of those requests in the batch that have a seed."""
    batch = runner.input_batch
    return {batch.req_ids[row]: each.get_state().numpy().tobytes() for row, each in batch.generators.items()}
