"""`ghostserve vllm serve`: vLLM with its ranks protected, and what protects them, until Ctrl-C. Imports no vllm."""

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import Field
from rich.console import Console

from services.cli.child import Child, Command, start
from services.cli.local import POLL_S, REST_DEADLINE_S, LocalCluster, ServeSettings
from shared.config import Port, Seconds, add_flags
from shared.errors import ConfigError, DeadlineExceeded, GhostError

FLAGS = (
    "parity", "spares", "stores", "store_memory_mb", "protection", "restore", "transport", "port", "patience_s",
    "coordinator_url", "redis_url", "log_dir", "log_level", "record", "allow_faults",
)  # fmt: skip
"""Those of the settings that this command has as flags."""
PREFIX = "--ghost-"
SERVING_DEADLINE_S = 900.0
"""For large weights; vLLM itself says how far it is."""
_SET_UP = (
    "vLLM is not installed in this environment: `make vllm-setup` makes one with it, "
    "where this command is .venv-vllm/bin/ghostserve"
)


class VllmSettings(ServeSettings):
    """What protects one vLLM on this machine."""

    port: Port = Field(8001, description="port of the status page; 0 takes a free one")
    patience_s: Seconds = Field(
        120.0,
        description="how long vLLM stands still after a loss, for want of a coordinator or a worker, until it ends",
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """Of the flags of `vllm serve`, what has to be known here too."""

    model: str
    ranks: int
    url: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags; all others are vLLM's."""
    parser.usage = f"ghostserve vllm serve MODEL [any flag of vllm serve] [{PREFIX}FLAG VALUE ...]"
    parser.description = (
        "Run `vllm serve` with tensor-parallel ranks that may be lost: the streams go on with the same tokens. Starts "
        "Redis, a coordinator, parity stores and a status page beside it, unless a coordinator's address is given. "
        "Every flag that does not begin with --ghost- is vLLM's."
    )
    add_flags(
        parser, VllmSettings, prefix=PREFIX, skip=[name for name in VllmSettings.model_fields if name not in FLAGS]
    )


def asked(arguments: Sequence[str]) -> Asked:
    """Look at vLLM's flags without vLLM. Raises ConfigError where that can't do."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "--tensor_parallel_size", "-tp", type=int)
    parser.add_argument("--served-model-name", "--served_model_name", nargs="+")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="")
    parser.add_argument("--config", default="")
    parser.add_argument("--ssl-certfile", "--ssl_certfile")
    try:
        known, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"vllm serve: {error}") from None
    if known.config and known.tensor_parallel_size is None:
        raise ConfigError("with --config FILE, say --tensor-parallel-size on the command line: it is needed here too")
    model = rest[0] if rest and not rest[0].startswith("-") else ""
    host = "127.0.0.1" if known.host in ("", "0.0.0.0", "::") else known.host
    url = f"{'https' if known.ssl_certfile else 'http'}://{host}:{known.port}"
    names = known.served_model_name or [model or "vllm"]
    return Asked(names[0], known.tensor_parallel_size or 1, url)


def vllm_arguments(settings: ServeSettings, model: Path) -> tuple[str, ...]:
    """Flags for a vLLM that is to be broken: on a free port, in the same numbers every time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return (
        str(model), "--served-model-name", settings.served_name or model.name, "--host", "127.0.0.1",
        "--port", str(port), "--tensor-parallel-size", str(settings.tp), "--dtype", settings.dtype,
        "--enforce-eager", "--block-size", "32", "--max-num-seqs", str(settings.max_batch),
    )  # fmt: skip


def engine_command(settings: VllmSettings, arguments: Sequence[str], coordinator_url: str, log: Path | None) -> Command:
    """How vLLM is started. `log`: where its output goes; None: to the terminal."""
    environment = dict(os.environ) | {
        "GHOST_COORDINATOR_URL": coordinator_url,
        "GHOST_SPARES": str(settings.spares),
        "GHOST_PATIENCE_S": str(settings.patience_s),
        "GHOST_TRANSPORT": settings.transport,
        "GHOST_LOG_LEVEL": settings.log_level,
        "GHOST_ALLOW_FAULTS": str(settings.allow_faults),
        "GHOST_FAULT_DIR": settings.fault_dir,
    }
    if settings.secret:
        environment["GHOST_TOKEN"] = settings.secret
    return Command("vllm", (sys.executable, "-m", "services.vllm.serve", *arguments), environment, log)


@dataclass(eq=False)
class VllmCluster(LocalCluster):
    """What protects, and a vLLM whose ranks are protected, which serves requests on a port of its own."""

    settings: VllmSettings
    hosted: bool = True
    arguments: tuple[str, ...] = ()
    """Of `vllm serve`."""
    on_terminal: bool = False
    engine: Child | None = None

    @property
    def api_url(self) -> str:
        """vLLM's URL."""
        return asked(self.arguments).url

    async def _start(self) -> None:
        await super()._start()
        self.narrate("starting vllm")
        log = None if self.on_terminal else self.log_dir / "vllm.log"
        self.engine = await start(engine_command(self.settings, self.arguments, self.coordinator_url, log))

    async def wait_serving(self, deadline_s: float) -> dict[str, Any]:
        """As LocalCluster's; and until vLLM's own API answers."""
        end = time.monotonic() + deadline_s
        status = await super().wait_serving(deadline_s)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(REST_DEADLINE_S)) as session:
            while not await self._is_up(session):
                await self.check_alive()
                if time.monotonic() > end:
                    raise DeadlineExceeded(f"{self.api_url}/health does not answer")
                await asyncio.sleep(POLL_S)
        return status

    async def _is_up(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(self.api_url + "/health", ssl=False) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def check_alive(self) -> None:
        """As LocalCluster's; of vLLM too."""
        if self.engine is not None and not self.engine.alive:
            raise await self.engine.failure()
        await super().check_alive()

    def logs(self) -> str:
        """The ends of all logs."""
        own = f"-- vllm --\n{self.engine.log_tail()}\n" if self.engine is not None else ""
        return own + super().logs()

    async def stop(self) -> None:
        """End vLLM, then what protects it."""
        if self.engine is not None:
            await self.engine.end()
        await super().stop()


def check_installed() -> None:
    """Raise ConfigError where there is no vLLM, with what to do about it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(_SET_UP)


def serve(settings: VllmSettings, arguments: Sequence[str]) -> int:
    """Run until vLLM ends, or Ctrl-C or SIGTERM. Returns vLLM's exit code. Raises GhostError if nothing could start."""
    check_installed()
    return asyncio.run(_serve(settings, arguments))


async def _serve(settings: VllmSettings, arguments: Sequence[str]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if "coordinator_url" in settings.model_fields_set:
        engine = await start(engine_command(settings, arguments, settings.coordinator_url, None))
        try:
            await _either(engine, stop)
        finally:
            await engine.end()
        return _code(engine)
    wanted = asked(arguments)
    settings = settings.model_copy(update={"tp": wanted.ranks, "served_name": wanted.model, "model": wanted.model})
    console = Console(stderr=True)
    cluster = VllmCluster(
        settings,
        Path(wanted.model),
        lambda text: console.print(f"ghostserve: {text}", style="dim", highlight=False),
        arguments=tuple(arguments),
        on_terminal=True,
    )
    async with cluster:
        assert cluster.engine is not None
        beside = [asyncio.create_task(_greet(cluster, console)), asyncio.create_task(_keep(cluster, console))]
        try:
            await _either(cluster.engine, stop)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        console.print("ghostserve: stopping", style="dim")
    return _code(cluster.engine)


async def _either(engine: Child, stop: asyncio.Event) -> None:
    """Until vLLM has ended, or is to."""
    waiting = [asyncio.create_task(engine.process.wait()), asyncio.create_task(stop.wait())]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def _code(engine: Child) -> int:
    """Its exit code, as a shell tells it."""
    code = engine.process.returncode or 0
    return code if code >= 0 else 128 - code


async def _keep(cluster: VllmCluster, console: Console) -> None:
    """Restart what protects when it dies; when that is of no use any more, vLLM goes on without."""
    try:
        await cluster.keep()
    except GhostError as error:
        console.print(f"ghostserve: vLLM goes on unprotected: {error}", style="bold red", highlight=False)


async def _greet(cluster: VllmCluster, console: Console) -> None:
    """Say where everything is, once its ranks are protected."""
    try:
        status = await cluster.wait_serving(SERVING_DEADLINE_S)
    except GhostError as error:
        console.print(f"ghostserve: {error}", style="bold red", highlight=False)
        return
    settings = cluster.settings
    body = json.dumps({"model": status["served_name"], "max_tokens": 48,
                       "messages": [{"role": "user", "content": "Why is the sky blue?"}]})  # fmt: skip
    console.print(
        f"\n[bold]{status['served_name']}[/bold] in {status['engine']} on {settings.tp} ranks, {settings.spares} "
        f"spare(s), {settings.stores} parity store(s), protection {settings.protection}\n\n"
        f"Base URL   [bold]{cluster.api_url}/v1[/bold]\n"
        f"Status     [bold]{cluster.base_url}/[/bold]   (ghostserve status --url {cluster.base_url}; logs of what "
        f"protects: {cluster.log_dir})\n",
        soft_wrap=True,
    )
    console.print(
        f"curl {cluster.api_url}/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '{body}'\n\n"
        "Ctrl-C stops all of it.",
        soft_wrap=True,
        markup=False,
    )
