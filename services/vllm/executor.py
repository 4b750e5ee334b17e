"""vLLM's executor over ranks that come and go. Named to vLLM by --distributed-executor-backend."""

import logging
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle
import vllm
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, set_multiprocessing_worker_envs
from vllm.v1.outputs import ModelRunnerOutput

from services.vllm import flags, versions
from services.vllm.alone import Alone
from services.vllm.calls import Calls
from services.vllm.crew import Crew, Member
from services.vllm.hosted import Hosted
from services.vllm.link import EngineFailed, HostedScheduler, Loss, link_of
from services.vllm.messages import Answer, Build, Built, Call, End, Host, Message, Place, Placed
from services.vllm.model import is_alike, model_info
from services.vllm.places import Places
from services.vllm.process import CAPTURE
from services.vllm.recapture import Graphs
from services.worker.communicator import RendezvousHandle, open_rendezvous
from services.worker.communicator.base import Kind
from services.worker.device_health import DeviceWatch, failure
from shared.errors import ConfigError
from shared.messages import Message as ControlMessage
from shared.types import ModelInfo

log = logging.getLogger("vllm.ghostserve")

END_S = 10.0
"""How long an engine core whose API server is gone may take to end."""
STEP_S = 60.0
"""A rank waits no longer for the others in a step."""
SETUP = (
    "update_max_model_len",
    "set_kv_cache_layout",
    "determine_available_memory",
    "initialize_from_config",
    "compile_or_warm_up_model",
)
"""What the engine core asks of its workers when it starts; a worker that comes later is asked the same."""
STEP = ("execute_model", "sample_tokens", "take_draft_token_ids")


class CallLost(EngineFailed):
    """A call that is no step did not outlive its epoch."""


class LostStep(ModelRunnerOutput):
    """The output of a step that its epoch did not outlive: nothing was computed."""


LOST = LostStep(req_ids=[], req_id_to_index={})


class GhostExecutor(MultiprocExecutor):
    """Calls to the ranks, and their ranks' exchange for others while calls wait. Who is a rank is decided elsewhere."""

    supports_pp = False

    def _init_executor(self) -> None:
        layout, platform = os.environ.get("VLLM_KV_CACHE_LAYOUT"), str(current_platform.device_type)
        if refusal := versions.check(vllm.__version__) or flags.refusal(self.vllm_config, platform, layout):
            raise ConfigError(refusal)
        self._finalizer = weakref.finalize(self, self.shutdown)
        if (parent := multiprocessing.parent_process()) is not None:
            threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
        self.is_failed = False
        self.failure_callback = None
        self._get_parallel_sizes()
        self.output_rank = self._get_output_rank()
        set_multiprocessing_worker_envs(self.local_world_size)
        self._link = link_of(self.vllm_config.instance_id)
        self._calls = Calls(_lost)
        self._setup: list[tuple[str, tuple[Any, ...]]] = []
        self._ranks: list[Member] = []
        self._meeting: RendezvousHandle | None = None
        self._step_epoch = 0
        stop_grace_s = float(os.environ.get("GHOST_STOP_GRACE_S", "0.5"))
        self._crew = Crew(self.vllm_config, self._heard, self._gone, stop_grace_s)
        spares = int(os.environ.get("GHOST_SPARES", "1"))
        self._kind: Kind = "shm"
        self._places: Places | None = None
        if platform == "cuda":
            count = int(current_platform.device_count())
            watch = DeviceWatch(range(count))
            self._places = Places(count, lambda place: failure(watch.health(place)))
            self._kind, spares = "nccl", 0  # a GPU has no room for the weights of every rank
        self._graphs = Graphs(self._capture_again, self._is_idle)
        self._decider = (
            Hosted(self, spares, f"vLLM {vllm.__version__}", float(os.environ.get("GHOST_PATIENCE_S", "120")))
            if os.environ.get("GHOST_COORDINATOR_URL")
            else Alone(self, spares)
        )
        self._link.wait_open()

    # -- what vLLM's engine core calls -------------------------------------------------------------------------------

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        kv_output_aggregator: object = None,
        ec_output_aggregator: object = None,
    ) -> Any:
        """As MultiprocExecutor's. While ranks are exchanged it waits; a step that is lost ends as LOST."""
        epoch = self._link.wait_open()
        name = method if isinstance(method, str) else getattr(method, "__name__", "callable")
        if name == "execute_model":
            self._step_epoch = getattr(args[0], "ghost_epoch", epoch)
        if name in STEP and self._step_epoch != epoch:
            lost: Future[Any] = Future()
            lost.set_result(_lost(name))
            return lost if non_block else lost.result()
        sent = method if isinstance(method, str) else cloudpickle.dumps(method)
        while True:
            future = self._issue(epoch, name, sent, args, kwargs or {}, unique_reply_rank)
            if non_block:
                return future
            try:
                value = future.result(None if name in STEP else timeout)
            except CallLost:  # it is asked again, of those that are the ranks now
                epoch = self._link.wait_open()
                continue
            if name in SETUP:
                self._setup.append((name, args))
                if name == SETUP[-1]:
                    self._decider.may_spare()
            return value

    def _issue(
        self,
        epoch: int,
        name: str,
        sent: str | bytes,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        only: int | None,
    ) -> Future[Any]:
        wanted = tuple(range(self.world_size)) if only is None else (only,)

        def tell(number: int) -> None:
            for rank, member in enumerate(self._ranks):
                member.tell(Call(epoch, number, sent, args, kwargs, rank in wanted))

        return self._calls.issue(epoch, name, wanted, only is not None, tell)

    def shutdown(self) -> None:
        """End all workers."""
        if not getattr(self, "shutting_down", False):
            self.shutting_down = True
            if (decider := getattr(self, "_decider", None)) is not None:
                decider.close()
            self._link.fail("the engine is shutting down")
            self._calls.release(EngineFailed("the engine is shutting down"))
            self._ensure_worker_termination(self._crew.close())

    # -- what is heard of workers, on the crew's thread --------------------------------------------------------------

    def _heard(self, member: Member, message: Message) -> None:
        match message:
            case Answer() if member in self._ranks:
                failed = self._calls.answered(self._ranks.index(member), message)
                if message.error and message.own and message.method not in STEP:
                    self._calls.fail_one(message.number, EngineFailed(message.error))  # whoever asked is told
                elif failed is not None:
                    self._decider.failed(member, message.epoch, f"{failed}: {message.error}", message.own)
            case Built():
                log.info(
                    "%s is ready after %.1f s, %.0f MiB", member.name, message.seconds, message.resident_bytes / 2**20
                )
                self._decider.built(member)
            case Placed():
                self._decider.placed(message)

    def _gone(self, member: Member) -> None:
        if self._places is not None and member.place is not None:
            member.device_failed = self._places.give_back(member.place)
        if not getattr(self, "shutting_down", False):
            self._decider.gone(member)

    # -- what is decided about ranks ---------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Ranks of the engine."""
        return int(self.world_size)

    def start(self, ranks: tuple[int, ...]) -> Member | None:
        """Start a worker process for any of these ranks, on a GPU for one of them; None: no GPU is free for it."""
        place = None
        if self._places is not None:
            if (taken := self._places.take(ranks)) is None:
                return None
            place, ranks = taken.place, (taken.rank,)
        member = self._crew.start(ranks[0] if len(ranks) == 1 else None, place)
        member.tell(Build(ranks, tuple(self._setup)))
        return member

    def quiesce(self, epoch: int) -> None:
        """No further step; those in flight end without effect when the engine resumes."""
        self._link.quiesce(epoch)
        self._calls.end(epoch)
        for member in self._ranks:
            member.tell(End(epoch))

    def place(self, epoch: int, ranks: list[Member], hosted_epoch: int = 0) -> None:
        """Tell each worker which rank it is, and where all meet."""
        self.quiesce(epoch)
        if self._meeting is not None:
            self._meeting.close()
        meeting = open_rendezvous(self._kind, len(ranks))
        self._meeting, self._ranks = meeting, ranks
        self._graphs.lost(any(name == SETUP[-1] for name, _ in self._setup) and self._kind == "nccl")
        for rank, member in enumerate(ranks):
            member.tell(Place(epoch, rank, meeting.address, STEP_S, hosted_epoch))

    def resume(self, loss: Loss) -> None:
        """Step again, as if the lost steps had not been."""
        if self._link.scheduler is not None:
            self._link.scheduler.roll_back(loss)
        self._link.resume(loss.epoch)
        self._calls.release()

    def rest(self) -> None:
        """Called now and then while steps are taken: what is done while no request runs."""
        self._graphs.look(time.monotonic())

    def _is_idle(self) -> bool:
        load = scheduler.load() if (scheduler := self._link.scheduler) is not None else None
        return load is not None and not load.running and not load.waiting

    def _capture_again(self) -> Future[Any]:
        return self._issue(self._link.epoch, CAPTURE, CAPTURE, (), {}, None)

    @property
    def scheduler(self) -> HostedScheduler | None:
        """The scheduler of the same engine core, once it is made."""
        return self._link.scheduler

    def when_scheduled(self, attached: Callable[[], None]) -> None:
        """Call this once there is a scheduler."""
        self._link.when_attached(attached)

    def tells(self, tell: Callable[[ControlMessage], None]) -> None:
        """What the scheduler tells of its blocks goes there."""
        self._link.tells(tell)

    def host(self, member: Member, name: str) -> None:
        """Have a worker dial the coordinator."""
        info, blocks, *_ = self.hosted_model()
        member.tell(Host(name, info, blocks))

    def kill(self, member: Member) -> None:
        """End a worker that is a rank no more."""
        member.kill()

    def alike(self) -> bool:
        """Whether all ranks hold the same KV."""
        return is_alike(self.vllm_config)

    def hosted_model(self) -> tuple[ModelInfo, int, int, int]:
        """What the coordinator is told: the model, the number of blocks, and the tokens of one and of a step."""
        (configs,) = next(args for name, args in self._setup if name == "initialize_from_config")
        return model_info(self.vllm_config, configs[0])

    def fail(self, reason: str) -> None:
        """The end that vLLM has for an engine whose workers died."""
        if self.is_failed:
            return
        log.error("%s", reason)
        self.is_failed = True
        self._link.fail(reason)
        self._calls.release(EngineFailed(reason))
        if self.failure_callback is not None:
            callback, self.failure_callback = self.failure_callback, None
            callback()


def _end_with(parent: BaseProcess) -> None:
    """End the engine core when its API server is gone, however that ended: nobody else could use it, or end it."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os._exit(1)


def _lost(method: str) -> Any:
    if method == "take_draft_token_ids":
        return None
    if method in STEP:
        return LOST
    raise CallLost(f"{method}: a rank was lost meanwhile")
