"""A worker process: holds one rank of vLLM, or, as a warm spare, is ready to become any."""

import gc
import logging
import os
import pickle
import queue
import resource
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from typing import Any

import cloudpickle
import torch
from vllm.config import VllmConfig
from vllm.logger import configure_logging
from vllm.platforms import current_platform
from vllm.utils.system_utils import decorate_logs, set_process_title
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerWrapperBase

from services.vllm import messages
from services.vllm.messages import Answer, Build, Built, Call, End, Host, Place, Placed
from services.vllm.pages import BlockPages
from services.vllm.rank import HostedRank, Steps, channel_kind, run_agent
from services.worker.communicator import create
from services.worker.communicator.base import Communicator
from shared.errors import CommunicatorAborted, GhostError

log = logging.getLogger("vllm.ghostserve")

STEPS = ("execute_model", "sample_tokens")
"""While one of these runs, the ranks wait for each other."""
CAPTURE = "capture_again"
"""Asked of all ranks while no request runs, after a recovery on GPUs."""


def main(config: bytes, lock: Lock, connection: Connection, name: str, place: int | None = None) -> None:
    """Serve the engine core until it closes the pipe. `config` is the pickled VllmConfig; `place` the GPU to use."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the engine core ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    configure_logging(pickle.loads(config).logging_config)
    set_process_title(name=name)
    decorate_logs(name)
    with torch.inference_mode():
        Process(config, lock, connection, name, place).serve()


class Process:
    """The main loop: one message of the engine core after the other, on the main thread."""

    def __init__(self, config: bytes, lock: Lock, connection: Connection, name: str, place: int | None = None):
        self._config = config
        self._lock = lock
        self._connection = connection
        self._name = name
        self._place_on = place
        self._device = torch.device("cpu") if place is None else torch.device("cuda", place)
        self._built: dict[int, WorkerWrapperBase] = {}
        self._calls: tuple[tuple[str, tuple[Any, ...]], ...] = ()
        self._rank = -1
        self._epoch = 0
        self._channel: Communicator | None = None
        self._ended = threading.Event()
        """Set when the epoch, of which the main thread may be waiting for ranks, is over."""
        self._ended_at = 0
        self._epochs = threading.Lock()
        self._steps = Steps()
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[messages.Message] = queue.SimpleQueue()
        self._late: queue.Queue[tuple[Call, AsyncModelRunnerOutput, Communicator | None]] = queue.Queue()
        threading.Thread(target=self._receive, name="inbox", daemon=True).start()
        threading.Thread(target=self._send_late, name="outputs", daemon=True).start()

    def serve(self) -> None:
        """Until the engine core is gone."""
        while True:
            match message := self._inbox.get():
                case Call():
                    self._call(message)
                case Place():
                    self._send(self._place(message))
                case Build():
                    self._build(message)
                case Host():
                    self._host(message)

    def _receive(self) -> None:
        """An epoch's end is heard while the main thread waits for ranks that are gone, or for its device."""
        while True:
            try:
                message = messages.receive(self._connection)
            except (EOFError, OSError):
                os._exit(0)  # the engine core is gone; nothing here needs an end
            except Exception:  # what it says can't be read: without ears this process is of no use
                log.exception("a message of the engine core can't be read")
                os._exit(1)
            if isinstance(message, End):
                with self._epochs:
                    self._ended_at = message.epoch
                    self._ended.set()
                    if self._channel is not None:
                        self._channel.abort()
            else:
                self._inbox.put(message)

    def _build(self, message: Build) -> None:
        began = time.monotonic()
        self._calls = message.calls
        for rank in message.ranks:
            self._make(rank)
        gc.collect()
        gc.freeze()  # a full collection of what vLLM imports takes 0.3 s, and would come with the first steps
        if message.calls:  # the engine has its ranks
            set_process_title(name=f"{self._name}_spare")
        self._send(Built(time.monotonic() - began, _resident_bytes()))

    def _make(self, rank: int) -> None:
        worker = self._built[rank] = _make(pickle.loads(self._config), rank, self._lock, self._place_on)
        for method, args in self._calls:
            getattr(worker, method)(*args)

    def _place(self, message: Place) -> Placed:
        began = time.monotonic()
        error = ""
        try:
            self._steps.taking = message.hosted_epoch
            self._take(message.rank)
            self._epoch = message.epoch
            worker = self._built[message.rank].worker
            worker.leave()
            with self._epochs:
                old, self._channel = self._channel, None
            if old is not None:
                old.close()
            channel = self._connect(message, worker.parallel_config.tensor_parallel_size)
            worker.rejoin(message.epoch, channel)
            self._steps.place(message.rank, message.hosted_epoch, channel)
        except GhostError as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Placed(message.epoch, message.rank, time.monotonic() - began, error)

    def _connect(self, place: Place, size: int) -> Communicator:
        """The channel of the model's ranks. Raises as `create` does, at once where the epoch is over."""
        with self._epochs:
            if self._ended_at > place.epoch:
                raise CommunicatorAborted("the epoch ended before all ranks had come")
            self._ended.clear()
        channel = create(
            channel_kind(self._device), place.address, place.rank, size, timeout=place.timeout_s, cancelled=self._ended
        )
        with self._epochs:
            self._channel, over = channel, self._ended_at > place.epoch
        if over:
            channel.abort()
        return channel

    def _take(self, rank: int) -> None:
        if rank != self._rank:
            if rank not in self._built:  # it was started for another one
                if self._place_on is not None:  # a GPU has room for one
                    self._built.clear()
                    gc.collect()
                    torch.accelerator.empty_cache()
                self._make(rank)
            self._rank = rank
            self._built[rank].worker.groups.install()
            set_process_title(name=f"{self._name}_TP{rank}")

    def _let_go(self) -> None:
        """Give up what a spare held of other ranks: after its first step, since it takes tens of milliseconds."""
        for other in [each for each in self._built if each != self._rank]:
            del self._built[other]

    def _host(self, message: Host) -> None:
        """Serve the coordinator beside the model, as the rank that this is, or as a spare."""
        built = self._built

        def pages(rank: int) -> BlockPages:
            if rank not in built:
                raise GhostError(f"this process was not made for rank {rank}")
            return built[rank].worker.pages()  # type: ignore[no-any-return]

        run_agent(
            message.name,
            partial(HostedRank, self._steps, message.info, message.blocks, pages, self._device),
            device_name=str(self._device),
        )

    def _call(self, call: Call) -> None:
        if call.epoch != self._epoch:
            return  # of an epoch that is over
        worker = self._built[self._rank]
        self._steps.in_flight = call.method in STEPS
        self._steps.begin()
        try:
            function: Callable[..., Any]
            if isinstance(call.method, bytes):
                function = partial(cloudpickle.loads(call.method), worker)
            else:
                function = self._capture_again if call.method == CAPTURE else getattr(worker, call.method)
            value = function(*call.args, **call.kwargs)
            if self._channel is not None and not isinstance(value, AsyncModelRunnerOutput):
                self._channel.check()
        except Exception as error:
            own = not isinstance(error, GhostError)
            log.log(logging.ERROR if own else logging.INFO, "%s: %s", call.method, error, exc_info=own)
            self._send(Answer(call.epoch, call.number, None, f"{type(error).__name__}: {error}", own, str(call.method)))
        else:
            if isinstance(value, AsyncModelRunnerOutput):
                self._late.put((call, value, self._channel))
            elif call.answer:
                self._send(Answer(call.epoch, call.number, value))
            if call.method == STEPS[-1] or (call.method in STEPS and value is not None):  # the step is complete
                self._let_go()
        finally:
            self._steps.end()

    def _send_late(self) -> None:
        """Outputs that a GPU is still computing while the next step is already launched (async scheduling)."""
        while True:
            call, output, channel = self._late.get()
            if self._device.type == "cuda":
                torch.accelerator.set_device_index(self._device)  # of this thread; it is cuda:0 otherwise
            try:
                answer = Answer(call.epoch, call.number, output.get_output())
                if channel is not None:
                    channel.check()  # else it is of what came over a channel that has ended
            except Exception as error:
                words, own = f"{type(error).__name__}: {error}", not isinstance(error, GhostError)
                answer = Answer(call.epoch, call.number, None, words, own, str(call.method))
            if call.answer or answer.error:
                self._send(answer)
            self._late.task_done()

    def _capture_again(self) -> bool | None:
        """While no step is in flight: have steps use CUDA graphs again; see `graphs`."""
        self._late.join()
        return self._built[self._rank].worker.capture_again(self._steps.paused())  # type: ignore[no-any-return]

    def _send(self, message: messages.Message) -> None:
        with self._sending:
            try:
                messages.send(self._connection, message)
            except OSError:
                os._exit(0)


def _make(config: VllmConfig, rank: int, lock: Lock, place: int | None = None) -> WorkerWrapperBase:
    """vLLM's worker for a rank, with its weights: what WorkerProc.__init__ does, less the queues. `place`: its GPU."""
    worker = WorkerWrapperBase(rpc_rank=rank, global_rank=rank)
    arguments: list[dict[str, Any]] = [{} for _ in range(config.parallel_config.world_size)]
    arguments[rank] = {
        "vllm_config": config,
        "local_rank": rank if place is None else place,
        "rank": rank,
        "distributed_init_method": "",
        "is_driver_worker": rank == 0,
        "shared_worker_lock": lock,
    }
    worker.init_worker(arguments)
    worker.init_device()
    worker.load_model()
    current_platform.update_block_size_for_backend(config)
    return worker


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
