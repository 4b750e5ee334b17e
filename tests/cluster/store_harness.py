"""For tests of the parity store: the real service as a process, and a coordinator that says what a test wants."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web
from xxhash import xxh3_64_intdigest

from shared.channel import CHANNEL_PATH, Channel, accept
from shared.messages import Message, StoreHello, Welcome
from shared.transport.base import GetShards, PutShards, ShardLabel, ShardRef
from shared.types import GroupConfig, StoreInfo

DEADLINE_S = 20.0

CONFIG = GroupConfig(
    group="default",
    model="",
    served_name="",
    dtype="float32",
    size=3,
    parity=1,
    protection="parity",
    page_tokens=16,
    kv_bytes=1 << 20,
    max_step_tokens=64,
    max_batch=8,
    communicator="auto",
    heartbeat_s=0.2,
    heartbeat_timeout_s=3.0,
    collective_timeout_s=10.0,
)


class StoreCoordinator:
    """Welcomes stores, keeps what they said, and sends them what a test wants."""

    def __init__(self, group: str, port: int = 0, token: str | None = None):
        self._group = group
        self._token = token
        self._port = port
        self._stores: asyncio.Queue[StoreInfo] = asyncio.Queue()
        self._channels: set[Channel] = set()
        self.heard: list[Message] = []  # what stores said after their hello
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_get(CHANNEL_PATH, self._serve)
        self._runner = web.AppRunner(application, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in list(self._channels):
            await channel.close()
        assert self._runner is not None
        await self._runner.cleanup()

    async def next_store(self) -> StoreInfo:
        """The next store that says hello."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._stores.get()

    def send(self, message: Message) -> None:
        for channel in self._channels:
            channel.send(message)

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        socket, hello = await accept(request, self._token)
        if not isinstance(hello, StoreHello):
            return socket
        async with Channel(socket, hello.store.store_id) as channel:
            channel.send(Welcome(replace(CONFIG, group=self._group), 1))
            self._channels.add(channel)
            self._stores.put_nowait(hello.store)
            try:
                async for message in channel:
                    self.heard.append(message)
            finally:
                self._channels.discard(channel)
        return socket


@dataclass
class StoreProcess:
    """A running `ghostserve parity-store`."""

    process: asyncio.subprocess.Process
    admin_url: str = ""
    some_key: str = ""

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    async def admin(self, method: str, path: str, *, token: str | None = None, json: object = None) -> tuple[int, Any]:
        """Status and JSON body (or text) of a call of the admin endpoint."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session,
            session.request(method, self.admin_url + path, headers=headers, json=json) as answer,
        ):
            is_json = answer.content_type == "application/json"
            return answer.status, await answer.json() if is_json else await answer.text()


@asynccontextmanager
async def store_process(coordinator_url: str, redis_url: str, *flags: str) -> AsyncIterator[StoreProcess]:
    """A store on free ports, ready to serve; stopped with SIGTERM, and it must then end without an error."""
    process = await start(coordinator_url, redis_url, *flags)
    store = StoreProcess(process)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            line = (await process.stdout.readline()).decode()
            if not line.startswith("listening on "):
                assert process.stderr is not None
                raise AssertionError(f"the store did not start: {line} {(await process.stderr.read()).decode()}")
            store.admin_url = line.removeprefix("listening on ").strip()
        yield store
    finally:
        with suppress(ProcessLookupError):  # os.kill: send_signal may reap a dead child before asyncio does
            os.kill(process.pid, signal.SIGCONT)
            os.kill(process.pid, signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            _, errors = await process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    text = errors.decode()
    assert text.count("Traceback") == text.count("aiohttp.http_exceptions."), text  # aiohttp logs malformed HTTP so


async def start(coordinator_url: str, redis_url: str, *flags: str) -> asyncio.subprocess.Process:
    """Start a store process and do not wait for it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GHOST_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.cli", "parity-store", "--coordinator-url", coordinator_url, "--redis-url", redis_url),
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask another process again and again until something is so; fail after the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():
            await asyncio.sleep(0.01)


def stripes(
    group: str, count: int, length: int = 4096, epoch: int = 1, serial: int = 0
) -> tuple[PutShards, list[memoryview]]:
    """A put of `count` random parity shards of as many stripes, k = 3, m = 1."""
    payloads = [memoryview(bytearray(os.urandom(length))) for _ in range(count)]
    labels = tuple(
        ShardLabel(os.urandom(16), 3, 3, 1, length, xxh3_64_intdigest(payload), (1, 2, (1 << 64) - 1))
        for payload in payloads
    )
    return PutShards(group, epoch, serial, labels), payloads


def asking(put: PutShards) -> tuple[GetShards, list[memoryview]]:
    """The get that reads what was put, and buffers for it."""
    refs = tuple(ShardRef(label.page_key, label.number, label.length) for label in put.shards)
    return GetShards(put.group, refs), [memoryview(bytearray(length)) for length in put.lengths]


def keys(put: PutShards) -> Sequence[bytes]:
    return [label.page_key for label in put.shards]
