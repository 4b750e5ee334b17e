"""vLLM's real scheduler over an executor that is a few lines: blocks hold token ids, so that wrong KV is a wrong token.

The engine core's loop is that of EngineCore.step_with_batch_queue, with `depth` steps in flight. What the scheduler
tells the coordinator is mirrored: a block that is told as sealed must hold the same tokens until it is dropped.
"""

import random
from collections import deque
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from services.vllm.executor import LOST
from services.vllm.link import Loss, link_of
from services.vllm.scheduler import GhostAsyncScheduler, GhostScheduler
from shared.messages import Message, PagesDropped, PagesPinned, PagesSealed, PinPages
from shared.types import PageKey, unpack_ids

BLOCK = 32
GARBAGE = -1


def sampled(tokens: list[int], drawn: int) -> int:
    """The token that follows these, where the request's generator was drawn from so often before."""
    return random.Random(hash((drawn, *tokens))).randrange(5, 500)


def expected(prompt: list[int], count: int) -> list[int]:
    """What a request is answered without a fault."""
    tokens = list(prompt)
    for drawn in range(count):
        tokens.append(sampled(tokens, drawn))
    return tokens[len(prompt) :]


class Worker:
    """All ranks as one. `blocks`: the token ids whose KV a block holds; `windows`: what each KV cache group reads."""

    def __init__(self, blocks: int, windows: list[int]):
        self.blocks = [[GARBAGE] * BLOCK for _ in range(blocks)]
        self.windows = windows
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, list[list[int]]] = {}
        self.drawn: dict[str, int] = {}

    def wipe(self) -> None:
        self.drawn.clear()
        self.tokens.clear()
        self.tables.clear()

    def step(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Raises AssertionError where a request's KV is not that of its tokens."""
        for ended in output.finished_req_ids:
            self.tokens.pop(ended, None)
            self.tables.pop(ended, None)
        for known in output.ghost_known:
            self.tokens[known.request.req_id] = [*known.request.prompt_token_ids, *known.output_token_ids]
            self.drawn[known.request.req_id] = int(known.draw or b"0")
        starts: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self.tokens[new.req_id], self.tables[new.req_id] = (
                list(new.prompt_token_ids),
                list(map(list, new.block_ids)),
            )
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for number, request in enumerate(cached.req_ids):
            starts[request] = cached.num_computed_tokens[number]
            blocks = cached.new_block_ids[number]
            if request in cached.resumed_req_ids:
                self.tables[request] = list(map(list, blocks))
            elif blocks is not None:
                for table, more in zip(self.tables[request], blocks, strict=True):
                    table += more
        made = [self._compute(each, starts[each], count) for each, count in output.num_scheduled_tokens.items()]
        done = ModelRunnerOutput(
            req_ids=list(output.num_scheduled_tokens),
            req_id_to_index={each: number for number, each in enumerate(output.num_scheduled_tokens)},
            sampled_token_ids=made,
        )
        done.ghost_draws = {each: b"%d" % self.drawn.get(each, 0) for each in output.num_scheduled_tokens}
        return done

    def _compute(self, request: str, start: int, count: int) -> list[int]:
        tokens = self.tokens[request]
        for table, window in zip(self.tables[request], self.windows, strict=True):
            first = max(0, start - window + 1)
            there = [self.blocks[table[at // BLOCK]][at % BLOCK] for at in range(first, start)]
            assert there == tokens[first:start], f"{request}: wrong KV before token {start}"
            for at in range(start, start + count):
                self.blocks[table[at // BLOCK]][at % BLOCK] = tokens[at]
        if start + count < len(tokens):
            return []
        drawn = self.drawn.get(request, 0)
        self.drawn[request] = drawn + 1
        tokens.append(sampled(tokens, drawn))
        return [tokens[-1]]


class Mirror:
    """The coordinator's view of the blocks."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self.sealed: dict[int, tuple[PageKey, list[int]]] = {}
        self.pinned: set[int] = set()

    def tell(self, message: Message) -> None:
        match message:
            case PagesSealed(pages, keys):
                for block, key in zip(unpack_ids(pages), keys, strict=True):
                    assert key not in [each for each, _ in self.sealed.values()], "a key twice"
                    self.sealed[block] = key, list(self._worker.blocks[block])
                    assert GARBAGE not in self.sealed[block][1], "sealed, but not full"
            case PagesDropped(pages):
                for block in unpack_ids(pages):
                    assert block not in self.pinned, "a pinned block was given away"
                    self.sealed.pop(block, None)
            case PagesPinned(pages):
                self.pinned |= set(unpack_ids(pages))
            case _:
                pass

    def check(self, lost: Collection[int] = ()) -> None:
        for block, (_, tokens) in self.sealed.items():
            assert block in lost or self._worker.blocks[block] == tokens, "a sealed block was written to"


class Core:
    """The engine core's loop, and a decider that loses steps and blocks when it is told to."""

    def __init__(self, model: Path, *, blocks: int = 48, depth: int = 1, budget: int = 128, window: int = 0):
        arguments = EngineArgs(str(model), dtype="float32", max_model_len=1024, block_size=BLOCK, max_num_seqs=8,
                               max_num_batched_tokens=budget, enforce_eager=True)  # fmt: skip
        config = arguments.create_engine_config()
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = depth > 1
        groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=8, dtype="float32"))]
        if window:
            sliding = SlidingWindowSpec(BLOCK, num_kv_heads=1, head_size=8, dtype="float32", sliding_window=window)
            groups.append(KVCacheGroupSpec(["sliding"], sliding))
        self.worker = Worker(blocks, [1024, window][: len(groups)])
        self.mirror = Mirror(self.worker)
        self.link = link_of(config.instance_id)
        self.link.tells(self.mirror.tell)
        self.epoch = 1
        self.link.quiesce(1)
        self.link.resume(1)
        make = GhostAsyncScheduler if depth > 1 else GhostScheduler
        self.scheduler: Any = make(config, KVCacheConfig(blocks, [], groups), StructuredOutputManager(config), BLOCK,
                                   log_stats=True)  # fmt: skip
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._depth = depth
        self._flying: deque[tuple[SchedulerOutput, Any]] = deque()
        self.prompts: dict[str, tuple[list[int], int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.failing: set[str] = set()
        """Requests that make each step fail."""

    def ask(self, name: str, prompt: list[int], count: int) -> None:
        parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        self.prompts[name] = prompt, count
        self.answers[name] = []
        self.scheduler.add_request(
            Request(name, prompt, parameters, None, arrival_time=len(self.prompts), block_hasher=self._hasher)
        )

    def turn(self) -> bool:
        """One turn of the loop; False when there is nothing left to do."""
        if self.scheduler.has_requests() and len(self._flying) < self._depth:
            output = self.scheduler.schedule()
            failed = bool(self.failing & output.num_scheduled_tokens.keys())
            self._flying.append((output, LOST if failed else self.worker.step(output)))
            if failed:
                self.lose((), (), started=False)
            elif len(self._flying) < self._depth and output.total_num_scheduled_tokens:
                return True
        elif not self._flying:
            return False
        output, made = self._flying.popleft()
        for each in self.scheduler.update_from_output(output, made).values():
            for told in each.outputs:
                self.answers[told.request_id] += told.new_token_ids
                if told.finish_reason is not None:
                    self.ended[told.request_id] = str(told.finish_reason)
        self.mirror.check()
        return True

    def run(self) -> None:
        """Until all has ended, with the right tokens, and no block is held."""
        for _ in range(3000):
            if not self.turn():
                break
        for name, (prompt, count) in self.prompts.items():
            if self.ended[name] == "length":
                assert self.answers[name] == expected(prompt, count), f"{name} was answered otherwise"
        pool = self.scheduler.kv_cache_manager.block_pool
        held = self.mirror.pinned | self.scheduler._books.blocks._withheld.keys()
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(held), "blocks leaked"

    # -- the decider -------------------------------------------------------------------------------------------------

    def lose(self, gone: Collection[int], withheld: Collection[int], *, started: bool = True) -> None:
        """All steps in flight are lost, and a rank's blocks but those that are sealed and neither gone nor withheld."""
        self.epoch += 1
        self.link.quiesce(self.epoch)
        if started:  # what is in flight ends as lost, but for an output that is there already
            self._flying = deque((output, LOST) for output, _ in self._flying)
        else:
            self._flying = deque((output, made if made is not LOST else LOST) for output, made in self._flying)
        runs = self.scheduler.stand_still()
        for run in runs:
            sealed = list(takewhile(self.mirror.sealed.__contains__, unpack_ids(run.pages)))
            assert len(sealed) <= run.computed // BLOCK
        self.worker.wipe()
        back = self.mirror.sealed.keys() - set(gone) - set(withheld)
        for block in set(range(len(self.worker.blocks))) - back if started else set():
            self.worker.blocks[block] = [GARBAGE] * BLOCK
        self.mirror.pinned.clear()
        self.withheld = {block: self.mirror.sealed[block] for block in withheld}
        for block in (*gone, *withheld):
            del self.mirror.sealed[block]
        self.scheduler.roll_back(Loss(self.epoch, True, list(gone), list(withheld), self.epoch))
        self.link.resume(self.epoch)

    def whole(self, blocks: Collection[int]) -> None:
        """Withheld blocks are decoded, if nobody has them meanwhile."""
        for block in blocks:
            if block in self.scheduler._books.blocks._withheld:
                self.worker.blocks[block] = list(self.withheld[block][1])
                self.mirror.sealed[block] = self.withheld[block]
                self.scheduler.back([block], whole=True)

    def pin(self, blocks: Collection[int]) -> None:
        """Have blocks pinned, as the coordinator does to encode them."""
        wanted = PinPages(b"", tuple(self.mirror.sealed[block][0] for block in blocks))
        self.scheduler.pin(list(blocks), wanted.keys)

    def unpin(self) -> None:
        """Let all pinned blocks go."""
        self.scheduler.unpin(list(self.mirror.pinned))
        self.mirror.pinned.clear()
