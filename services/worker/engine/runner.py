"""The compute thread of a worker: takes a rank, runs steps, hashes KV. One job at a time, in the order they came."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch

from services.worker.agent.inventory import Inventory
from services.worker.agent.rank_engine import Job
from services.worker.communicator.base import Communicator
from services.worker.communicator.meeting import Meeting
from services.worker.engine.draw import draw
from services.worker.engine.model import RankModel
from services.worker.engine.sequences import Sequences
from services.worker.engine.spec import model_info
from services.worker.shadow.shadow import SLOT_BYTES, Shadow
from shared.errors import CommunicatorAborted, CutOff, DeadlineExceeded
from shared.messages import (
    Assign,
    DigestDone,
    DigestPlan,
    Join,
    Joined,
    Message,
    NotePages,
    Prepare,
    Prepared,
    RankFailed,
    RestorePlan,
    Sample,
    StandBy,
    StepDone,
    StepPlan,
    StepRaised,
)
from shared.types import GroupConfig, pack_ids, unpack_keys

log = logging.getLogger(__name__)

MAX_JOBS = 1024
REASON_CHARS = 500
BUSY_S = 0.05
"""A spare looks again so often for slices that other processes of its host are filling."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """The rank this worker holds, and since when."""

    assign: Assign
    assigned_at: float
    weights_s: float


class Runner:
    """One device's model and pool. `submit` and `interrupt` come from the event loop, the rest runs on its own thread.

    Reports are messages for the coordinator; `report` must be safe to call from any thread. `host_memory` is
    RankModel's; without it a spare holds nothing.
    """

    def __init__(
        self,
        model_dir: Path,
        config: GroupConfig,
        device: torch.device,
        shadow: Shadow,
        inventory: Inventory,
        report: Callable[[Message], None],
        *,
        host_memory: int | None,
    ):
        self.config = config
        self.address = "127.0.0.1"  # where other ranks reach this one; the worker knows once it has dialled
        self.shadow = shadow
        self.step_done = 0
        self.in_flight = False
        self.unfit = ""
        """Why this worker can take no rank: weights can't be loaded. It has to end, and to say so."""
        self.at_rest = threading.Event()
        """Set while the compute thread waits for a job."""
        self._marks = 0  # what it has begun in this epoch, without collectives
        self._former: Communicator | None = None  # the one of the epoch before, whose collectives count no more
        self._step_epoch = 0  # of the step in flight, or of the last one
        self._ended_at = 0.0  # when the epoch before ended; while a step overstays, when the step's own did
        self._sequences = Sequences()
        self._raised = False  # a step raised an error: those that were planned to follow it count for nothing
        self._inventory = inventory
        self._report = report
        self._epoch = 0
        self._cancelled = threading.Event()  # set when the epoch that it belongs to ends
        self._jobs: queue.Queue[tuple[Job, float] | None] = queue.Queue(MAX_JOBS)
        self._communicator: Communicator | None = None
        self._place: Place | None = None
        self._assigned = -1  # the rank that it has or is about to take
        self._loaded_rank: int | None = None
        self._holds = host_memory is not None
        self._unprepared = list(range(config.size)) if self._holds else []
        dtype = cast(torch.dtype, getattr(torch, config.dtype))
        self.model = RankModel(model_dir, size=config.size, dtype=dtype, device=device, host_memory=host_memory)
        self.pool = self.model.make_pool(config.page_tokens, memory_bytes=config.kv_bytes)
        self.info = model_info(model_dir, self.model.spec, self.pool.page_bytes)
        step_bytes = config.max_step_tokens * self.model.spec.hidden * dtype.itemsize
        self._meeting = Meeting((step_bytes, SLOT_BYTES), config.collective_timeout_s)
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    # -- from the event loop -----------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job. An Assign ends the epoch before: its collectives abort, its jobs are skipped."""
        if isinstance(job, Assign | StandBy):
            self.interrupt(job.epoch)
            self._assigned = job.rank if isinstance(job, Assign) else -1
        self._jobs.put_nowait((job, time.monotonic()))

    def restore(self, plan: RestorePlan) -> None:
        """Hand a plan to the shadow; its parity is read at once."""
        shard_bytes = (self.pool.tokens if plan.tail else self.pool).page_bytes
        self.shadow.prefetch(plan, self._assigned, shard_bytes)
        self.shadow.submit(plan)

    @property
    def pages(self) -> int:
        """The size of the pool."""
        return self.pool.pages

    @property
    def progress(self) -> int:
        """How much the compute thread has begun in this epoch; see Heartbeat."""
        communicator = self._communicator
        if communicator is None or communicator is self._former:
            return self._marks
        return self._marks + communicator.entered

    @property
    def overstay_s(self) -> float:
        """For how long a step has been computed whose epoch is over, though its collectives were aborted."""
        return time.monotonic() - self._ended_at if self._overstays else 0.0

    @property
    def _overstays(self) -> bool:
        return self.in_flight and self._step_epoch != self._epoch

    def interrupt(self, epoch: int) -> None:
        """From now on only jobs of `epoch` count; a step that waits for peers ends at once."""
        if not self._overstays:
            self._ended_at = time.monotonic()
        self._epoch = epoch
        self._marks = 0
        self._cancelled.set()
        self._cancelled = threading.Event()
        self.shadow.interrupt(epoch)
        communicator = self._former = self._communicator
        if communicator is not None:
            communicator.abort()

    def given_up(self) -> None:
        """Nothing to do: as a spare it loads its slice anew."""

    def close(self) -> None:
        """End the thread."""
        self.interrupt(-1)
        self._jobs.put(None)
        self._thread.join(timeout=5.0)

    # -- the compute thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        self.shadow.device.bind()
        while (entry := self._next_job()) is not None:
            job, received = entry
            epoch = self._epoch if isinstance(job, Prepare) else job.epoch
            if epoch != self._epoch:
                continue
            self._marks += 1
            try:
                self.shadow.restored.wait()
                match job:
                    case StandBy():
                        self._stand_by(job)
                    case Prepare():
                        self._prepare(job)
                    case Assign():
                        self._assign(job, received)
                    case Join():
                        self._join(job)
                    case StepPlan():
                        self._raised &= not job.batch.anew
                        if not self._raised:
                            self._report(self._try_step(job))
                    case NotePages():
                        pages, keys = np.frombuffer(job.pages, dtype="<i4").tolist(), unpack_keys(job.keys)
                        self._inventory.note(epoch, zip(pages, keys, strict=True))
                    case DigestPlan():
                        self._report(self._digest(job))
            except (CommunicatorAborted, DeadlineExceeded) as error:
                self._failed(epoch, f"{type(job).__name__}: {error}", cut_off=isinstance(error, CutOff))
            except Exception as error:
                log.exception("%s failed", type(job).__name__)
                trouble = f"{known}; " if (known := self.shadow.device.trouble()) else ""
                reason = f"{trouble}{type(job).__name__}: {type(error).__name__}: {error}"
                if isinstance(error, torch.AcceleratorError):
                    self.unfit = reason  # nothing works any more in a process after an error of CUDA's
                self._failed(epoch, reason, fatal=True)
            finally:
                self.in_flight = False
        self._leave()

    def _next_job(self) -> tuple[Job, float] | None:
        """The next job. With time on its hands a spare holds every rank's slice ready; a rank needs its own only."""
        while self._jobs.empty() and self._place is None and self._unprepared:
            if not self._hold_next():
                with suppress(queue.Empty):
                    return self._wait(BUSY_S)
        if self._jobs.empty() and self.step_done:
            self.model.forget_prepared()
        return self._wait()

    def _wait(self, at_most_s: float | None = None) -> tuple[Job, float] | None:
        self.at_rest.set()
        try:
            return self._jobs.get(timeout=at_most_s)
        finally:
            self.at_rest.clear()

    def _hold_next(self) -> bool:
        """Hold one more slice, if there is one that no other process is filling."""
        try:
            for rank in self._unprepared:
                if self._with_weights(rank, self.model.prepare):
                    self._unprepared.remove(rank)
                    if not self._unprepared:
                        log.info("it holds the slices of all %d ranks", self.config.size)
                    return True
        except Exception:
            log.exception("a spare can't hold all slices")
            self._unprepared = []
        return False

    def _failed(self, epoch: int, reason: str, *, fatal: bool = False, cut_off: bool = False) -> None:
        if epoch == self._epoch and self._place is not None:
            self._report(RankFailed(epoch, self._place.assign.rank, reason, fatal, cut_off))

    def _with_weights(self, rank: int, take: Callable[[int], T]) -> T:
        """Load or prepare a rank's slice; a worker that can't is unfit."""
        try:
            return take(rank)
        except Exception as error:
            self.unfit = f"the weights of rank {rank} can't be loaded: {error}"
            raise

    def _assign(self, assign: Assign, received: float) -> None:
        self._leave()
        began = time.monotonic()
        if self._loaded_rank != assign.rank:
            self._with_weights(assign.rank, self.model.load)
            self._loaded_rank = assign.rank
        self._place = Place(assign, received, time.monotonic() - began)
        self.step_done, self._raised = 0, False
        self._sequences.clear()
        self._inventory.begin(assign.epoch, assign.rank)
        if assign.rank == 0:
            self._report(self._meeting.open(assign, self.address))

    def _stand_by(self, job: StandBy) -> None:
        """No rank any more, or still none; with `hold`, slices that are not at hand are read when there is time."""
        self._leave()
        self._unprepared = list(range(self.config.size)) if job.hold and self._holds else []
        self._place, self.step_done = None, 0

    def _prepare(self, job: Prepare) -> None:
        if self._place is None:
            self._with_weights(job.rank, self.model.load)
            self._loaded_rank = job.rank
            self._report(Prepared(job.move))

    def _join(self, join: Join) -> None:
        place, cancelled = self._place, self._cancelled
        if place is None or join.epoch != self._epoch:  # looked at after `cancelled`, which belongs to the epoch
            return
        self._communicator, exchange = self._meeting.connect(place.assign, join, cancelled)
        self.shadow.enter(join.epoch, exchange, self.pool, self.pool.tokens)
        self._report(Joined(join.epoch, place.assign.rank, place.weights_s, time.monotonic() - place.assigned_at))

    def _leave(self) -> None:
        if self._communicator is not None:
            self._communicator.close()
            self._communicator = None
        self._meeting.close()

    def _try_step(self, plan: StepPlan) -> StepDone | StepRaised:
        """A step's result; or that it raised an error, by which nothing is lost but the step, if the device works."""
        try:
            return self.step(plan)
        except (CommunicatorAborted, DeadlineExceeded):
            raise
        except Exception as error:
            if self._place is None:
                raise
            self._raised = True
            log.exception("step %d failed", plan.step)
            reason = f"{type(error).__name__}: {error}"[:REASON_CHARS]
        if self.pool.kv.is_cuda:  # not before now: the error kept what the step had made
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises an error if the device is of no use any more
        entered = self._communicator.entered if self._communicator is not None else 0
        return StepRaised(plan.epoch, plan.step, self._place.assign.rank, reason, entered)

    def step(self, plan: StepPlan) -> StepDone:
        """Run the model over a step's chunks and draw the next tokens; KV goes to the pool."""
        if self._place is None:
            raise RuntimeError("a step without a rank")
        began = time.monotonic()
        waited_before = self._communicator.waited_s if self._communicator is not None else 0.0
        self._step_epoch, self.in_flight = plan.epoch, True
        size = self.config.page_tokens
        parts = self._sequences.take(plan.batch)
        chunks = [part.chunk for part in parts]
        self._inventory.strike(
            plan.epoch,
            (int(page) for each in chunks for page in each.pages[each.start // size : -(-each.end // size)]),
        )
        with torch.inference_mode():
            hidden = self.model.forward(chunks, self.pool, self._communicator)
            pieces = self.model.logits_in_pieces(hidden, self.config.logits_bytes)
            samples = draw(parts, pieces)
        self._sequences.drew(samples)
        if self._communicator is not None:
            self._communicator.check()
        self.step_done = plan.step
        self.shadow.step_done(plan.step)
        seconds = time.monotonic() - began
        waited_s = self._communicator.waited_s - waited_before if self._communicator is not None else 0.0
        return step_done(plan, self._place.assign.rank, samples, seconds, waited_s)

    def _digest(self, plan: DigestPlan) -> DigestDone:
        if self._place is None:
            raise RuntimeError("a digest without a rank")
        value = self.pool.digest(np.frombuffer(plan.pages, dtype="<i4"), plan.tokens)
        return DigestDone(plan.epoch, plan.digest, self._place.assign.rank, value)


def step_done(plan: StepPlan, rank: int, samples: Sequence[Sample], seconds: float, waited_s: float) -> StepDone:
    """A rank's answer to a step: tokens of which there is nothing else to tell go as numbers."""
    plain = [each for each in samples if each.logprob is None and not each.prompt_logprobs]
    return StepDone(
        plan.epoch,
        plan.step,
        rank,
        pack_ids(each.sequence for each in plain),
        pack_ids(each.token for each in plain),
        tuple(each for each in samples if each.logprob is not None or each.prompt_logprobs),
        seconds,
        waited_s,
    )
