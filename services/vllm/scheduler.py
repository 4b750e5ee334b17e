"""vLLM's scheduler, which goes back to before a lost step. Named to vLLM by --scheduler-cls."""

import logging
import os
import threading
import time
from collections.abc import Collection
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from services.vllm.batch import Known
from services.vllm.books import Books
from services.vllm.executor import LostStep
from services.vllm.link import Loss, link_of
from services.vllm.step_times import StepTimes
from shared.messages import EngineLoad, EngineRun
from shared.suspects import Suspects
from shared.types import PageKey

log = logging.getLogger("vllm.ghostserve")


class _Resuming(Scheduler):
    """What both of vLLM's schedulers get: after a loss all requests wait again, and come back by prefix hits."""

    running: list[Request]
    waiting: RequestQueue

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        self._link = link_of(vllm_config.instance_id)
        self._epoch = self._link.wait_open()
        self._step = 0
        self._unknown: set[str] = set()
        """Requests that no worker knows any more, though it was told of them once."""
        self._draws: dict[str, bytes] = {}
        """Request with a seed -> its generator's state after the last token that counts."""
        self._prompt_tokens = self._generated_tokens = 0
        self._guard = threading.RLock()
        """Held while requests or blocks change hands: the coordinator's word comes on another thread."""
        self._books = Books(self, self._link.tell)
        self._times = StepTimes()
        self._suspects = Suspects(max(1, int(os.environ.get("GHOST_STEP_TRIES", "2"))))
        self._others_wait = True
        self._link.attach(self)

    # -- what vLLM's engine core calls -------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM's; what the workers must be told of an earlier loss travels with the step."""
        while True:
            self._link.wait_open()
            with self._guard:
                if self._link.epoch == self._epoch:  # or it ended just now
                    return self._schedule(throttle_prefills)

    def _schedule(self, throttle_prefills: bool) -> SchedulerOutput:
        self._books.blocks.make_room()
        output = self._schedule_apart(throttle_prefills)
        self._step += 1
        self._suspects.sent(self._step, output.num_scheduled_tokens)
        output.ghost_epoch, output.ghost_step = self._epoch, self._step
        output.ghost_known = self._make_known(output)
        output.ghost_ends = self._books.scheduled(self._step, output)
        self._times.sent(self._step, output.num_scheduled_tokens, output.ghost_ends)
        return output

    def _schedule_apart(self, throttle_prefills: bool) -> SchedulerOutput:
        """A suspect of making steps fail runs alone, or, where it can't run yet, waits while all others do."""
        suspect = self.requests.get(self._suspects.next(self.requests) or "")
        if suspect is None:
            return super().schedule(throttle_prefills)
        running, waiting = self.running, self.waiting
        chosen = [each for each in (*running, *waiting) if (each is suspect) == self._others_wait]
        self.running = [each for each in running if each in chosen]
        self.waiting = create_request_queue(self.policy)
        for each in [each for each in waiting if each in chosen]:
            waiting.remove_request(each)
            self.waiting.add_request(each)
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self.running += [each for each in running if each not in chosen]
            waiting.prepend_requests(self.waiting)
            self.waiting = waiting
        self._others_wait = not self._others_wait or output.total_num_scheduled_tokens > 0
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """As vLLM's; the output of a lost step gives back what its scheduling took."""
        lost = isinstance(model_runner_output, LostStep)
        if lost:
            model_runner_output = EMPTY_MODEL_RUNNER_OUTPUT
        step, epoch, ends = scheduler_output.ghost_step, scheduler_output.ghost_epoch, scheduler_output.ghost_ends
        with self._guard:
            if not lost and epoch == self._epoch:  # else its tokens were taken back
                self._suspects.came_back(step)
                self._times.came_back(step)
                self._count(scheduler_output.total_num_scheduled_tokens, model_runner_output)
                self._draws |= getattr(model_runner_output, "ghost_draws", {})
            if lost or epoch != self._link.epoch:  # its KV may be lost by now, though its tokens count
                ends = {}
            else:
                self._books.came_back(step, ends)
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            self._books.processed(ends)
            if self._draws:
                self._draws = {each: state for each, state in self._draws.items() if each in self.requests}
            return outputs

    def add_request(self, request: Any) -> None:
        """As vLLM's."""
        with self._guard:
            super().add_request(request)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> Any:
        """As vLLM's."""
        with self._guard:
            ended = super().finish_requests(request_ids, finished_status)
            for request in ended:
                self._books.forget(request.request_id, ended=True)
            return ended

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As vLLM's."""
        with self._guard:
            done = super().reset_prefix_cache(*args, **kwargs)
            self._books.blocks.reset()
            return bool(done)

    # -- what the decider asks, on its own thread --------------------------------------------------------------------

    def stand_still(self) -> tuple[EngineRun, ...]:
        """See HostedScheduler."""
        with self._guard:
            return self._books.stand_still()

    def tell_all(self, *, whole: bool) -> None:
        """See HostedScheduler."""
        with self._guard:
            if not whole:
                self._books.blocks.forget_all()
            self._books.blocks.tell_all()

    def pin(self, blocks: Collection[int], keys: Collection[PageKey]) -> None:
        """See HostedScheduler."""
        with self._guard:
            self._books.blocks.pin(blocks, keys)

    def unpin(self, blocks: Collection[int]) -> None:
        """See HostedScheduler."""
        with self._guard:
            self._books.blocks.unpin(blocks)

    def back(self, blocks: Collection[int], *, whole: bool) -> None:
        """See HostedScheduler."""
        with self._guard:
            if whole:
                self._books.blocks.whole(blocks)
            else:
                self._books.blocks.gone(blocks)

    def load(self) -> EngineLoad:
        """See HostedScheduler."""
        with self._guard:
            in_use, cached = self._books.blocks.in_use()
            tokens = self._prompt_tokens, self._generated_tokens
            return EngineLoad(len(self.running), len(self.waiting), in_use, cached, *tokens, 0, self._times.take())

    def _count(self, computed: int, output: ModelRunnerOutput) -> None:
        """What a step computed, for the load: tokens that it drew, and the others, which are of prompts."""
        drawn = sum(map(len, output.sampled_token_ids))
        self._generated_tokens += drawn
        self._prompt_tokens += computed - drawn

    # -- a loss ------------------------------------------------------------------------------------------------------

    def roll_back(self, loss: Loss) -> None:
        """See HostedScheduler."""
        with self._guard:
            self._epoch = loss.epoch
            self._roll_back(loss)

    def _roll_back(self, loss: Loss) -> None:
        """All that runs waits again, with what is known of its tokens; only blocks that are whole can be hit."""
        if (blamed := self._suspects.lost()) is not None and blamed[0] in self.requests:
            log.error("request %s: a step failed %d times, at last with it alone: it ends with an error", *blamed)
            self.grammar_compile_error_reqs.add(blamed[0])  # update_from_output ends these, and tells their clients
        self._times.lost()
        blocks = self._books.blocks
        if not loss.kept:
            blocks.forget_all()
        blocks.resume(loss.gone, loss.withheld)
        named = {block.block_id for block in self.kv_cache_manager.block_pool.blocks if block.block_hash is not None}
        self.kv_cache_manager.evict_blocks(named - blocks.sealed.keys())
        for request in self.requests.values():
            if request.status == RequestStatus.PREEMPTED and request.num_stale_output_tokens > 0:
                request.drop_stale_output = True
        now = time.monotonic()
        while self.running:
            self._preempt_request(self.running.pop(), now, drop_stale_output=True)
        self.prev_step_scheduled_req_ids.clear()
        self._books.resumed(loss.hosted_epoch)
        self._unknown = {
            request.request_id for request in self.requests.values() if request.status == RequestStatus.PREEMPTED
        }

    def _make_known(self, output: SchedulerOutput) -> list[Known]:
        """What workers need of requests that this step resumes and that they have forgotten."""
        if not self._unknown or self.use_v2_model_runner:  # V2 is sent resumed requests whole
            return []
        known = []
        resumed = output.scheduled_cached_reqs
        for request_id, blocks in zip(resumed.req_ids, resumed.new_block_ids, strict=True):
            if request_id in self._unknown:
                self._unknown.discard(request_id)
                request = self.requests[request_id]
                data = NewRequestData.from_request(request, blocks, uses_mrope=self.model_uses_mrope)
                known.append(Known(data, list(request.output_token_ids), self._draws.get(request_id, b"")))
        self._unknown &= self.requests.keys()
        return known


class GhostScheduler(_Resuming):
    """For engines that schedule a step after the other."""


class GhostAsyncScheduler(_Resuming, AsyncScheduler):
    """For engines that schedule the next step while one is in flight."""
