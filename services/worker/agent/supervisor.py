"""A host's workers: one parent that has imported everything and forks a process a device, again when one dies.

A fork of a parent that has imported torch and transformers is a ready worker in a fraction of the 4 s of a new process,
and shares its memory for code. The parent runs no event loop and no tensor operation, so that forking it is safe.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time

from services.worker.device_health import DeviceWatch, failure
from services.worker.engine.host_slices import host_memory
from services.worker.identity import host_id
from shared import logs
from shared.channel import dial
from shared.config import WorkerSettings, default_name
from shared.errors import GhostError
from shared.messages import Goodbye, WorkerHello
from shared.service import EXIT_CONFIG, die_with_parent, run_service
from shared.tls import client_context

log = logging.getLogger(__name__)

SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGALRM}
STOP_DEADLINE_S = 10.0
RESTART_PAUSE_S = 0.5
"""Before a dead worker is restarted: the recovery that its death began has the processors first."""
QUICK_DEATH_S = 5.0
MAX_BACKOFF_S = 10.0


def supervise(settings: WorkerSettings) -> int:
    """Run `settings.count` workers until SIGTERM or SIGINT; restart each that dies, as a spare. Returns an exit code.

    A worker that dies within QUICK_DEATH_S of its start is restarted after a pause that doubles each time. When all
    say that their settings or the model are wrong, the supervisor ends with the same exit code; where some do, because
    files were changed while others serve, they are tried again now and then.
    """
    logs.configure("supervisor", settings.log_level, as_json=settings.log_json)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages, which a dying process gives back sooner
    import services.worker.agent.app  # noqa: F401  what the forks share

    gc.freeze()  # no fork looks through it again: that takes 0.3 s, and writes to memory that is shared

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if settings.device.startswith("cuda"):
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML counts them
    host = _Host(settings)
    for place in range(settings.count):
        host.start(place)
    return host.watch()


class _Host:
    """The processes of one host: place -> pid."""

    def __init__(self, settings: WorkerSettings):
        self._settings = settings
        self._devices = {
            place: int(_device(settings.device, place).partition(":")[2] or 0)
            for place in range(settings.count)
            if settings.device != "cpu"
        }
        self._watch = DeviceWatch(set(self._devices.values()))
        self._prefix = settings.name or f"{default_name('worker')}-{os.urandom(2).hex()}"  # others may be on this host
        self._pids: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._telling: set[int] = set()  # processes that tell the coordinator of a device that has failed
        self._started: dict[int, float] = {}
        self._backoff: dict[int, float] = {}
        self._due: dict[int, float] = {}
        self._stopped: dict[int, float] = {}
        self._wrong: set[int] = set()  # places whose last worker said that settings or model are wrong
        self._serial = 0
        self._host_memory = host_memory() if settings.hold_weights else None

    def start(self, place: int) -> None:
        self._serial += 1
        name = f"{self._prefix}-{place}.{self._serial}"
        pid = os.fork()
        if pid == 0:
            os._exit(_child(self._settings, name, _device(self._settings.device, place), self._host_memory))
        self._pids[place], self._names[place] = pid, name
        self._started[place] = time.monotonic()
        self._due.pop(place, None)
        self._wrong.discard(place)

    def watch(self) -> int:
        while True:
            now = time.monotonic()
            for place, due in list(self._due.items()):
                if due <= now:
                    self.start(place)
            grace_s = self._settings.stop_grace_s
            ends = [since + grace_s for since in self._stopped.values()] if grace_s else []
            pause = min((due - now for due in (*self._due.values(), *ends)), default=3600.0)
            if next_signal(pause) in (signal.SIGTERM, signal.SIGINT):
                return self._stop()
            if self._reap():
                self._stop()
                return EXIT_CONFIG
            if not self._pids and not self._due and not self._telling:
                log.error("no device is left")
                return 1
            if grace_s:
                self._kill_stopped(time.monotonic() - grace_s)

    def _kill_stopped(self, before: float) -> None:
        """Kill workers that stopped before this time: their peers wait for them in a collective, and are free then."""
        for place, since in list(self._stopped.items()):
            if since <= before:
                log.warning("worker %d (pid %d) stays stopped: it is killed", place, self._pids[place])
                os.kill(self._pids[place], signal.SIGKILL)
                del self._stopped[place]

    def _reap(self) -> bool:
        """Take note of the workers that stopped, go on, or died. True if all say that their settings are wrong."""
        self._telling = {pid for pid in self._telling if not os.waitpid(pid, os.WNOHANG)[0]}
        for place, pid in list(self._pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not done:
                continue
            if os.WIFSTOPPED(status):
                self._stopped.setdefault(place, time.monotonic())
                continue
            self._stopped.pop(place, None)
            if os.WIFCONTINUED(status):
                continue
            del self._pids[place]
            code = os.waitstatus_to_exitcode(status)
            lived = time.monotonic() - self._started[place]
            pause = RESTART_PAUSE_S
            if code == EXIT_CONFIG:
                self._wrong.add(place)
                pause = MAX_BACKOFF_S
            elif lived < QUICK_DEATH_S:
                pause = min(MAX_BACKOFF_S, max(2 * RESTART_PAUSE_S, 2 * self._backoff.get(place, 0.0)))
            self._backoff[place] = 0.0 if pause == RESTART_PAUSE_S else pause
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if why := failure(self._watch.health(self._devices[place])) if place in self._devices else "":
                log.error("worker %d (pid %d) died with %s: %s. It is not started again", place, pid, how, why)
                self._tell(place, pid, why)
                continue
            self._due[place] = time.monotonic() + pause
            log.warning(
                "worker %d (pid %d) died with %s after %.1f s; restarted in %.1f s", place, pid, how, lived, pause
            )
        return len(self._wrong) == self._settings.count

    def _tell(self, place: int, died: int, why: str) -> None:
        """Have the coordinator told why a worker died, in its name: by a fork, since this process has no event loop."""
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            hello = WorkerHello(
                self._names[place], socket.gethostname(), host_id(), died, f"cuda:{self._devices[place]}"
            )
            os._exit(asyncio.run(tell_of_death(self._settings, hello, why)))
        self._telling.add(pid)

    def _stop(self) -> int:
        for pid in self._pids.values():
            os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + STOP_DEADLINE_S
        late = False
        for pid in self._pids.values():
            while not os.waitpid(pid, os.WNOHANG)[0]:
                if time.monotonic() > end:
                    late = True
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    break
                signal.sigtimedwait({signal.SIGCHLD}, 0.1)
        return 1 if late else 0


async def tell_of_death(settings: WorkerSettings, worker: WorkerHello, why: str) -> int:
    """Say goodbye to the coordinator for a worker that can't any more. Returns an exit code."""
    tls, url, limit_s = client_context(settings.tls_ca_file), settings.coordinator_url, settings.dial_deadline_s
    try:
        async with dial(url, settings.secret, lambda _: worker, limit_s, tls) as (channel, _):
            channel.send(Goodbye(why))
            with contextlib.suppress(GhostError):
                while not isinstance(await channel.receive(limit_s), Goodbye):  # its answer
                    pass
    except GhostError as error:
        log.error("the coordinator is not told that %s: %s", why, error)
        return 1
    return 0


def next_signal(within_s: float) -> int:
    """Wait for the next of SIGNALS, which are blocked: SIGALRM when this time has passed.

    CPython's sigtimedwait won't do: of a process that was stopped past the time, it returns memory that nobody wrote.
    """
    signal.setitimer(signal.ITIMER_REAL, max(within_s, 1e-6))
    return signal.sigwaitinfo(SIGNALS).si_signo


def _device(device: str, place: int) -> str:
    return f"cuda:{place}" if device == "cuda" else device


def _child(settings: WorkerSettings, name: str, device: str, host_memory: int | None) -> int:
    """The life of one worker process."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    import torch

    from services.worker.agent.app import run

    if device == "cpu":
        threads = settings.threads or max(1, (os.cpu_count() or 1) // settings.count)
        torch.set_num_threads(threads)

    async def service(stop: asyncio.Event) -> None:
        await run(settings, name, device, host_memory, stop)

    return run_service(f"worker {name}", service, settings)
