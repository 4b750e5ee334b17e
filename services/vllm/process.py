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
from services.vllm.messages import Answer, Build, Built, Call, Host, Place, Placed
from services.vllm.pages import BlockPages
from services.vllm.rank import HostedRank, Steps, run_agent
from services.worker.communicator import create
from services.worker.communicator.base import Communicator
from shared.errors import GhostError

log = logging.getLogger("vllm.ghostserve")

STEPS = ("execute_model", "sample_tokens")
"""While one of these runs, the ranks wait for each other."""


def main(config: bytes, lock: Lock, connection: Connection, name: str) -> None:
    """Serve the engine core until it closes the pipe. `config` is the pickled VllmConfig."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the engine core ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    configure_logging(pickle.loads(config).logging_config)
    set_process_title(name=name)
    decorate_logs(name)
    with torch.inference_mode():
        Process(config, lock, connection, name).serve()


class Process:
    """The main loop: one message of the engine core after the other, on the main thread."""

    def __init__(self, config: bytes, lock: Lock, connection: Connection, name: str):
        self._config = config
        self._lock = lock
        self._connection = connection
        self._name = name
        self._built: dict[int, WorkerWrapperBase] = {}
        self._calls: tuple[tuple[str, tuple[Any, ...]], ...] = ()
        self._rank = -1
        self._epoch = 0
        self._channel: Communicator | None = None
        self._steps = Steps()
        self._sending = threading.Lock()
        self._late: queue.Queue[tuple[Call, AsyncModelRunnerOutput]] = queue.Queue()
        threading.Thread(target=self._send_late, name="outputs", daemon=True).start()

    def serve(self) -> None:
        """Until the engine core is gone."""
        while True:
            try:
                message = messages.receive(self._connection)
            except (EOFError, OSError):
                os._exit(0)  # the engine core is gone; nothing here needs an end
            match message:
                case Call():
                    self._call(message)
                case Place():
                    self._send(self._place(message))
                case Build():
                    self._build(message)
                case Host():
                    self._host(message)

    def _build(self, message: Build) -> None:
        began = time.monotonic()
        self._calls = message.calls
        for rank in message.ranks:
            self._make(rank)
        gc.collect()
        gc.freeze()  # a full collection of what vLLM imports takes 0.3 s, and would come with the first steps
        if len(message.ranks) > 1:
            set_process_title(name=f"{self._name}_spare")
        self._send(Built(time.monotonic() - began, _resident_bytes()))

    def _make(self, rank: int) -> None:
        worker = self._built[rank] = _make(pickle.loads(self._config), rank, self._lock)
        for method, args in self._calls:
            getattr(worker, method)(*args)

    def _place(self, message: Place) -> Placed:
        began = time.monotonic()
        error = ""
        try:
            self._steps.taking = message.hosted_epoch
            self._take(message.rank)
            self._epoch = message.epoch
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            worker = self._built[message.rank].worker
            size = worker.parallel_config.tensor_parallel_size
            self._channel = create("shm", message.address, message.rank, size, timeout=message.timeout_s)
            worker.rejoin(message.epoch, self._channel)
            self._steps.place(message.rank, message.hosted_epoch, self._channel)
        except GhostError as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Placed(message.epoch, message.rank, time.monotonic() - began, error)

    def _take(self, rank: int) -> None:
        if rank != self._rank:
            if rank not in self._built:  # it was started for another one
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
            partial(HostedRank, self._steps, message.info, message.blocks, pages),
        )

    def _call(self, call: Call) -> None:
        if call.epoch != self._epoch:
            return  # of an epoch that is over
        worker = self._built[self._rank]
        self._steps.in_flight = call.method in STEPS
        try:
            function = (
                partial(cloudpickle.loads(call.method), worker)
                if isinstance(call.method, bytes)
                else getattr(worker, call.method)
            )
            value = function(*call.args, **call.kwargs)
        except Exception as error:
            own = not isinstance(error, GhostError)
            log.log(logging.ERROR if own else logging.INFO, "%s: %s", call.method, error, exc_info=own)
            self._send(Answer(call.epoch, call.number, None, f"{type(error).__name__}: {error}", own, str(call.method)))
        else:
            if isinstance(value, AsyncModelRunnerOutput):
                self._late.put((call, value))
            elif call.answer:
                self._send(Answer(call.epoch, call.number, value))
            if call.method == STEPS[-1] or (call.method in STEPS and value is not None):  # the step is complete
                self._let_go()
        finally:
            self._steps.done += self._steps.in_flight
            self._steps.in_flight = False

    def _send_late(self) -> None:
        """Outputs that a GPU is still computing while the next step is already launched (async scheduling)."""
        while True:
            call, output = self._late.get()
            try:
                answer = Answer(call.epoch, call.number, output.get_output())
            except Exception as error:
                words = f"{type(error).__name__}: {error}"
                answer = Answer(call.epoch, call.number, None, words, method=str(call.method))
            if call.answer or answer.error:
                self._send(answer)

    def _send(self, message: messages.Message) -> None:
        with self._sending:
            try:
                messages.send(self._connection, message)
            except OSError:
                os._exit(0)


def _make(config: VllmConfig, rank: int, lock: Lock) -> WorkerWrapperBase:
    """vLLM's worker for a rank, with its weights: what WorkerProc.__init__ does, less the queues."""
    worker = WorkerWrapperBase(rpc_rank=rank, global_rank=rank)
    arguments: list[dict[str, Any]] = [{} for _ in range(config.parallel_config.world_size)]
    arguments[rank] = {
        "vllm_config": config,
        "local_rank": rank,
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
