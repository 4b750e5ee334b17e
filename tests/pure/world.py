"""A simulated cluster around the coordinator's core: workers, stores and index are a few lines each, time passes with
each move, and every message and answer waits until the test's dice let it through. KV is modelled by the token ids that
a page holds on each rank, so that any stale, missing or mixed-up page shows as a wrong token.
"""

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from services.coordinator.app import group_config
from services.coordinator.events import (
    Answer,
    Answered,
    Ask,
    Came,
    Effect,
    EpochIs,
    Event,
    FindStripes,
    Hello,
    Keep,
    Left,
    NextEpoch,
    Peer,
    Question,
    Said,
    Send,
    StripesFound,
    Tick,
)
from services.coordinator.group import Group
from services.coordinator.protection.costs import StoredStripe
from services.coordinator.protection.ledger import Ledger, Parity
from services.coordinator.recording.segments import Writer, checksum, encode
from services.coordinator.scheduling.engine import EmbeddedEngine
from services.worker.engine.batch import SequenceStep
from services.worker.engine.sequences import Sequences
from shared.config import CoordinatorSettings
from shared.messages import (
    Abort,
    Applied,
    Apply,
    Assign,
    Claim,
    CopyPages,
    DigestDone,
    DigestPlan,
    EpochNow,
    Failed,
    GatewayHello,
    Goodbye,
    Join,
    Joined,
    KeepStripes,
    Message,
    NextTokens,
    NotePages,
    PagesCopied,
    ParityShard,
    Prepare,
    Prepared,
    ProtectDone,
    ProtectPlan,
    RankFailed,
    Refused,
    ReleaseStripes,
    Rendezvous,
    RestoreDone,
    RestorePlan,
    Sample,
    ShardsLost,
    StandBy,
    StepDone,
    StepPlan,
    StepRaised,
    StoreHello,
    Submit,
    Tokens,
    Welcome,
    WorkerHello,
    WorkerReady,
)
from shared.tracing import Tracing
from shared.types import (
    OPEN_KEY,
    GenerationRequest,
    ModelInfo,
    OperatorAction,
    PageKey,
    SamplingParams,
    StoreInfo,
    encoding_rank,
    pack_ids,
    unpack_ids,
    unpack_keys,
)
from tests.pure.plans import Planned, stripes_of

VOCABULARY = 1000
EOS = 7
STOPS = tuple(range(8, 58))
"""Tokens that end some of the requests: one in twenty that the model says."""
POISON = 6
"""A token with which steps raise errors; no model says it."""
MODEL = ModelInfo("/nowhere", "fingerprint", "Sim", "float32", VOCABULARY, 4096, 2, 6, 4, (EOS,), 10_000_000)
GARBAGE = -1
TICK_S = 0.05
MOVE_S = 0.002
WINDOW = 2
"""Stripes that ranks restore before they say so."""


def next_token(tokens: tuple[int, ...]) -> int:
    """What the simulated model says after these tokens; never end of sequence."""
    digest = hashlib.blake2b(pack_ids(tokens), digest_size=4).digest()
    return 8 + int.from_bytes(digest, "little") % (VOCABULARY - 8)


def _concerns(message: KeepStripes, key: PageKey) -> bool:
    return key > message.after and (not message.upto or key <= message.upto)


class Wire:
    """A connection to the core: what it has sent, and not arrived."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.sent: deque[Message] = deque()


@dataclass(eq=False)
class SimWorker:
    name: str
    wire: Wire | None = None
    """None while it is not connected: then it dials."""
    out: deque[Message] = field(default_factory=deque)
    kv: dict[int, list[int]] = field(default_factory=dict)
    sealed: dict[int, PageKey] = field(default_factory=dict)
    copied: dict[int, PageKey] = field(default_factory=dict)
    assign: Assign | None = None
    joined: bool = False
    step: int = 0
    raised: bool = False
    """A step raised an error: it waits for one that begins anew."""
    sequences: Sequences = field(default_factory=Sequences)
    parts: tuple[SequenceStep, ...] = ()
    """Of the step that it is in."""
    loaded: int | None = None
    """The rank whose weights it has."""
    copying: CopyPages | None = None
    lanes: dict[str, deque[Any]] = field(default_factory=lambda: {"compute": deque(), "shadow": deque()})
    """Plans not begun, of its two threads."""
    first_rank: int | None = None
    """The rank that a hosted engine started it for."""
    stalled: dict[str, Any] = field(default_factory=dict)
    """By thread, the plan whose collective waits for the other ranks."""

    def lose_channel(self) -> None:
        """It stops stepping."""
        self.wire, self.joined, self.copying = None, False, None
        self.out.clear()
        self.stalled.clear()
        for lane in self.lanes.values():
            lane.clear()

    @property
    def claim(self) -> Claim | None:
        """What it tells of itself when it dials."""
        if self.assign is None:
            return None
        return Claim(self.assign.epoch, self.assign.rank, pack_ids(self.sealed), tuple(self.sealed.values()))


class World:
    """The dice, the workers, one store, one client."""

    def __init__(
        self,
        seed: int,
        *,
        size: int = 3,
        parity: int = 1,
        pages: int = 24,
        page_tokens: int = 4,
        protect_tail: bool = False,
        tracing: Tracing | None = None,
        engine: Literal["embedded", "hosted"] = "embedded",
        steps_in_flight: int | None = None,
        device: str = "cpu",
    ):
        self.dice = random.Random(seed)
        self.device = device
        self.size, self.parity, self.pages, self.page_tokens = size, parity, pages, page_tokens
        self.settings = CoordinatorSettings(
            tp=size,
            parity=parity,
            page_tokens=page_tokens,
            max_step_tokens=self.dice.choice((3, 8, 32)),
            max_batch=self.dice.choice((2, 8)),
            steps_in_flight=self.dice.choice((1, 2)) if steps_in_flight is None else steps_in_flight,
            heartbeat_s=3600,
            heartbeat_timeout_s=3600,
            restore="always",
            protect_tail=protect_tail,
            engine=engine,
        )
        self.tracing = tracing
        self.now = 100.0
        self.last_epoch = 0
        self.last_cordons: dict[str, int | None] = {}
        """What Redis knows."""
        self.questions: dict[int, tuple[Question, Answer]] = {}
        """Not answered yet."""
        self.slow_index = False
        """While it is set, no look-up is answered."""
        self.wires: dict[Peer, Wire] = {}
        self._peers = itertools.count(1)
        self._ticked = self.now
        self._writer: Writer | None = None
        self.lives: list[bytearray] = []
        """Recordings of the coordinators since `record`."""
        self.watch: Callable[[Event, list[tuple[Effect, bytes]]], None] = lambda event, outputs: None
        """Is told each event, and what came out."""
        self.group = self._make_group()
        self.workers: dict[str, SimWorker] = {}
        self.parity_of: dict[PageKey, list[list[int]]] = {}
        self.written: dict[PageKey, tuple[int, int]] = {}  # (epoch, serial) of what parity_of has
        self.incarnation = "first"
        self.store_epoch = 0
        self.store_there = False
        self.store_wire: Wire | None = None
        self.client: Wire | None = None
        """None while the gateway is not connected."""
        self.requests: dict[str, GenerationRequest] = {}
        self.received: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.poisoned_ranks = range(size)
        """Where POISON raises errors."""
        self.broken_workers: set[str] = set()
        """Where each step does."""
        self.restored = 0
        self.room = 1 << 30  # stripes that the store has room for
        self.prepared_switches = 0
        self.copy_failures = 0.0
        self._names = itertools.count()
        self.handle(Tick())
        self.gateway_dials()

    # -- the coordinator ---------------------------------------------------------------------------------------------

    def _make_group(self) -> Group:
        group = Group(
            group_config(self.settings), self.settings, self.last_epoch, self.now, self.tracing, self.last_cordons
        )
        group.membership.return_grace_s = self.dice.choice((0.0, 0.1, 0.3))
        return group

    def handle(self, event: Event) -> None:
        """Hand an event to the core; what comes out is under way, questions with what Redis says at that moment."""
        self.group.handle(self.now, event)
        outputs = self._carry()
        encoded = [(output, encode(output)) for output in outputs]
        if self._writer is not None:
            self.lives[-1] += self._writer.entry(self.now, event, b"", checksum(encoded))
        self.watch(event, encoded)

    def record(self) -> None:
        """From now on what goes into the coordinator is recorded, in each life anew."""
        self._writer = Writer(self.group, self.settings, f"life-{len(self.lives)}")
        self.lives.append(bytearray(self._writer.segment(self.now, 0.0)))

    def flow(self) -> None:
        """What comes out by itself every two seconds comes now."""
        self.engine.protection.encoding.flow()
        self._carry()

    def _carry(self) -> list[Effect]:
        outputs = self.group.take()
        for output in outputs:
            match output:
                case Send(peers, message):
                    for peer in peers:
                        if peer in self.wires:
                            self.wires[peer].sent.append(message)
                case Ask(number, question):
                    self.questions[number] = (question, self._answer(question))
        return outputs

    def _answer(self, question: Question) -> Answer:
        match question:
            case NextEpoch(current):
                self.last_epoch = max(self.last_epoch, current) + 1
                return EpochIs(self.last_epoch)
            case Keep(current, cordons):
                self.last_epoch, self.last_cordons = max(self.last_epoch, current), dict(cordons)
                return EpochIs(self.last_epoch)
            case FindStripes(keys=keys, stores=stores):
                here = [store for store in stores if store.incarnation == self.incarnation]
                parity = tuple(
                    ParityShard(self.size + n, here[0].bulk_address, 1) for n in range(self.parity if here else 0)
                )
                stripe = StoredStripe(parity, (0,) * self.size)
                return StripesFound({key: stripe for key in keys if key in self.parity_of and here})

    def tick(self) -> None:
        """Time passes."""
        self.now = self._ticked = self._ticked + TICK_S
        self.handle(Tick())

    def crash(self) -> None:
        """The coordinator dies, and another takes its place. What is on its channels arrives, or does not."""
        self.settle(0.5)
        self.wires.clear()
        self.questions.clear()
        self.client = self.store_wire = None
        for worker in self.workers.values():
            worker.lose_channel()
        self.group = self._make_group()
        if self._writer is not None:
            self.record()
        self.handle(Tick())

    def _connects(self, hello: Hello) -> Wire:
        wire = Wire(next(self._peers))
        self.wires[wire.peer] = wire
        self.handle(Came(wire.peer, hello))
        return wire

    def _breaks(self, wire: Wire, reason: str) -> None:
        del self.wires[wire.peer]
        self.handle(Left(wire.peer, reason))

    # -- the core's parts --------------------------------------------------------------------------------------------

    @property
    def engine(self) -> EmbeddedEngine:
        """What there is in the core once the first worker is ready."""
        assert self.group.engine is not None
        return self.group.engine

    @property
    def ledger(self) -> Ledger:
        return self.engine.protection.ledger

    # -- what can happen ---------------------------------------------------------------------------------------------

    def add_worker(self) -> None:
        worker = SimWorker(f"w{next(self._names)}")
        self.workers[worker.name] = worker
        self._worker_dials(worker)

    def _worker_dials(self, worker: SimWorker) -> None:
        worker.wire = self._connects(WorkerHello(worker.name, "host", "host", 1, self.device))
        worker.out.append(self._ready_of(worker))

    def _ready_of(self, worker: SimWorker) -> WorkerReady:
        return WorkerReady(MODEL, self.pages, worker.name, worker.claim)

    def kill(self, worker: SimWorker) -> None:
        del self.workers[worker.name]
        if worker.wire is not None:
            self._breaks(worker.wire, "killed")

    def cut_off(self, worker: SimWorker) -> None:
        """Its channel breaks, though both ends live."""
        if worker.wire is not None:
            wire = worker.wire
            worker.lose_channel()
            self._breaks(wire, "cut off")

    def says(self, name: str, message: Message) -> None:
        """A worker's message arrives."""
        wire = self.workers[name].wire
        assert wire is not None
        self.handle(Said(wire.peer, message))

    def lose_store(self) -> None:
        self.store_there = False
        self.parity_of.clear()
        self.incarnation = f"after {self.dice.random()}"
        self._cut_store()

    def _cut_store(self) -> None:
        if self.store_wire is not None:
            wire, self.store_wire = self.store_wire, None
            self._breaks(wire, "cut off")

    def add_store(self) -> None:
        self.store_there = True
        if self.store_wire is None:
            self._store_dials()

    def _store_dials(self) -> None:
        info = StoreInfo("store", self.incarnation, "tcp://nowhere:1", "http://nowhere:1", 1)
        self.store_wire = self._connects(StoreHello(info))

    def store_says(self, message: Message) -> None:
        """The store's message arrives, if it is connected."""
        if self.store_wire is not None:
            self.handle(Said(self.store_wire.peer, message))

    def gateway_dials(self) -> None:
        """The gateway connects, and submits again what it has not got to the end."""
        self.client = self._connects(GatewayHello("gateway"))
        for name, request in self.requests.items():
            if name not in self.finished:
                submit = Submit(request, MODEL.fingerprint, pack_ids(self.received[name]))
                self.handle(Said(self.client.peer, submit))

    def cut_gateway(self) -> None:
        """The gateway's channel breaks; it knows at once, the coordinator at once or after it is back."""
        if self.client is not None:
            old, self.client = self.client, None
            late = self.dice.random() < 0.5
            if late:
                self.gateway_dials()
            self._breaks(old, "cut off")

    def submit(
        self,
        *,
        length: int = 0,
        max_tokens: int = 0,
        shared_prefix: bool = False,
        digest: bool = False,
        poison: bool = False,
    ) -> str:
        name = f"r{len(self.requests)}"
        length = length or self.dice.randrange(1, 30)
        prompt = [9] * min(16, length) if shared_prefix else []
        prompt += [self.dice.randrange(8, VOCABULARY) for _ in range(length - len(prompt))]
        if poison:
            prompt[self.dice.randrange(length)] = POISON
        request = GenerationRequest(
            name,
            pack_ids(prompt),
            max_tokens or self.dice.randrange(1, 24),
            SamplingParams(temperature=0.0),
            stop_token_ids=() if max_tokens else self.dice.choice(((), (), STOPS)),
            kv_digest=digest,
        )
        if self.client is None:
            return name
        self.handle(Said(self.client.peer, Submit(request, MODEL.fingerprint)))
        if not any(isinstance(m, Refused) and m.request_id == name for m in self.client.sent):
            self.requests[name] = request
            self.received[name] = []
        return name

    def abort(self) -> None:
        live = [name for name in self.requests if name not in self.finished]
        if live:
            name = self.dice.choice(live)
            self.finished[name] = "aborted"
            if self.client is not None:
                self.handle(Said(self.client.peer, Abort(name)))

    def move(self) -> bool:
        """Let one message or answer through, or one peer dial, somewhere. False: there was none, so time passed."""
        self.now += MOVE_S
        if self.now > self._ticked + TICK_S:
            self._ticked = self.now
            self.handle(Tick())
        moves: list[tuple[str, Any]] = []
        if self.client is None:
            moves.append(("gateway", None))
        if self.store_there and self.store_wire is None:
            moves.append(("store", None))
        for worker in self.workers.values():
            if worker.wire is None:
                moves.append(("dial", worker))
                continue
            if worker.wire.sent:
                moves.append(("in", worker))
            if worker.copying is not None:
                moves.append(("copy", worker))
            if worker.out:
                moves.append(("out", worker))
            moves += [(lane, worker) for lane in worker.lanes if self._can_run(worker, lane)]
        moves += [("answer", number) for number in self.questions if not self._late(number)]
        moves += self.more_moves()
        if not moves:
            self.settle()
            self.tick()
            return False
        kind, worker = self.dice.choice(moves)
        if kind == "answer":
            self.handle(Answered(worker, self.questions.pop(worker)[1]))
        elif kind == "gateway":
            self.gateway_dials()
        elif kind == "store":
            self._store_dials()
        elif kind == "dial":
            self._worker_dials(worker)
        elif kind == "out":
            self.says(worker.name, worker.out.popleft())
        elif kind == "copy":
            self._copy(worker)
        elif kind.startswith("engine"):
            self.make_move(kind, worker)
        elif kind == "in":
            self._receive(worker, worker.wire.sent.popleft())
        else:
            self._enter(worker, kind, worker.lanes[kind].popleft())
        self.settle()
        return True

    def more_moves(self) -> list[tuple[str, Any]]:
        """What else can happen; see `make_move`."""
        return []

    def make_move(self, kind: str, what: Any) -> None:
        """Let one of `more_moves` happen, whose kinds begin with engine."""

    def _late(self, number: int) -> bool:
        return self.slow_index and isinstance(self.questions[number][0], FindStripes)

    def damage(self) -> None:
        """A scrub finds a stripe damaged; the store drops it and says so."""
        if self.store_wire is not None and self.parity_of:
            key = self.dice.choice(list(self.parity_of))
            del self.parity_of[key]
            self.store_says(ShardsLost(self.group.config.group, (key,)))

    def check_nothing_stale(self) -> None:
        """Assert that the store, which has heard all, holds stripes of pages that there are, no other."""
        while self.store_wire is not None and self.store_wire.sent:
            self._store_receives(self.store_wire.sent.popleft())
        assert set(self.parity_of) <= set(self.ledger.keys), "the store holds stripes of pages that are gone"

    def check_parity(self) -> None:
        """Assert that what counts as protected has its parity in the store."""
        for page in self.ledger if self.group.protection is not None else ():
            if page.parity is Parity.PROTECTED and self.store_wire is not None and not page.missing:
                assert page.key in self.parity_of, f"{page} is protected by nothing"

    def check_slices(self) -> None:
        """Assert that all ranks have the same in every sealed page of which nothing is missing."""
        ranks = [self.workers[name] for name in self.group.membership.ranks if name is not None]
        for page in self.ledger.sealed_pages:
            if not page.missing:
                slices = [worker.kv.get(page.number) for worker in ranks]
                assert slices.count(slices[0]) == self.size, f"{page}: the ranks disagree"

    def settle(self, likely: float = 1.0) -> None:
        """Let arrive what was sent to store and gateway; each message as likely as that."""
        if self.store_wire is not None:
            while self.store_wire.sent and self.dice.random() < 0.7:  # or later: puts come by another channel
                self._store_receives(self.store_wire.sent.popleft())
        while self.client is not None and self.client.sent and self.dice.random() < likely:
            message = self.client.sent.popleft()
            if isinstance(message, NextTokens):
                for name, token in zip(message.request_ids, unpack_ids(message.tokens), strict=True):
                    if name in self.received:
                        self._client_receives(Tokens(name, pack_ids((token,)), (), (), None, 0))
            elif getattr(message, "request_id", None) in self.received:
                assert not isinstance(message, Refused), f"an accepted request is refused: {message}"
                if isinstance(message, Tokens):
                    self._client_receives(message)
                elif isinstance(message, Failed):
                    assert POISON in unpack_ids(self.requests[message.request_id].prompt), "an innocent request ends"
                    assert message.request_id not in self.finished
                    self.finished[message.request_id] = message.message

    def _store_receives(self, message: Message) -> None:
        match message:
            case Welcome():
                pass
            case EpochNow(epoch=epoch):
                self.store_epoch = max(self.store_epoch, epoch)
            case ReleaseStripes(keys=keys) | KeepStripes(keys=keys):
                kept = isinstance(message, KeepStripes)
                for key in [each for each in self.parity_of if not kept or _concerns(message, each)]:
                    if (key in keys) != kept and self.written[key] <= (message.epoch, message.serial):
                        del self.parity_of[key]
            case _:
                raise AssertionError(f"a store was sent {message}")

    def _client_receives(self, message: Tokens) -> None:
        assert message.request_id not in self.finished, "tokens after the end"
        request, received = self.requests[message.request_id], self.received[message.request_id]
        prompt = unpack_ids(request.prompt)
        for token in unpack_ids(message.tokens):
            expected = next_token(tuple(prompt + received))
            assert token == expected, f"{message.request_id}: token {len(received)} is {token}, not {expected}"
            assert token not in request.stop_token_ids, f"{message.request_id} goes on after its end"
            received.append(token)
        if message.finish_reason is not None:
            self.finished[message.request_id] = message.finish_reason
            stopped = message.finish_reason == "stop"
            if stopped:
                assert next_token(tuple(prompt + received)) in request.stop_token_ids
            else:
                assert len(received) == request.max_tokens
            if request.kv_digest:
                computed = prompt + received if stopped else (prompt + received)[:-1]
                assert message.kv_digests == (str(tuple(computed)),) * self.size

    # -- a worker ----------------------------------------------------------------------------------------------------

    def _receive(self, worker: SimWorker, message: Message) -> None:
        match message:
            case Assign():
                if worker.assign is None or worker.assign.rank != message.rank:
                    worker.sealed = dict(worker.copied) if worker.loaded == message.rank else {}
                worker.copied.clear()
                worker.assign, worker.joined, worker.step, worker.raised = message, False, 0, False
                worker.sequences.clear()
                worker.copying = None
                if worker.loaded is not None and worker.loaded == message.rank:
                    self.prepared_switches += 1
                worker.loaded = message.rank
                worker.stalled.clear()  # a new epoch ends the collectives of the one before
                for lane in worker.lanes.values():
                    lane.clear()
                if message.rank == 0:
                    worker.out.append(Rendezvous(message.epoch, "model", "exchange"))
            case Join() if worker.assign is not None and message.epoch == worker.assign.epoch:
                worker.joined = True
                worker.out.append(Joined(message.epoch, worker.assign.rank, 0.0, 0.0))
            case StandBy():
                worker.sealed.clear()
                worker.copied.clear()
                worker.assign, worker.joined, worker.copying = None, False, None
                worker.stalled.clear()
                for lane in worker.lanes.values():
                    lane.clear()
            case Prepare() if worker.assign is None:
                worker.loaded = message.rank
                worker.copied.clear()
                worker.out.append(Prepared(message.move))
            case CopyPages() if worker.assign is None:
                worker.copying = message
            case StepPlan() | NotePages() | DigestPlan() if self._of_epoch(worker, message.epoch):
                worker.lanes["compute"].append(message)
            case ProtectPlan() | RestorePlan() if self._of_epoch(worker, message.epoch):
                worker.lanes["shadow"].append(message)
            case Goodbye():
                worker.lose_channel()
                worker.assign = None
            case _:
                pass

    def _copy(self, worker: SimWorker) -> None:
        """A spare reads pages out of another worker's pool, as they are at this moment."""
        message, worker.copying = worker.copying, None
        assert message is not None
        source = self.workers.get(message.address)
        if source is None or self.dice.random() < self.copy_failures:
            worker.out.append(PagesCopied(message.move, message.pages, "it can't be reached"))
            return
        for page, key in zip(unpack_ids(message.pages), message.keys, strict=True):
            worker.kv[page] = list(source.kv.get(page, [GARBAGE] * self.page_tokens))
            worker.copied.pop(page, None)
            if key != OPEN_KEY:
                worker.copied[page] = key
        worker.out.append(PagesCopied(message.move, message.pages, ""))

    def operate(self, action: OperatorAction, target: str) -> Applied | Refused:
        """An operator's word, and the coordinator's answer."""
        assert self.client is not None
        self.handle(Said(self.client.peer, Apply("apply", action, target)))
        return next(m for m in reversed(self.client.sent) if isinstance(m, Applied | Refused))

    def _of_epoch(self, worker: SimWorker, epoch: int) -> bool:
        return worker.assign is not None and worker.assign.epoch == epoch

    def _can_run(self, worker: SimWorker, lane: str) -> bool:
        """Whether a thread can begin its next plan: connected, not inside another, and after the step it waits for."""
        if not worker.joined or lane in worker.stalled or not worker.lanes[lane]:
            return False
        plan = worker.lanes[lane][0]
        return not isinstance(plan, ProtectPlan) or worker.step >= plan.after_step

    def _enter(
        self, worker: SimWorker, lane: str, plan: StepPlan | NotePages | DigestPlan | ProtectPlan | RestorePlan
    ) -> None:
        """Do this rank's part; what follows the barrier happens when the last rank of the epoch is in."""
        if isinstance(plan, NotePages):
            worker.sealed.update(zip(unpack_ids(plan.pages), unpack_keys(plan.keys), strict=True))
            return
        if isinstance(plan, DigestPlan):
            assert worker.assign is not None
            tokens = self.read(worker, unpack_ids(plan.pages), plan.tokens)
            worker.out.append(DigestDone(plan.epoch, plan.digest, worker.assign.rank, str(tuple(tokens))))
            return
        if isinstance(plan, StepPlan):
            worker.raised = worker.raised and not plan.batch.anew
            if worker.raised:
                return
            worker.parts = worker.sequences.take(plan.batch)
            for chunk in (part.chunk for part in worker.parts):
                self.write(worker, chunk.pages.tolist(), chunk.start, chunk.tokens.tolist())
            assert worker.assign is not None
            poisoned = any(POISON in part.chunk.tokens for part in worker.parts)
            if (poisoned and worker.assign.rank in self.poisoned_ranks) or worker.name in self.broken_workers:
                worker.raised = True
                worker.out.append(StepRaised(plan.epoch, plan.step, worker.assign.rank, "poison", 0))
                return
        worker.stalled[lane] = plan
        peers = [each for each in self.workers.values() if each.stalled.get(lane) == plan]
        if len(peers) == self.size:
            for peer in peers:
                del peer.stalled[lane]
            by_rank = {peer.assign.rank: peer for peer in peers if peer.assign is not None}
            assert sorted(by_rank) == list(range(self.size))
            match plan:
                case StepPlan():
                    self._sample(plan, by_rank)
                case ProtectPlan():
                    self._encode(plan, by_rank)
                case RestorePlan():
                    self._decode(plan, by_rank)

    def write(self, worker: SimWorker, pages: list[int], start: int, tokens: list[int]) -> None:
        for position, token in enumerate(tokens, start):
            worker.sealed.pop(pages[position // self.page_tokens], None)
            page = worker.kv.setdefault(pages[position // self.page_tokens], [GARBAGE] * self.page_tokens)
            page[position % self.page_tokens] = token

    def read(self, worker: SimWorker, pages: list[int], count: int) -> list[int]:
        blank = [GARBAGE] * self.page_tokens
        return [
            worker.kv.get(pages[position // self.page_tokens], blank)[position % self.page_tokens]
            for position in range(count)
        ]

    def _sample(self, plan: StepPlan, by_rank: dict[int, SimWorker]) -> None:
        for rank, worker in by_rank.items():
            worker.step = plan.step
            drawn = {}
            for part in worker.parts:
                pages, end = part.chunk.pages.tolist(), part.chunk.end
                seen = self.read(worker, pages, end)
                assert GARBAGE not in seen, f"rank {rank} computes over KV that is not there"
                if part.sampling is not None:
                    drawn[part.sequence] = next_token(tuple(seen))
            worker.sequences.drew(Sample(number, token) for number, token in drawn.items())
            worker.out.append(StepDone(plan.epoch, plan.step, rank, pack_ids(drawn), pack_ids(drawn.values()), (), 0.0))

    def _encode(self, plan: ProtectPlan, by_rank: dict[int, SimWorker]) -> None:
        for rank, worker in by_rank.items():
            mine = [
                (page, key)
                for page, key in zip(unpack_ids(plan.pages), plan.keys, strict=True)
                if encoding_rank(key, self.size) == rank
            ]
            stored, refused = [], []
            for page, key in mine:
                slices = [self._slice(by_rank[each], page, tail=plan.tail) for each in range(self.size)]
                assert slices.count(slices[0]) == self.size, "ranks disagree on a sealed page"
                assert GARBAGE not in slices[0]
                there = self.store_there and plan.epoch >= self.store_epoch
                if there and (key in self.parity_of or len(self.parity_of) < self.room):
                    self.parity_of[key] = slices
                    self.written[key] = (plan.epoch, plan.serial)
                    stored.append(key)
                else:
                    refused.append(key)
            if mine:
                full = bool(refused) and self.store_there
                worker.out.append(ProtectDone(plan.epoch, rank, tuple(stored), tuple(refused), "no room", 1, 0.0, full))

    def _slice(self, worker: SimWorker, place: int, *, tail: bool) -> list[int]:
        """The tokens that a rank has on a page, or at a slot."""
        if not tail:
            return list(worker.kv[place])
        page, offset = divmod(place, self.page_tokens)
        return [worker.kv[page][offset]]

    def _put(self, worker: SimWorker, place: int, content: list[int], *, tail: bool) -> None:
        page, offset = divmod(place, self.page_tokens) if tail else (place, 0)
        kept = worker.kv.setdefault(page, [GARBAGE] * self.page_tokens)
        kept[offset : offset + len(content)] = content

    def _decode(self, plan: RestorePlan, by_rank: dict[int, SimWorker]) -> None:
        for rank, worker in by_rank.items():
            stripes = stripes_of(plan)
            if not any(rank in stripe.lost for stripe in stripes):
                continue
            for start in range(0, len(stripes), WINDOW):
                window = stripes[start : start + WINDOW]
                mine = [each for each in window if rank in each.lost]
                failed = [each.key for each in mine if not self._rebuild(each, plan, by_rank, rank)]
                worker.out.append(
                    RestoreDone(
                        plan.epoch, plan.plan, rank, start + len(window), tuple(failed), "gone" if failed else "", 1,
                        0.0, 0.0, 0.0, 0.0,
                    )
                )  # fmt: skip

    def _rebuild(self, stripe: Planned, plan: RestorePlan, by_rank: dict[int, SimWorker], rank: int) -> bool:
        """One stripe on a rank that lost it; false if the store has it no more."""
        worker, encoded = by_rank[rank], self.parity_of.get(stripe.key)
        assert len(stripe.lost) <= self.parity
        if not plan.tail:
            worker.sealed.pop(stripe.page, None)
        if encoded is None:
            garbage = [GARBAGE] * (1 if plan.tail else self.page_tokens)
            self._put(worker, stripe.page, garbage, tail=plan.tail)
            return False
        for other, peer in by_rank.items():
            if other not in stripe.lost:
                kept = self._slice(peer, stripe.page, tail=plan.tail)
                assert kept == encoded[other], "what a survivor has of a stripe has changed"
        self._put(worker, stripe.page, encoded[rank], tail=plan.tail)
        if not plan.tail:
            worker.sealed[stripe.page] = stripe.key
        self.restored += 1
        return True

    def abort_collective(self) -> None:
        """A stalled rank reports that its collective was aborted, as it does when a peer dies."""
        stalled = [worker for worker in self.workers.values() if worker.stalled and worker.assign is not None]
        if stalled:
            worker = self.dice.choice(stalled)
            assert worker.assign is not None
            worker.out.append(RankFailed(worker.assign.epoch, worker.assign.rank, "aborted", fatal=False))
