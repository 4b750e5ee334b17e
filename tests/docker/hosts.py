"""A cluster of several hosts on one machine: each host is a network namespace with an address on a bridge.

A host is a container that holds the namespace, and the services of that host are containers of the compose files in
docker/hosts, with that namespace for the host's network. So a host can be cut off, and its containers be killed, paused
and restarted, one or all.
"""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.docker.engine import docker, run
from tests.docker.image import ROOT

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
}


@dataclass(slots=True)
class Host:
    """A host: its place on the network, and the containers of its services."""

    name: str
    address: str
    containers: list[str] = field(default_factory=list)


class Hosts:
    """Control host, two store hosts, three worker hosts with six workers for three ranks and two parity shards."""

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
                "GHOST_IMAGE": self._image,
                "GHOST_NETWORK": f"container:{name}",
                "GHOST_MODELS": str(self._models),
                **SETTINGS,
            }
            if file == "worker":
                settings |= {"GHOST_NAME": project, "GHOST_COUNT": "1" if project.startswith("a") else "2"}
            env_file = self._folder / f"{project}.env"
            env_file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
            await asyncio.to_thread(
                compose, self._engine, f"hosts/{file}.yml", project, env_file, "up", "--detach", "--no-build"
            )
            names = self._docker("ps", "-a", "--filter", f"label=com.docker.compose.project={project}",
                                 "--format", "{{.Names}}")  # fmt: skip
            host.containers += names.split()
        return host

    # -- what happens to them ----------------------------------------------------------------------------------------

    def _docker(self, *arguments: str) -> str:
        return docker(self._engine, *arguments)

    async def docker(self, *arguments: str) -> str:
        """Run the docker client without stopping the streams."""
        return await asyncio.to_thread(docker, self._engine, *arguments)

    async def kill_host(self, name: str) -> None:
        """All containers of a host die at once."""
        await self.docker("kill", *self.hosts[name].containers, name)

    async def revive_host(self, name: str) -> None:
        """The host comes back, with its services."""
        await self.docker("start", name)
        await self.docker("start", *self.hosts[name].containers)

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
    def url(self) -> str:
        """The gateway's URL."""
        return f"http://{self.hosts['control'].address}:8000"

    async def status(self) -> dict[str, Any]:
        """The cluster's status. Raises aiohttp.ClientError while the gateway has none."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        timeout = aiohttp.ClientTimeout(5.0)
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(self.url + "/v1/fault_tolerance/status") as response,
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
                trouble = _trouble(status) or await self._gateway_trouble()
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble = f"{type(error).__name__}: {error}"
            if not trouble:
                return status
            await asyncio.sleep(0.1)
        raise AssertionError(f"not whole after {WHOLE_S:.0f} s: {trouble}\n{await self.logs()}")

    async def _gateway_trouble(self) -> str:
        """What keeps the gateway from serving; empty if nothing."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5.0)) as session,
            session.get(self.url + "/health") as response,
        ):
            return "" if response.status == 200 else await response.text()

    async def ranks(self) -> dict[int, str]:
        """The compose project that each rank runs in."""
        workers = (await self.status())["workers"]
        return {each["rank"]: each["name"].rsplit("-", 1)[0] for each in workers if each["rank"] is not None}

    def container(self, project: str) -> str:
        """The container of a worker's or store's project."""
        return next(name for host in self.hosts.values() for name in host.containers if name.startswith(project + "_"))

    def host_of(self, project: str) -> str:
        """The host that a project's container runs on."""
        return next(host.name for host in self.hosts.values() if self.container(project) in host.containers)

    async def logs(self) -> str:
        """The ends of all services' logs."""
        names = [name for host in self.hosts.values() for name in host.containers]
        ends = [await asyncio.to_thread(tail, self._engine, name) for name in names]
        return "\n".join(f"-- {name} --\n{end}" for name, end in zip(names, ends, strict=True))


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


def compose(engine: str, file: str, project: str, env_file: Path, *arguments: str) -> str:
    """Run docker compose (or docker-compose, its older form) on a file of docker/ and nothing else's settings."""
    plugin = Path("/usr/libexec/docker/cli-plugins/docker-compose").exists()
    program = ["docker", "compose"] if plugin else [shutil.which("docker-compose") or "docker-compose"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GHOST_")}
    return run(
        [*program, "-p", project, "-f", str(ROOT / "docker" / file), "--env-file", str(env_file), *arguments],
        environment={**environment, "DOCKER_HOST": engine},
    )


def tail(engine: str, container: str, lines: int = 15) -> str:
    """The end of a container's log."""
    return run(["sh", "-c", f"docker --host {engine} logs --tail {lines} {container} 2>&1"])
