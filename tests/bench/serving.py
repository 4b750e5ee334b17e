"""Serving while ranks fail: Poisson arrivals of mixed prompts, a share of them hit by a lost rank, by mode.

python -m tests.bench.serving [--quick] [--json FILE]

The trace is seeded, so every mode sees the same requests at the same times, and the same share of them carries a
failure: in the middle of its answer a random rank gets SIGKILL, which all requests in flight suffer. Response latency
is from a request's arrival time in the trace to its last token.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.drill import Stream
from services.local import LocalCluster
from tests.bench.clusters import peers, stream
from tests.cluster.conftest import quiet

PROMPTS = (256, 512, 1024, 3000)
"""Tokens of the prompts, as likely as each other: chats and agents with long contexts."""
TOKENS = 40
RATE_S = 0.3
"""Arrivals a second: some two thirds of what this machine can serve."""
SHARES = (0.0, 0.05, 0.10, 0.15)
MODES = ("none", "replicate", "parity")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the trace."""

    at: float
    prompt: int
    seed: int


@dataclass(frozen=True, slots=True)
class Row:
    """One mode at one share of failures. Seconds; `goodput` is generated tokens a second from first to last."""

    mode: str
    share: float
    kills: int
    suffered: float
    """Share of the requests that were in flight at some kill."""
    requests: int
    latency: dict[str, float]
    first_token: dict[str, float]
    goodput: float


def trace(count: int, seed: int) -> list[Arrival]:
    """The same arrivals for the same seed."""
    dice, at, arrivals = random.Random(seed), 0.0, list[Arrival]()
    for number in range(count):
        arrivals.append(Arrival(at, dice.choice(PROMPTS), seed * 10_000 + number))
        at += dice.expovariate(RATE_S)
    return arrivals


class _Run:
    """One pass of the trace over one cluster."""

    def __init__(self, cluster: LocalCluster, arrivals: Sequence[Arrival], share: float, seed: int):
        self._cluster = cluster
        self._arrivals = arrivals
        self._dice = random.Random(seed)
        self._failing = set(self._dice.sample(range(len(arrivals)), round(share * len(arrivals))))
        self._pids: dict[int, int] = {}
        self._in_flight: set[int] = set()
        self._suffered: set[int] = set()
        self.kills = 0
        self.latencies: list[float] = []
        self.first_tokens: list[float] = []
        self._tokens = 0

    async def run(self) -> float:
        """Returns goodput."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(self._know_ranks())
            await asyncio.gather(
                *(self._request(number, arrival, began + arrival.at) for number, arrival in enumerate(self._arrivals))
            )
            watcher.cancel()
        return self._tokens / (time.monotonic() - began)

    @property
    def suffered(self) -> float:
        return len(self._suffered) / len(self._arrivals)

    async def _know_ranks(self) -> None:
        """Keep up with who holds which rank, while the group serves."""
        while True:
            status = await self._cluster.status()
            whole = status["state"] == "serving" and any(each["state"] == "spare" for each in status["workers"])
            self._pids = {each["rank"]: each["pid"] for each in status["workers"] if each["rank"] is not None}
            if not whole:
                self._pids = {}
            await asyncio.sleep(0.25)

    async def _request(self, number: int, arrival: Arrival, at: float) -> None:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        self._in_flight.add(number)

        def watch(index: int, seen: Stream) -> None:
            if number in self._failing and len(seen.tokens) >= TOKENS // 2 and self._pids:
                self._failing.discard(number)
                self._fail()

        (seen,) = await stream(
            self._cluster, arrival.seed, streams=1, prompt=arrival.prompt, tokens=TOKENS, watch=watch
        )
        self._in_flight.discard(number)
        self.latencies.append(seen.times[-1] - at)
        self.first_tokens.append(seen.times[0] - at)
        self._tokens += len(seen.tokens)

    def _fail(self) -> None:
        os.kill(self._pids[self._dice.choice(list(self._pids))], signal.SIGKILL)
        self._pids = {}
        self._suffered |= self._in_flight
        self.kills += 1


async def measure(
    clusters: Mapping[str, LocalCluster], shares: Sequence[float], count: int, console: Console
) -> list[Row]:
    """All rows: at each share the modes take turns with the same trace."""
    rows = []
    for number, share in enumerate(shares):
        for mode in (mode for mode in MODES if mode in clusters):
            await quiet(clusters[mode])
            run = _Run(clusters[mode], trace(count, 20_000 + number), share, number)
            goodput = await run.run()
            rows.append(
                Row(mode, share, run.kills, run.suffered, count, _centiles(run.latencies), _centiles(run.first_tokens),
                    goodput)
            )  # fmt: skip
            console.print(f"{share:.0%} of requests fail, {mode}: done")
    return rows


def _centiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a person."""
    shown = Table(title=f"Poisson arrivals, {RATE_S:g} a second, prompts of {PROMPTS} tokens (bfloat16, TP = 3)")
    for column in (
        "failures",
        "suffered",
        "mode",
        "kills",
        "response p50",
        "p90",
        "p99",
        "first token p50",
        "p90",
        "p99",
        "tokens/s",
    ):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            f"{row.share:.0%}", f"{row.suffered:.0%}", row.mode, str(row.kills),
            *(f"{value:.2f}" for value in row.latency.values()),
            *(f"{value:.2f}" for value in row.first_token.values()), f"{row.goodput:.1f}",
        )  # fmt: skip
    return shown


async def _main(quick: bool, console: Console) -> list[Row]:
    async with peers(("none", "parity") if quick else MODES) as clusters:
        return await measure(clusters, (0.15,) if quick else SHARES, 14, console)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="none and parity alone, failures in 15%%")
    parser.add_argument("--json", default="", metavar="FILE")
    arguments = parser.parse_args()
    console = Console(width=120)
    rows = asyncio.run(_main(arguments.quick, console))
    console.print(table(rows))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
