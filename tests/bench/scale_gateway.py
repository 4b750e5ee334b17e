"""What a token of many streams costs the gateway: `python -m tests.bench.scale_gateway [--profile]`, a part of `scale`.

The real gateway, a process on a core of its own. On the other core a coordinator that sends all streams' next tokens
together, as a step does, and the streams' clients, which read from raw sockets. Its CPU time by what it delivers is
what one core does, also on a machine where others take their share of the cores.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from rich.console import Console
from rich.table import Table

from services.coordinator.app import group_config
from services.gateway.tokenizer import REPLACEMENT, Tokenizer
from services.worker.engine.model_files import resolve_model
from shared.channel import CHANNEL_PATH, Channel, accept
from shared.config import CoordinatorSettings
from shared.messages import Abort, Accepted, Message, NextTokens, StatusChanged, Submit, Tokens, Welcome
from shared.types import TokenLogprob, pack_ids
from tests.cluster.fake_coordinator import a_status

AHEAD = 3
"""Steps that are sent before the clients have read them."""
WARM_STEPS, STEPS, PACED_STEPS = 20, 120, 100
PACE_S = 0.05
DEADLINE_S = 120.0
PROFILE_LINES = 60
KINDS = {
    "completions": ("/v1/completions", {"prompt": "The end"}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Go on"}]}),
    "chat with 2 logprobs": (
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "Go on"}], "logprobs": True,
                                 "top_logprobs": 2},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """Streams of one kind: as fast as they go, and at 20 tokens/s each."""

    kind: str
    streams: int
    tokens_s: float
    """Delivered."""
    cpu_us: float
    """CPU time of the gateway's process, a token."""
    tokens_cpu_s: float
    """Delivered by a second of it."""
    kib: float
    """Memory, a stream."""
    paced_cpu_us: float
    """The same at the pace, where a stream's tokens are written one by one, but where the machine holds them up."""
    paced_p50_ms: float
    """From the coordinator's message for all streams to the client of one."""
    paced_p99_ms: float


class Coordinator:
    """Takes all requests, then sends steps: one more token for each stream."""

    def __init__(self, model_dir: Path, streams: int):
        tokenizer = Tokenizer.load(str(model_dir))
        text = Path(__file__).parents[2].joinpath("README.md").read_text()
        pieces = {token: tokenizer.decode([token]) for token in set(tokenizer.encode(text, special=False))}
        self._ids = sorted(token for token, piece in pieces.items() if piece and REPLACEMENT not in piece)
        self._status = a_status(str(model_dir), 49152, (), max_model_len=1 << 20)
        self._streams = streams
        self._dice = random.Random(1)
        self._names: list[str] = []
        self._top: int | None = None
        self._channel: Channel | None = None
        self._aborted = 0
        self.all_there = asyncio.Event()
        self.all_gone = asyncio.Event()
        """All clients have left, and the gateway has said so."""

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        """The gateway's channel."""
        socket, _ = await accept(request, None)
        async with Channel(socket, "gateway") as self._channel:
            self._channel.send(Welcome(group_config(CoordinatorSettings()), 1))
            telling = asyncio.create_task(self._tell(self._channel))
            async for message in self._channel:
                self._take(self._channel, message)
            telling.cancel()
        return socket

    def _take(self, channel: Channel, message: Message) -> None:
        if isinstance(message, Submit):
            self._names.append(message.request.request_id)
            self._top = message.request.sampling.logprobs
            channel.send(Accepted(message.request.request_id))
            if len(self._names) == self._streams:
                self.all_there.set()
        elif isinstance(message, Abort):
            self._aborted += 1
            if self._aborted == self._streams:
                self.all_gone.set()

    async def _tell(self, channel: Channel) -> None:
        while True:
            channel.send(StatusChanged(self._status))
            await asyncio.sleep(0.5)

    def step(self) -> None:
        """Send one more token for each stream, any of the text's."""
        drawn = self._dice.choices(self._ids, k=len(self._names))
        for message in self._messages(drawn):
            assert self._channel is not None
            self._channel.send(message)

    def _messages(self, drawn: Sequence[int]) -> Iterator[Message]:
        if self._top is None:
            yield NextTokens(tuple(self._names), pack_ids(drawn))
            return
        for name, token in zip(self._names, drawn, strict=True):
            top = tuple((self._ids[place], -0.5 - place) for place in range(self._top))
            yield Tokens(name, pack_ids([token]), (TokenLogprob(token, -0.5, top),), (), None, 0)


class Reader(asyncio.Protocol):
    """The client of one stream."""

    def __init__(self, clients: "Clients", request: bytes):
        self._clients = clients
        self._request = request
        self._rest = b""
        self._events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)
        self._clients.transports.append(transport)

    def data_received(self, data: bytes) -> None:
        if not (self._rest or data.startswith(b"HTTP/1.1 200")):
            raise RuntimeError(f"no stream: {data[:300]!r}")
        came = (self._rest + data).count(b"data: ")
        self._rest = data[-5:]
        self._clients.came(self._events, came)
        self._events += came


class Clients:
    """Those of all streams."""

    def __init__(self, opening: int) -> None:
        self.transports: list[asyncio.Transport] = []
        self.read = 0
        self.sent: list[float] = [0.0] * opening  # when the message of each event was sent
        self.late: list[float] = []
        self._more = asyncio.Event()

    def came(self, before: int, events: int) -> None:
        """One stream's next events, of which it has had so many before."""
        now = time.monotonic()
        self.late += [now - self.sent[number] for number in range(before, before + events)]
        self.read += events
        self._more.set()

    async def until(self, events: int) -> None:
        """Wait until all streams together have had so many."""
        async with asyncio.timeout(DEADLINE_S):
            while self.read < events:
                self._more.clear()
                await self._more.wait()


@dataclass(frozen=True, slots=True)
class Process:
    """The gateway's, by its id."""

    pid: int

    def cpu(self) -> float:
        """Seconds of CPU time."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """Bytes of memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()


async def measured(kind: str, streams: int, profile: bool = False) -> Row:
    """The row of so many streams of one kind."""
    model = resolve_model(None)
    cores = sorted(os.sched_getaffinity(0))
    coordinator = Coordinator(model, streams)
    application = web.Application()
    application.router.add_get(CHANNEL_PATH, coordinator.serve)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    line = [sys.executable, *(["-m", "cProfile", "-s", "tottime"] if profile else []), "-m", "services.cli", "gateway",
            "--coordinator-url", f"ws://127.0.0.1:{runner.addresses[0][1]}", "--port", "0", "--drain-s", "0",
            "--log-level", "warning"]  # fmt: skip
    os.sched_setaffinity(0, cores[:1])  # which the child has too
    gateway = await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.PIPE)
    os.sched_setaffinity(0, cores[-1:])
    try:
        assert gateway.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            port = int((await gateway.stdout.readline()).rsplit(b":", 1)[1])
            while not await _healthy(port):
                await asyncio.sleep(0.1)
        return await _row(kind, coordinator, Process(gateway.pid), streams, port)
    finally:
        gateway.send_signal(signal.SIGTERM)
        if profile and gateway.stdout is not None:
            print(b"\n".join((await gateway.stdout.read()).splitlines()[:PROFILE_LINES]).decode())
        await gateway.wait()
        os.sched_setaffinity(0, cores)
        await runner.cleanup()


async def _row(kind: str, coordinator: Coordinator, process: Process, streams: int, port: int) -> Row:
    path, asked = KINDS[kind]
    asked = {**asked, "stream": True, "max_tokens": 50_000, "ignore_eos": True}
    request = _request("POST", path, json.dumps(asked).encode())
    opening = 1 if "chat" in kind else 0
    clients, loop, memory = Clients(opening), asyncio.get_running_loop(), process.resident()
    for _ in range(streams):
        await loop.create_connection(lambda: Reader(clients, request), "127.0.0.1", port)
    async with asyncio.timeout(DEADLINE_S):
        await coordinator.all_there.wait()

    async def steps(count: int, pace_s: float) -> None:
        began = time.monotonic()
        for number in range(count):
            clients.sent.append(time.monotonic())
            coordinator.step()
            if pace_s:
                await asyncio.sleep(max(0.0, began + (number + 1) * pace_s - time.monotonic()))
            await clients.until((len(clients.sent) - AHEAD) * streams)
        await clients.until(len(clients.sent) * streams)

    await steps(WARM_STEPS, 0.0)
    memory = process.resident() - memory
    cpu, wall = process.cpu(), time.monotonic()
    await steps(STEPS, 0.0)
    cpu, wall = process.cpu() - cpu, time.monotonic() - wall
    clients.late.clear()
    paced = process.cpu()
    await steps(PACED_STEPS, PACE_S)
    paced = process.cpu() - paced
    late = statistics.quantiles(clients.late, n=100)
    for transport in clients.transports:
        transport.abort()
    async with asyncio.timeout(DEADLINE_S):
        await coordinator.all_gone.wait()
    tokens = STEPS * streams
    return Row(
        kind, streams, tokens / wall, 1e6 * cpu / tokens, tokens / cpu, memory / streams / 1024,
        1e6 * paced / PACED_STEPS / streams, late[49] * 1e3, late[98] * 1e3,
    )  # fmt: skip


def _request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


async def _healthy(port: int) -> bool:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request("GET", "/health"))
    status = await reader.readline()
    writer.close()
    return b" 200 " in status


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows, for a person."""
    shown = Table(title="A token of the gateway, at full speed and at 20 tokens/s a stream")
    columns = ("streams", "tokens/s", "CPU us", "tokens a CPU s", "KiB a stream", "paced CPU us", "p50 ms", "p99 ms")
    shown.add_column("kind")
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(row["kind"], *(f"{figure:,.0f}" for name, figure in row.items() if name != "kind"))
    return shown


def main() -> int:
    """Measure and print a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--kind", choices=[*KINDS], help="only this one")
    parser.add_argument("--profile", action="store_true", help="also print where the gateway's time goes")
    arguments = parser.parse_args()
    kinds = [arguments.kind] if arguments.kind else [*KINDS]
    rows = [asdict(asyncio.run(measured(kind, arguments.streams, arguments.profile))) for kind in kinds]
    Console(width=140).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
