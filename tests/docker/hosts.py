"""A cluster of several hosts on one machine: each host is a network namespace with an address on a bridge.

A host is a container that holds the namespace, and the services of that host are containers of the compose files in
docker/hosts, with that namespace for the host's network. So a host can be cut off, and its containers be killed, paused
and restarted, one or all.
"""

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.docker.engine import docker, run
from tests.docker.image import ROOT

DOCKER = ROOT / "docker"
NETWORK = "lan"
TOKEN = "0123456789abcdef"
WHOLE_S = 120.0
SETTINGS = {
    "GHOST_MODEL": "/models/tiny",
    "GHOST_DTYPE": "float32",
    "GHOST_TP": "3",
    "GHOST_PARITY": "2",
    "GHOST_RESTORE": "always",
    "GHOST_KV_MEMORY_MB": "16",
    "GHOST_CAPACITY_MB": "64",
    "GHOST_THREADS": "1",
    "GHOST_RECORD_DIR": "/data",
}


@dataclass(slots=True)
class Host:
    """A host: its place on the network, and the containers of its services.

    A container is known by its compose project, and those of the control host by their services.
    """

    name: str
    address: str
    containers: dict[str, str] = field(default_factory=dict)


class Hosts:
    """Hosts for control, 2 gateways, 2 stores, and 3 with 6 workers: for 3 ranks and 2 parity shards."""

    def __init__(self, engine: str, image: str, models: Path, folder: Path):
        self._engine = engine
        self._image = image
        self._models = models
        self._folder = folder
        self._subnet = ""
        self.hosts: dict[str, Host] = {}

    # -- start and end -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all hosts, and wait until the group serves."""
        self._make_network()
        control = await self.add_host("control", {"control": "control"})
        assert control.address
        parts: dict[str, dict[str, str]] = {
            "gateway-a": {"gateway-a": "gateway"},
            "gateway-b": {"gateway-b": "gateway"},
            "store-a": {"store-a": "store"},
            "store-b": {"store-b": "store"},
            "worker-a": {"a1": "worker", "a2": "worker"},
            "worker-b": {"b": "worker"},
            "worker-c": {"c": "worker"},
        }
        await asyncio.gather(*(self.add_host(name, services) for name, services in parts.items()))
        await self.whole()

    def _make_network(self) -> None:
        """A bridge whose subnet Docker has picked, named so that hosts can have fixed addresses on it."""
        self._docker("network", "create", NETWORK)
        configuration = json.loads(self._docker("network", "inspect", NETWORK))[0]["IPAM"]["Config"][0]
        self._docker("network", "rm", NETWORK)
        self._subnet = configuration["Subnet"]
        self._docker("network", "create", "--subnet", self._subnet, NETWORK)

    async def add_host(self, name: str, services: Mapping[str, str]) -> Host:
        """Start a host and its services: compose project -> file of docker/hosts."""
        prefix = self._subnet.rsplit(".", 1)[0]
        host = self.hosts[name] = Host(name, f"{prefix}.{10 + len(self.hosts)}")
        await self.docker(
            "run", "--detach", "--init", "--name", name, "--hostname", name, "--network", NETWORK, "--ip", host.address,
            "--no-healthcheck", "--entrypoint", "sleep", self._image, "infinity",
        )  # fmt: skip
        for project, file in services.items():
            settings = {
                "GHOST_COORDINATOR": self.hosts["control"].address,
                "GHOST_TOKEN": TOKEN,
                "GHOST_API_KEYS": TOKEN,
                "GHOST_OPERATOR_TOKEN": TOKEN,
                "GHOST_IMAGE": self._image,
                "GHOST_NETWORK": f"container:{name}",
                "GHOST_MODELS": str(self._models),
                **SETTINGS,
            }
            if file == "worker":
                settings |= {"GHOST_NAME": project, "GHOST_COUNT": "1" if project.startswith("a") else "2"}
            folder = shutil.copytree(DOCKER / "hosts", self._folder / project)
            write_env(folder, settings)
            await asyncio.to_thread(
                compose, self._engine, folder / f"{file}.yml", project, "up", "--detach", "--no-build"
            )
            listed = self._docker("ps", "-a", "--filter", f"label=com.docker.compose.project={project}",
                                  "--format", '{{.Label "com.docker.compose.service"}} {{.Names}}')  # fmt: skip
            for service, container in (line.split() for line in listed.splitlines()):
                host.containers[service if file == "control" else project] = container
        return host

    # -- what happens to them ----------------------------------------------------------------------------------------

    def _docker(self, *arguments: str) -> str:
        return docker(self._engine, *arguments)

    async def docker(self, *arguments: str) -> str:
        """Run the docker client without stopping the streams."""
        return await asyncio.to_thread(docker, self._engine, *arguments)

    async def kill_host(self, name: str) -> None:
        """All containers of a host die at once."""
        await self.docker("kill", *self.hosts[name].containers.values(), name)

    async def revive_host(self, name: str) -> None:
        """The host comes back, with its services."""
        await self.docker("start", name)
        await self.docker("start", *self.hosts[name].containers.values())

    async def drain(self, project: str) -> None:
        """Move all ranks of a worker container elsewhere, as an operator does before an upgrade."""
        while here := [rank for rank, where in (await self.ranks()).items() if where == project]:
            await _ghostserve("drain", f"rank:{here[0]}", "--url", self.urls[0])

    async def drain_store(self, name: str) -> None:
        """Have a store emptied; it ends when it is, and Docker starts it again."""
        inspect = ("inspect", "--format", "{{.RestartCount}}", self.containers[name])
        before = await self.docker(*inspect)
        await _ghostserve("store", "drain", "--url", f"http://{self.hosts[name].address}:8201")
        async with asyncio.timeout(WHOLE_S):
            while await self.docker(*inspect) == before:
                await asyncio.sleep(0.1)

    async def disconnect(self, name: str) -> None:
        """The host's link to all others is cut."""
        await self.docker("network", "disconnect", "--force", NETWORK, name)

    async def connect(self, name: str) -> None:
        """The link is back."""
        await self.docker("network", "connect", "--ip", self.hosts[name].address, NETWORK, name)

    async def blackhole(self, name: str, others: list[str], *, end: bool = False) -> None:
        """What `name` sends to these hosts is dropped, silently, though both still reach all the rest."""
        pid = (await self.docker("inspect", "--format", "{{.State.Pid}}", name)).strip()
        for other in others:
            route = ["ip", "route", "del" if end else "add", "blackhole", f"{self.hosts[other].address}/32"]
            await asyncio.to_thread(run, ["nsenter", "--target", pid, "--net", *route])

    # -- what they say -----------------------------------------------------------------------------------------------

    @property
    def urls(self) -> list[str]:
        """The gateways' URLs."""
        return [f"http://{self.hosts[name].address}:8000" for name in ("gateway-a", "gateway-b")]

    async def status(self) -> dict[str, Any]:
        """The cluster's status, of the first gateway that has one. Raises aiohttp.ClientError if there is none."""
        for url in self.urls[:-1]:
            with suppress(aiohttp.ClientError, TimeoutError):
                return await self._status(url)
        return await self._status(self.urls[-1])

    async def _status(self, url: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        timeout = aiohttp.ClientTimeout(5.0)
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(url + "/v1/fault_tolerance/status") as response,
        ):
            response.raise_for_status()
            body: dict[str, Any] = await response.json()
            return body

    async def whole(self) -> dict[str, Any]:
        """Wait until the group serves with all its workers and stores, and nothing waits for protection."""
        end = time.monotonic() + WHOLE_S
        trouble = ""
        while time.monotonic() < end:
            try:
                status = await self.status()
                trouble = _trouble(status) or await self._gateways_trouble()
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble = f"{type(error).__name__}: {error}"
            if not trouble:
                return status
            await asyncio.sleep(0.1)
        raise AssertionError(f"not whole after {WHOLE_S:.0f} s: {trouble}\n{await self.logs()}")

    async def _gateways_trouble(self) -> str:
        """What keeps a gateway from serving; empty if nothing."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5.0)) as session:
            for url in self.urls:
                async with session.get(url + "/health") as response:
                    if response.status != 200:
                        return await response.text()
        return ""

    async def ranks(self) -> dict[int, str]:
        """The compose project that each rank runs in."""
        workers = (await self.status())["workers"]
        return {each["rank"]: each["name"].rsplit("-", 1)[0] for each in workers if each["rank"] is not None}

    @property
    def containers(self) -> dict[str, str]:
        """The containers of all hosts."""
        return {key: container for host in self.hosts.values() for key, container in host.containers.items()}

    def host_of(self, project: str) -> str:
        """The host that a project's container runs on."""
        return next(host.name for host in self.hosts.values() if project in host.containers)

    async def exit_codes(self) -> dict[str, int]:
        """How each container ended, or 0 while it runs."""
        shown = await self.docker("inspect", "--format", "{{.State.ExitCode}}", *self.containers.values())
        return dict(zip(self.containers, map(int, shown.split()), strict=True))

    async def logs(self) -> str:
        """The ends of all services' logs."""
        ends = [await asyncio.to_thread(tail, self._engine, name) for name in self.containers.values()]
        return "\n".join(f"-- {key} --\n{end}" for key, end in zip(self.containers, ends, strict=True))


async def _ghostserve(*arguments: str) -> None:
    """Run the command line, with the keys that it needs."""
    environment = {**os.environ, "GHOST_OPERATOR_TOKEN": TOKEN, "GHOST_TOKEN": TOKEN}
    await asyncio.to_thread(run, [sys.executable, "-m", "services.cli", *arguments], environment=environment)


def _trouble(status: Mapping[str, Any]) -> str:
    """What is missing until the cluster is whole; empty if nothing."""
    ready = [worker["name"] for worker in status["workers"] if worker["state"] != "loading"]
    if status["state"] != "serving":
        return f"{status['state']}: {status['detail']}"
    if len(ready) != 6:
        return f"workers: {ready}"
    if len(status["stores"]) != 2:
        return f"stores: {[store['store_id'] for store in status['stores']]}"
    if status["stripes_pending"] or status["stripes_unprotected"]:
        return f"{status['stripes_pending']} stripes pending, {status['stripes_unprotected']} unprotected"
    return ""


def write_env(folder: Path, settings: Mapping[str, str]) -> None:
    """Write the .env that the compose files of a folder read."""
    (folder / ".env").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))


def compose(engine: str, file: Path, project: str, *arguments: str) -> str:
    """Run docker compose (or docker-compose, its older form) on a file, with the settings of the .env beside it."""
    plugin = Path("/usr/libexec/docker/cli-plugins/docker-compose").exists()
    program = ["docker", "compose"] if plugin else [shutil.which("docker-compose") or "docker-compose"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GHOST_")}
    return run(
        [*program, "--project-name", project, "--file", str(file), *arguments],
        environment={**environment, "DOCKER_HOST": engine},
    )


def tail(engine: str, container: str, lines: int = 15) -> str:
    """The end of a container's log."""
    return run(["sh", "-c", f"docker --host {engine} logs --tail {lines} {container} 2>&1"])
