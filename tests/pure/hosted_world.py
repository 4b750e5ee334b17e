"""The simulated cluster of `world`, with an engine that schedules by itself and dials the coordinator as a host.

The engine's blocks, prefix cache and requests are a few lines; what it says and hears are the real messages. KV is
modelled by token ids, as in `world`, so that a stale or missing block shows as a wrong token.
"""

import hashlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from services.coordinator.events import Event, Said
from services.coordinator.hosted.engine import HostedEngine
from services.coordinator.protection.ledger import Ledger
from shared.messages import (
    Claim,
    EngineHello,
    EngineReady,
    EngineRun,
    EngineRuns,
    GivenUp,
    Goodbye,
    Message,
    PagesDropped,
    PagesGone,
    PagesPinned,
    PagesSealed,
    PagesWhole,
    PinPages,
    Place,
    Quiesce,
    RestorePlan,
    Resume,
    RunsRecomputed,
    UnpinPages,
    WorkerReady,
)
from shared.types import PageKey, pack_ids, unpack_ids
from tests.pure.plans import Planned
from tests.pure.world import MODEL, SimWorker, Wire, World, next_token

STEP_TOKENS = 6


def key_of(tokens: list[int], group: int = 0) -> PageKey:
    """As vLLM makes them: a hash of all tokens, and the KV cache group."""
    return hashlib.sha256(pack_ids(tokens)).digest()[:28] + group.to_bytes(4, "little")


@dataclass
class SimRequest:
    number: int
    tokens: list[int]
    goal: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    had: int = 0
    """Tokens with KV when the engine was quiesced, until it has them again."""


class SimEngine:
    """One process of an engine: `free` blocks, `cached` ones by key, requests that hold others."""

    def __init__(self, world: "HostedWorld", name: str, workers: list[str], *, alike: bool):
        self.world, self.name, self.workers, self.alike = world, name, workers, alike
        self.size = world.page_tokens
        self.wire: Wire | None = None
        self.out: deque[Message] = deque()
        self.requests: list[SimRequest] = []
        self.quiesced = True
        self.paused = False
        self.doubtful = False  # a worker was changed, and it is not told yet which pages are whole
        self.epoch = 0
        self.holders = [0] * world.pages
        self.free: deque[int] = deque(range(world.pages))
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.keys: dict[int, PageKey] = {}
        self.by_key: dict[PageKey, int] = {}
        self.pins: dict[int, int] = {}
        self.withheld: dict[int, PageKey] = {}
        self.numbers = 0
        self.made = 0
        self.given_up: set[str] = set()

    # -- what it says and hears --------------------------------------------------------------------------------------

    def ready(self) -> None:
        """It has dialled: all that it has is told once more."""
        self.out.clear()
        for block in list(self.keys) if self.doubtful else ():
            self.forget(block)
        alive = tuple(name if name in self.world.workers else "" for name in self.workers)
        self.out.append(
            EngineReady(MODEL, self.world.pages, self.size, STEP_TOKENS, alive, self.alike, self.world.moves)
        )
        self.out.extend(PagesSealed.parts(self.keys))

    def receive(self, message: Message) -> None:
        match message:
            case Quiesce(epoch):
                self.quiesced = True
                for request in self.requests:
                    request.had = max(request.had, request.computed)
                self.out.extend(EngineRuns.parts(epoch, [*map(self._run, self.requests)]))
            case Place(epoch, workers):
                self.doubtful = self.doubtful or self.workers != list(workers)
                self.epoch, self.workers = epoch, list(workers)
            case Resume(epoch, gone, withheld):
                self._resume(unpack_ids(gone), unpack_ids(withheld))
            case PinPages(pages, keys):
                named = zip(unpack_ids(pages), keys, strict=True)
                here = [page for page, key in named if key in (self.keys.get(page), self.withheld.get(page))]
                for page in here:
                    self.pins[page] = self.pins.get(page, 0) + 1
                    self.hold(page)
                self.out.append(PagesPinned(pack_ids(here)))
            case UnpinPages(pages):
                for page in unpack_ids(pages):
                    self.unpin(page)
            case PagesWhole(_, pages):
                for page in unpack_ids(pages):
                    if (key := self.withheld.pop(page, None)) is not None:
                        if key not in self.by_key:
                            self.keys[page], self.by_key[key] = key, page
                        else:
                            self.out.append(PagesDropped(pack_ids([page])))
                        self.release(page)
            case PagesGone(_, pages):
                for page in unpack_ids(pages):
                    if self.withheld.pop(page, None) is not None:
                        self.release(page)

    def _run(self, request: SimRequest) -> EngineRun:
        return EngineRun(request.number, str(request.number), pack_ids(request.blocks), request.computed)

    def _resume(self, gone: list[int], withheld: list[int]) -> None:
        for block in list(self.pins):
            self.unpin(block)
        for block in gone:
            self.forget(block)
        for request in self.requests:  # all are preempted, and come back by what the cache has
            for block in reversed(request.blocks):
                self.release(block)
            request.blocks, request.computed = [], 0
        for block in set(self.withheld) - set(withheld):
            del self.withheld[block]
            self.release(block)
        for block in set(withheld) - set(self.withheld):
            if block in self.keys:
                self.withheld[block] = self.keys.pop(block)
                del self.by_key[self.withheld[block]]
                self.hold(block)
        for request in self.requests:
            self._match(request)
        self.quiesced = self.doubtful = False

    # -- blocks ------------------------------------------------------------------------------------------------------

    def hold(self, block: int) -> None:
        self.holders[block] += 1
        self.idle.pop(block, None)
        if self.holders[block] == 1 and block in self.free:
            self.free.remove(block)

    def release(self, block: int) -> None:
        self.holders[block] -= 1
        assert self.holders[block] >= 0
        if not self.holders[block]:
            if block in self.keys:
                self.idle[block] = None
            else:
                self.free.append(block)

    def unpin(self, block: int) -> None:
        for _ in range(self.pins.pop(block, 0)):
            self.release(block)

    def forget(self, block: int) -> None:
        """Its key does not count any more."""
        if (key := self.keys.pop(block, None)) is not None:
            del self.by_key[key]
            if block in self.idle:
                del self.idle[block]
                self.free.append(block)

    def allocate(self) -> int | None:
        if not self.free and self.idle:
            block = next(iter(self.idle))
            self.forget(block)
            self.out.append(PagesDropped(pack_ids([block])))
        if not self.free and (unpinned := self.withheld.keys() - self.pins):
            block = self.world.dice.choice(sorted(unpinned))
            del self.withheld[block]
            self.out.append(PagesDropped(pack_ids([block])))
            self.release(block)
        if not self.free:
            return None
        block = self.free[0]
        self.hold(block)
        return block

    def _match(self, request: SimRequest) -> None:
        while (end := (len(request.blocks) + 1) * self.size) < len(request.tokens):
            block = self.by_key.get(key_of(request.tokens[:end]))
            if block is None:
                return
            self.hold(block)
            request.blocks.append(block)
            request.computed = end

    # -- steps -------------------------------------------------------------------------------------------------------

    def submit(self, prompt: list[int], new: int) -> None:
        self.numbers += 1
        request = SimRequest(self.numbers, list(prompt), len(prompt) + new)
        self.requests.append(request)
        if not self.quiesced:
            self._match(request)

    @property
    def can_step(self) -> bool:
        ranks = [self.world.workers.get(name) for name in self.workers]
        return not self.quiesced and not self.paused and bool(self.requests) and None not in ranks

    def step(self, *, lost: bool = False) -> None:
        """A step of one request. A `lost` one writes on some ranks, and what it touched is dropped."""
        request = self.world.dice.choice(self.requests)
        end = min(len(request.tokens), request.computed + STEP_TOKENS)
        while len(request.blocks) * self.size < end:
            block = self.allocate()
            if block is None:  # it waits for room, and gives its own to others
                for each in reversed(request.blocks):
                    self.release(each)
                request.blocks, request.computed = [], 0
                return
            request.blocks.append(block)
        ranks = [self.world.workers[name] for name in self.workers if name in self.world.workers]
        first = request.computed // self.size
        touched = request.blocks[first : -(-end // self.size)]
        for worker in self.world.dice.sample(ranks, self.world.dice.randrange(len(ranks) + 1)) if lost else ranks:
            self.world.write(worker, request.blocks, request.computed, request.tokens[request.computed : end])
        if lost:
            self.out.append(PagesDropped(pack_ids(touched)))
            return
        request.computed = end
        for worker in ranks:
            seen = self.world.read(worker, request.blocks, end)
            assert seen == request.tokens[:end], f"{worker.name} computes over KV that is not there"
        self._seal(request)
        self._told_recomputed(request)
        if end == len(request.tokens):
            request.tokens.append(next_token(tuple(request.tokens)))
            self.made += 1
        if len(request.tokens) > request.goal:
            self.end(request)

    def _seal(self, request: SimRequest) -> None:
        for index in range(request.computed // self.size):
            block, key = request.blocks[index], key_of(request.tokens[: (index + 1) * self.size])
            if block not in self.keys and key not in self.by_key and key not in self.withheld.values():
                self.keys[block], self.by_key[key] = key, block
                self.out.append(PagesSealed(pack_ids([block]), (key,)))

    def _told_recomputed(self, request: SimRequest) -> None:
        if request.had and request.computed >= request.had:
            request.had = 0
            self.out.append(RunsRecomputed(self.epoch, pack_ids([request.number])))

    def end(self, request: SimRequest) -> None:
        self.requests.remove(request)
        for block in reversed(request.blocks):
            self.release(block)
        request.computed, request.had = request.had, request.had
        self._told_recomputed(request)

    def check(self) -> None:
        """Every block is free, idle, or held, and in one of them."""
        for block in range(self.world.pages):
            places = (block in self.free) + (block in self.idle) + (self.holders[block] > 0)
            assert places == 1, f"block {block} is in {places} sets"


class HostedWorld(World):
    """`engine_process` beside workers and a store; the gateway only watches."""

    def __init__(self, seed: int, *, alike: bool = False, **more: Any):
        self.engine_process: SimEngine | None = None
        self.alike, self.moves = alike, True
        super().__init__(seed, engine="hosted", **more)

    # -- the parts ---------------------------------------------------------------------------------------------------

    @property
    def hosted(self) -> HostedEngine:
        assert isinstance(self.group.engine, HostedEngine)
        return self.group.engine

    @property
    def ledger(self) -> Ledger:
        return self.hosted.protection.ledger

    def start_engine(self) -> SimEngine:
        """An engine begins, with its ranks and one spare, none of which has anything yet."""
        name = f"engine{next(self._names)}"
        workers = [f"{name}.{rank}" for rank in range(self.size)]
        self.engine_process = SimEngine(self, name, workers, alike=self.alike)
        for rank, worker in enumerate(workers):
            self._start(worker, rank)
        self.add_spare()
        self._engine_dials()
        return self.engine_process

    def add_spare(self) -> None:
        assert self.engine_process is not None
        self._start(f"{self.engine_process.name}.spare{next(self._names)}", None)

    def _start(self, name: str, rank: int | None) -> None:
        worker = self.workers[name] = SimWorker(name)
        worker.first_rank = rank
        self._worker_dials(worker)

    def claim_of(self, worker: SimWorker) -> Claim | None:
        if worker.assign is not None:
            return Claim(worker.assign.epoch, worker.assign.rank, b"", ())
        return None if worker.first_rank is None else Claim(0, worker.first_rank, b"", ())

    def _ready_of(self, worker: SimWorker) -> WorkerReady:
        return WorkerReady(MODEL, self.pages, worker.name, self.claim_of(worker))

    def _engine_dials(self) -> None:
        engine = self.engine_process
        assert engine is not None
        engine.wire = self._connects(EngineHello(engine.name, "host", 1, "simulated"))
        engine.ready()

    # -- what can happen ---------------------------------------------------------------------------------------------

    def kill(self, worker: SimWorker) -> None:
        """With a step in flight, which has done its part on some ranks."""
        engine = self.engine_process
        in_step = engine is not None and engine.can_step and worker.name in engine.workers and self.dice.random() < 0.8
        super().kill(worker)
        if in_step and engine is not None:
            engine.step(lost=True)

    def crash(self) -> None:
        if self.engine_process is not None:
            self.engine_process.wire = None
        super().crash()

    def cut_engine(self) -> None:
        """The engine's channel breaks, though both ends live."""
        engine = self.engine_process
        if engine is not None and engine.wire is not None:
            wire, engine.wire = engine.wire, None
            self._breaks(wire, "cut off")

    def more_moves(self) -> list[tuple[str, Any]]:
        engine = self.engine_process
        if engine is None:
            return []
        if engine.wire is None:
            return [("engine dials", engine)] + [("engine steps", engine)] * engine.can_step
        moves: list[tuple[str, Any]] = []
        if engine.wire.sent:
            moves.append(("engine hears", engine))
        if engine.out:
            moves.append(("engine says", engine))
        if engine.can_step:
            moves.append(("engine steps", engine))
        return moves

    def make_move(self, kind: str, engine: SimEngine) -> None:
        if kind == "engine dials":
            self._engine_dials()
        elif kind == "engine steps":
            engine.step()
        elif kind == "engine says":
            assert engine.wire is not None
            self.handle(Said(engine.wire.peer, engine.out.popleft()))
        else:
            assert engine.wire is not None
            message = engine.wire.sent.popleft()
            engine.receive(message)
            if isinstance(message, GivenUp):
                engine.given_up.update(message.workers)
                for worker in [self.workers[name] for name in message.workers if name in self.workers]:
                    self.kill(worker)
            if isinstance(message, Place):
                for worker in [each for each in self.workers.values() if each.assign is not None]:
                    if worker.name not in message.workers:
                        self.kill(worker)

    def _receive(self, worker: SimWorker, message: Message) -> None:
        if isinstance(message, Goodbye):  # its process ends
            self.kill(worker)
        else:
            super()._receive(worker, message)

    def _rebuild(self, stripe: Planned, plan: RestorePlan, by_rank: dict[int, SimWorker], rank: int) -> bool:
        """Where ranks hold the same, it is copied from any that has it."""
        if not self.alike:
            return super()._rebuild(stripe, plan, by_rank, rank)
        assert not stripe.shards
        source = self.dice.choice(sorted(by_rank.keys() - set(stripe.lost)))
        self._put(by_rank[rank], stripe.page, self._slice(by_rank[source], stripe.page, tail=False), tail=False)
        self.restored += 1
        return True

    def handle(self, event: Event) -> None:
        super().handle(event)
        self.group.check()
