"""A coordinator's core among peers that answer at once: what its own part of a step costs, whatever a model would take.

Ranks, stores and Redis are a few lines each. Frames are encoded and decoded as the shell does, which is part of a
step's cost; what the peers do is not counted.
"""

import random
import time
from collections import deque

from services.coordinator.app import group_config
from services.coordinator.events import (
    Answer,
    Answered,
    Ask,
    Came,
    EpochIs,
    Event,
    FindStripes,
    Hello,
    Peer,
    Question,
    Said,
    Send,
    StripesFound,
    Tick,
)
from services.coordinator.group import Group
from services.coordinator.recording.segments import encode as encode_effect
from services.coordinator.scheduling.engine import EmbeddedEngine
from shared import wire
from shared.config import CoordinatorSettings
from shared.messages import (
    Assign,
    GatewayHello,
    Join,
    Joined,
    Message,
    ProtectDone,
    ProtectPlan,
    Rendezvous,
    StepDone,
    StepPlan,
    StoreHello,
    Submit,
    WorkerHello,
    WorkerReady,
)
from shared.types import GenerationRequest, ModelInfo, SamplingParams, StoreInfo, encoding_rank, pack_ids, unpack_ids

SIZE = 2
VOCABULARY = 32_000
PAGE_TOKENS = 16
TOKEN = 11


class Scaled:
    """The core, with `pages` pages to give. `step` lets one step pass and returns the CPU seconds that it took."""

    def __init__(self, pages: int, *, streams: int, step_tokens: int, positions: int = 1 << 21):
        self.settings = CoordinatorSettings(
            tp=SIZE, max_batch=streams, max_waiting=1 << 20, max_step_tokens=step_tokens, page_tokens=PAGE_TOKENS,
            heartbeat_s=3600, heartbeat_timeout_s=3600,
        )  # fmt: skip
        model = ModelInfo("/nowhere", "fingerprint", "Sim", "float32", VOCABULARY, positions, 2, 6, 4, (2,), 10_000_000)
        self.now = 100.0
        self.spent_s = 0.0
        self.sent_bytes = self.received_bytes = 0
        self.group = Group(group_config(self.settings), self.settings, 0, self.now)
        self._ranks: dict[Peer, int] = {}
        self._plans: deque[StepPlan] = deque()
        self._asked: deque[tuple[int, Question]] = deque()
        self._said: deque[tuple[Peer, Message]] = deque()
        self._names = 0
        self._handle(Tick())
        self._came(3, GatewayHello("gateway"))
        self._came(4, StoreHello(StoreInfo("store", "first", "tcp://nowhere:1", "http://nowhere:1", 1)))
        for peer in (1, 2):
            self._came(peer, WorkerHello(f"w{peer}", "host", "host", peer, "cpu"))
            self._says(peer, WorkerReady(model, pages, "nowhere"))
        while self.group.membership.state != "serving":
            self._go_on()

    @property
    def engine(self) -> EmbeddedEngine:
        """The engine under measurement."""
        assert isinstance(self.group.engine, EmbeddedEngine)
        return self.group.engine

    def submit(self, prompt: list[int], max_tokens: int) -> None:
        """A request comes."""
        self._names += 1
        request = GenerationRequest(f"cmpl-{self._names:032x}-0", pack_ids(prompt), max_tokens, SamplingParams(0.0))
        self._says(3, Submit(request, "fingerprint"))

    def step(self) -> float:
        """One step passes, and what follows from it; seconds of the core's time."""
        self.spent_s = 0.0
        if not self._plans:
            self._handle(Tick())
        plan = self._plans.popleft()
        for peer in self._ranks:
            self._says(peer, self._done(plan, self._ranks[peer]))
        self._go_on()
        return self.spent_s

    def settle(self) -> None:
        """Steps pass until no request is in work."""
        while not self.engine.quiet:
            self.step()

    def status(self) -> float:
        """Half a second passes: all is told to the gateways. Seconds of the core's time."""
        self.spent_s, self.now = 0.0, self.now + 0.6
        self._handle(Tick())
        self._go_on()
        return self.spent_s

    # -- peers ---------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        while self._asked or self._said:
            if self._asked:
                number, question = self._asked.popleft()
                self._handle(Answered(number, self._answer(question)))
            else:
                self._says(*self._said.popleft())

    def _answer(self, question: Question) -> Answer:
        return StripesFound({}) if isinstance(question, FindStripes) else EpochIs(max(1, self.group.membership.epoch))

    def _came(self, peer: Peer, hello: Hello) -> None:
        self._handle(Came(peer, hello))

    def _says(self, peer: Peer, message: Message) -> None:
        frame = wire.encode(message)
        self.received_bytes += len(frame)
        began = time.thread_time()
        decoded = wire.decode(frame)
        self.spent_s += time.thread_time() - began
        self._handle(Said(peer, decoded))

    def _handle(self, event: Event) -> None:
        self.now += 1e-4
        began = time.thread_time()
        self.group.handle(self.now, event)
        outputs = self.group.take()
        frames = [encode_effect(output) for output in outputs if isinstance(output, Send)]
        self.spent_s += time.thread_time() - began
        self.sent_bytes += sum(map(len, frames))
        for output in outputs:
            if isinstance(output, Ask):
                self._asked.append((output.number, output.question))
            else:
                for peer in output.peers:
                    self._take(peer, output.message)

    def _take(self, peer: Peer, message: Message) -> None:
        match message:
            case Assign(epoch=epoch, rank=rank):
                self._ranks[peer] = rank
                if rank == 0:
                    self._said.append((peer, Rendezvous(epoch, "model", "exchange")))
            case Join(epoch=epoch):
                self._said.append((peer, Joined(epoch, self._ranks[peer], 0.0, 0.0)))
            case StepPlan() if self._ranks[peer] == 0:
                self._plans.append(message)
            case ProtectPlan():
                rank = self._ranks[peer]
                mine = tuple(key for key in message.keys if encoding_rank(key, SIZE) == rank)
                if mine:
                    self._said.append((peer, ProtectDone(message.epoch, rank, mine, (), "", 1, 0.0, False)))
            case _:
                pass

    def _done(self, plan: StepPlan, rank: int) -> StepDone:
        chunks = zip(unpack_ids(plan.batch.sequences), plan.batch.draws, strict=True)
        drawn = [number for number, draws in chunks if draws]
        return StepDone(plan.epoch, plan.step, rank, pack_ids(drawn), pack_ids([TOKEN] * len(drawn)), (), 0.01)


def prompt(dice: random.Random, length: int) -> list[int]:
    """Tokens that no other prompt has."""
    return [dice.randrange(100, VOCABULARY) for _ in range(length)]
