"""vLLM's own API server as a hosted engine of a real coordinator, with stores and an embedded Redis."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.cli.local import LocalCluster, ServeSettings
from tests.vllm.orders import FOLDER
from tests.vllm.server import Server, serving

SERVING_S = 120.0
T = TypeVar("T")
RECOVERED_S = 60.0


@dataclass
class Protected:
    """A server and what protects it. The cluster lives on an event loop of its own: tests come and go with theirs."""

    server: Server
    cluster: LocalCluster
    loop: asyncio.AbstractEventLoop
    faults: Path
    """Orders for tests.vllm.faults."""
    spares: int

    async def status(self) -> dict[str, Any]:
        """The cluster's status, told after this was called."""
        began = time.monotonic()
        while True:
            status = await self.on_loop(self.cluster.status())
            if status["now"] >= began:
                return status
            await asyncio.sleep(0.05)

    async def until(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The status, once it is as wanted."""
        end = time.monotonic() + RECOVERED_S
        while not wanted(status := await self.status()):
            assert time.monotonic() < end, f"{what}: {status}\n{self.server.tail()}\n{self.cluster.logs()}"
            await asyncio.sleep(0.05)
        return status

    async def protected(self) -> None:
        """Wait until nothing waits for its parity."""
        await self.until(
            lambda status: (
                status["state"] == "serving" and not status["stripes_pending"] + status["stripes_unprotected"]
            ),
            "not protected",
        )

    async def whole(self) -> None:
        """Wait until the engine serves with all its ranks, and the coordinator knows as many spares."""
        spares = self.spares
        await self.server.whole(spares)

        def ready(status: dict[str, Any]) -> bool:
            names = [worker for worker in status["workers"] if worker["state"] != "loading"]
            return status["state"] == "serving" and len(names) == self.server.size + spares

        await self.until(ready, "not whole")

    async def records(self, since: float) -> list[dict[str, Any]]:
        """The recoveries that began since, by the cluster's clock: at least one, whose last one is over."""

        def found(status: dict[str, Any]) -> list[dict[str, Any]]:
            return [record for record in status["recoveries"] if record["started"] >= since]

        return found(await self.until(lambda status: bool(found(status)), "no recovery was recorded"))

    async def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for what runs on the cluster's loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    async def kill(self, name: str) -> None:
        """SIGKILL a service of the cluster, and wait until it is gone."""
        child = self.cluster.processes[name]
        os.kill(child.pid, signal.SIGKILL)
        await self.on_loop(child.how_it_ended())

    async def respawn(self, name: str) -> None:
        """Start a service again on its address."""
        await self.on_loop(self.cluster.respawn(name))

    @contextmanager
    def ordered(self, fault: str) -> Iterator[None]:
        """As long as this is entered, the order is there."""
        order = self.faults / fault
        order.touch()
        try:
            yield
        finally:
            order.unlink(missing_ok=True)

    def log(self) -> str:
        """All that vLLM's processes have said."""
        return self.server.log.read_text(errors="replace")


@contextmanager
def cluster_of(
    model: Path, folder: Path, size: int = 3, parity: int = 1
) -> Iterator[tuple[LocalCluster, asyncio.AbstractEventLoop]]:
    """Start what protects, on an event loop of its own."""
    settings = ServeSettings(
        port=0, tp=size, spares=0, parity=parity, stores=parity, store_memory_mb=64, restore="always",
        log_dir=str(folder / "services"),
    )  # fmt: skip
    cluster = LocalCluster(settings, model, hosted=True, extra={"coordinator": ["--hang-timeout-s", "5"]})
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="cluster", daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(cluster.__aenter__(), loop).result(SERVING_S)
    try:
        yield cluster, loop
    finally:
        asyncio.run_coroutine_threadsafe(cluster.stop(), loop).result(SERVING_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def protected(
    model: Path, folder: Path, *flags: str, spares: int = 1, parity: int = 1, size: int = 3, **environment: str
) -> Iterator[Protected]:
    """Start all, and wait until the engine's ranks serve."""
    faults = folder / "faults"
    faults.mkdir()
    with cluster_of(model, folder, size, parity) as (cluster, loop):
        environment |= {"GHOST_SPARES": str(spares), FOLDER: str(faults), "GHOST_PATIENCE_S": "180"}
        environment["GHOST_COORDINATOR_URL"] = cluster.coordinator_url
        flags = ("--worker-cls", "tests.vllm.faults.FaultyWorker", *flags)
        with serving(model, folder / "vllm.log", *flags, size=size, **environment) as server:
            asyncio.run_coroutine_threadsafe(cluster.wait_serving(SERVING_S), loop).result(SERVING_S + 10)
            yield Protected(server, cluster, loop, faults, spares)
