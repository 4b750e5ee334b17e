"""Which blocks vLLM's scheduler has given to whom, and how far they are filled, as GhostServe's coordinator is told it.

All is called under the scheduler's lock.
"""

import itertools
from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput

from services.vllm.blocks import Blocks
from shared.messages import EngineRun, Message, RunsRecomputed
from shared.types import pack_ids


class Books:
    """Kept step by step, beside the scheduler. `tell` sends to the coordinator."""

    def __init__(self, scheduler: Any, tell: Callable[[Message], None]):
        self._scheduler = scheduler
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._tell = tell
        self.blocks = Blocks(scheduler.kv_cache_manager.block_pool, tell)
        self._computed: dict[str, int] = {}
        """Request -> tokens whose KV is there, by steps that came back."""
        self._told: dict[tuple[str, int], int] = {}
        """Request and KV cache group -> its first blocks that were looked at when they were full."""
        self._unnamed: list[KVCacheBlock] = []
        """Full blocks that the prefix cache has no hash for yet: a token of theirs is still on its way."""
        self._written: dict[int, set[int]] = {}
        """Step in flight -> the blocks that it writes to."""
        self._had: dict[str, tuple[int, int]] = {}
        """Request that was cut short -> the number of its first run, and the tokens that it had."""
        self._numbers = itertools.count(1)
        self._hosted_epoch = 0

    # -- steps -------------------------------------------------------------------------------------------------------

    def scheduled(self, step: int, output: SchedulerOutput) -> dict[str, int]:
        """A step is about to be sent. Returns how far each of its requests will be."""
        for request_id in output.preempted_req_ids or ():
            self.forget(request_id)
        cached = output.scheduled_cached_reqs
        news = [new.block_ids for new in output.scheduled_new_reqs] + [each for each in cached.new_block_ids if each]
        ends: dict[str, int] = {}
        written: set[int] = set()
        for request_id, count in output.num_scheduled_tokens.items():
            end = ends[request_id] = self._scheduler.requests[request_id].num_computed_tokens
            for manager in self._managers:
                first, last = (end - count) // manager.block_size, -(-end // manager.block_size)
                table = manager.req_to_blocks.get(request_id, [])
                written.update(block.block_id for block in table[first:last] if not block.is_null)
        self.blocks.handed_out((block for groups in news for blocks in groups for block in blocks), written)
        self._written[step] = written
        return ends

    def came_back(self, step: int, ends: dict[str, int]) -> None:
        """A step's KV is there; called before its requests' blocks are given back."""
        self._written.pop(step, None)
        for request_id, end in ends.items():
            if request_id not in self._scheduler.requests:
                continue
            self._computed[request_id] = max(end, self._computed.get(request_id, 0))
            for group, manager in enumerate(self._managers):
                table, full = manager.req_to_blocks.get(request_id, []), end // manager.block_size
                self._unnamed += table[self._told.get((request_id, group), 0) : full]
                self._told[request_id, group] = full

    def processed(self, ends: dict[str, int]) -> None:
        """The step's output was taken: what it filled has its name now, and what has ended is forgotten."""
        named = [block for block in self._unnamed if block.block_hash is not None]
        self._unnamed = [block for block in self._unnamed if block.block_hash is None and block.ref_cnt]
        self.blocks.filled(named)
        for request_id in ends:
            if request_id not in self._scheduler.requests:
                self.forget(request_id, ended=True)
        self._tell_recomputed()

    def forget(self, request_id: str, *, ended: bool = False) -> None:
        """Its blocks are given back."""
        self._computed.pop(request_id, None)
        for group in range(len(self._managers)):
            self._told.pop((request_id, group), None)
        if ended and request_id in self._had:
            number, _ = self._had[request_id]
            self._had[request_id] = number, 0

    def _tell_recomputed(self) -> None:
        there = [each for each, (_, goal) in self._had.items() if self._computed.get(each, 0) >= goal]
        if there:
            firsts = [self._had.pop(each)[0] for each in there]
            numbers = pack_ids(first + group for first in firsts for group in range(len(self._managers)))
            self._tell(RunsRecomputed(self._hosted_epoch, numbers))

    # -- a loss ------------------------------------------------------------------------------------------------------

    def stand_still(self) -> tuple[EngineRun, ...]:
        """No step is in flight any more: what lost ones may have written is forgotten. Returns all running requests."""
        self.blocks.touched(block for written in self._written.values() for block in written)
        self._written.clear()
        self._unnamed.clear()
        runs = []
        for request in self._scheduler.running:
            computed = max(self._computed.get(request.request_id, 0), self._had.get(request.request_id, (0, 0))[1])
            if not computed:
                continue
            number = next(self._numbers)
            for _ in self._managers[1:]:
                next(self._numbers)
            self._had[request.request_id] = number, computed
            for group, manager in enumerate(self._managers):
                blocks = manager.req_to_blocks.get(request.request_id, [])
                table = [block.block_id for block in blocks if not block.is_null]
                there = computed - (len(blocks) - len(table)) * manager.block_size  # less what left a sliding window
                runs.append(EngineRun(number + group, request.request_id, pack_ids(table), there))
        return tuple(runs)

    def resumed(self, hosted_epoch: int) -> None:
        """All requests wait, and come back by what the prefix cache has."""
        self._hosted_epoch = hosted_epoch
        self._computed.clear()
        self._told.clear()
        self._written.clear()
        self._unnamed.clear()
        self._tell_recomputed()
