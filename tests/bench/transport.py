"""The bulk transports beside each other: a client and a server process, all that travels included, in turns.

python -m tests.bench.transport [--rounds N] [--json FILE]

GB/s of payload, and seconds of processor time of both processes for each GB; medians of the rounds. The ratio is the
median over rounds of ucx to tcp of the same round.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared.errors import GhostError
from shared.transport.base import GetShards, Outcome, PutShards, ShardLabel, ShardRef
from shared.transport.client import BulkClient
from shared.transport.server import serve

SCHEMES = ("tcp", "ucx")
SHAPES = {"120 KiB x 64": (64, 120 << 10), "16 MiB": (1, 16 << 20)}
IN_FLIGHT = 2
"""Requests at once, as a worker's shadow has them."""
SECONDS = 0.6
"""That one measurement lasts at least."""


class Shelf:
    """A handler over memory that it has touched before: what is measured is the way there and nothing else."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(os.urandom(1 << 20) * 64))

    def _places(self, lengths: Sequence[int]) -> list[memoryview]:
        places, start = [], 0
        for length in lengths:
            places.append(self._memory[start : start + length])
            start += length
        return places

    def put(self, request: PutShards) -> "Transfer":
        return Transfer(self._places(request.lengths))

    def get(self, request: GetShards) -> "Transfer":
        return Transfer(self._places(request.lengths))


@dataclass(slots=True)
class Transfer:
    """A put or a get that always succeeds."""

    places: Sequence[memoryview]

    async def commit(self) -> Sequence[Outcome]:
        return [None] * len(self.places)

    def abandon(self) -> None:
        pass

    def release(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement."""

    gb_s: float
    cpu_s_per_gb: float


async def _serve(scheme: str) -> None:
    async with serve(f"{scheme}://127.0.0.1:0", Shelf()) as bulk:
        print(bulk.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def server(scheme: str) -> AsyncIterator[tuple[BulkClient, int]]:
    """A client of a server process, and the server's process id."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.transport", "--serve", scheme),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            address = (await process.stdout.readline()).decode().strip()
        async with await BulkClient.connect(address) as client:
            yield client, process.pid
    finally:
        process.terminate()
        await process.wait()


def _cpu_s(pid: int) -> float:
    """Processor time so far of a process, and of this one."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    theirs = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return mine.ru_utime + mine.ru_stime + (int(theirs[11]) + int(theirs[12])) / os.sysconf("SC_CLK_TCK")


async def figure(client: BulkClient, pid: int, way: str, count: int, length: int) -> Figure:
    """Put, or get, so many shards of this length over and over."""
    labels = tuple(ShardLabel(os.urandom(16), 3, 3, 1, length, 0, (0, 0, 0)) for _ in range(count))
    refs = tuple(ShardRef(label.page_key, 3, length) for label in labels)
    buffers = [[memoryview(bytearray(length)) for _ in range(count)] for _ in range(IN_FLIGHT)]
    moved = 0
    end = time.monotonic() + SECONDS

    async def keep_going(mine: list[memoryview]) -> None:
        nonlocal moved
        while time.monotonic() < end:
            if way == "put":
                outcomes = await client.put(PutShards("bench", 1, 0, labels), mine, timeout=30)
            else:
                outcomes = await client.get(GetShards("bench", refs), mine, timeout=30)
            if any(outcomes):
                raise GhostError(f"refused: {outcomes}")
            moved += count * length

    began, spent = time.monotonic(), _cpu_s(pid)
    await asyncio.gather(*(keep_going(mine) for mine in buffers))
    return Figure(moved / (time.monotonic() - began) / 1e9, (_cpu_s(pid) - spent) / (moved / 1e9))


Rows = dict[tuple[str, str], dict[str, list[Figure]]]


async def measure(rounds: int) -> Rows:
    """All figures by (shape, way) and scheme. The schemes take turns, and the order alternates."""
    rows: Rows = {(shape, way): {scheme: [] for scheme in SCHEMES} for shape in SHAPES for way in ("put", "get")}
    async with server("tcp") as tcp, server("ucx") as ucx:
        servers = {"tcp": tcp, "ucx": ucx}
        for turn in range(rounds + 1):
            for (shape, way), figures in rows.items():
                for scheme in SCHEMES if turn % 2 else SCHEMES[::-1]:
                    seen = await figure(*servers[scheme], way, *SHAPES[shape])
                    if turn:  # the first warms up
                        figures[scheme].append(seen)
    return rows


def table(rows: Rows) -> Table:
    """The figures for a person."""
    shown = Table(title="GB/s, and processor seconds per GB (client and server together)")
    for column in ("buffers", "way", "tcp GB/s", "ucx GB/s", "ucx / tcp", "tcp CPU s/GB", "ucx CPU s/GB"):
        shown.add_column(column, justify="right")
    for (shape, way), figures in rows.items():
        tcp, ucx = figures["tcp"], figures["ucx"]
        ratio = statistics.median(b.gb_s / a.gb_s for a, b in zip(tcp, ucx, strict=True))
        speeds = [f"{statistics.median(each.gb_s for each in some):.2f}" for some in (tcp, ucx)]
        costs = [f"{statistics.median(each.cpu_s_per_gb for each in some):.2f}" for some in (tcp, ucx)]
        shown.add_row(shape, way, *speeds, f"{ratio:.2f}", *costs)
    return shown


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--serve", choices=SCHEMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(_serve(arguments.serve))
        return
    rows = asyncio.run(measure(arguments.rounds))
    Console().print(table(rows))
    if arguments.json:
        dump = [
            {"buffers": shape, "way": way, **{scheme: [asdict(each) for each in some] for scheme, some in by.items()}}
            for (shape, way), by in rows.items()
        ]
        Path(arguments.json).write_text(json.dumps(dump, indent=2) + "\n")


if __name__ == "__main__":
    main()
