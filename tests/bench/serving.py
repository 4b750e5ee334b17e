"""Serving while ranks fail: Poisson arrivals of mixed requests at a known load, a rank lost every so often, by mode.

python -m tests.bench.serving [--quick] [--json FILE]

First the capacity is measured: requests a second that `none` finishes when all are offered at once and nothing fails.
Then the arrivals come at LOAD of it. The trace is seeded: every mode sees the same requests at the same times, and at
the same instants a rank gets SIGKILL, as many times as the share says of the number of requests. A failure hits all
requests that run then, and delays those that wait behind them. Response latency is from a request's arrival time in the
trace to its last token. Requests that are cut short or refused end the bench: nobody's latency is left out.
"""

import asyncio
import math
import os
import random
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from services.cli.local import LocalCluster
from tests.bench import section
from tests.bench.clusters import peers, stream
from tests.cluster.conftest import quiet

LOAD = 0.8
MODES = ("none", "replicate", "parity")
JUDGED_SHARE = 0.15
CELLS_S = {0.0: 40.0, 0.05: 40.0, 0.10: 40.0, JUDGED_SHARE: 120.0}
QUICK_CELLS_S = {JUDGED_SHARE: 50.0}
"""How long requests come for, in each mode, by share of failures: it says how many there are. Where failures take more
than the load leaves free, the queue grows as long as they come: the share that a goal is for is given time to show it.
"""
LEAST_REQUESTS, MOST_REQUESTS = 13, 500
SEED = 20_000
SPARE_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal numbers of tokens, cut at both ends."""

    median: int
    sigma: float
    least: int
    most: int

    def draw(self, dice: random.Random) -> int:
        return min(self.most, max(self.least, round(dice.lognormvariate(math.log(self.median), self.sigma))))


PROMPTS = Lengths(median=1020, sigma=0.5, least=64, most=4000)
ANSWERS = Lengths(median=32, sigma=1.0, least=4, most=160)
"""Prompts as Azure's conversation service had them (Patel et al., Splitwise, 2024: median 1,020 tokens); its answers
(median 129, mean 211) at a quarter of their length, so that a cell of the table takes a minute here."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the trace. `at`: in mean times between arrivals, since the trace began."""

    at: float
    prompt: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One mode at one share of failures. Seconds; `rate` and `capacity` are requests a second.

    `suffered`: share of the requests that were in flight at some kill. `goodput`: generated tokens a second, from the
    first arrival to the last token.
    """

    mode: str
    share: float
    kills: int
    suffered: float
    requests: int
    rate: float
    capacity: float
    latency: dict[str, float]
    first_token: dict[str, float]
    goodput: float


def trace(count: int, seed: int = SEED) -> list[Arrival]:
    """The same arrivals for the same seed."""
    dice, at, arrivals = random.Random(seed), 0.0, list[Arrival]()
    for _ in range(count):
        arrivals.append(Arrival(at, PROMPTS.draw(dice), ANSWERS.draw(dice)))
        at += dice.expovariate(1.0)
    return arrivals


def failures(count: int, end: float, ranks: int, seed: int = SEED) -> list[tuple[float, int]]:
    """(when, which rank): one failure somewhere in each of `count` equal parts of the time from 0 to `end`."""
    dice = random.Random(seed)
    return [((number + dice.random()) * end / count, dice.randrange(ranks)) for number in range(count)]


class _Run:
    """One pass of the trace over one cluster. `serial` keeps the prompts of different passes apart."""

    def __init__(self, cluster: LocalCluster, arrivals: Sequence[Arrival], rate: float, serial: int):
        self._cluster = cluster
        self._arrivals = arrivals
        self._rate = rate
        self._serial = serial
        self._began = 0.0
        self._in_flight: set[int] = set()
        self._suffered: set[int] = set()
        self.kills = 0
        self.latencies: list[float] = []
        self.first_tokens: list[float] = []
        self.seconds = 0.0

    async def run(self, kills: int) -> None:
        """Let all requests come and be answered, and ranks be killed."""
        self._began = time.monotonic()
        end = self._arrivals[-1].at / self._rate
        async with asyncio.TaskGroup() as tasks:
            for number, arrival in enumerate(self._arrivals):
                tasks.create_task(self._request(number, arrival))
            tasks.create_task(self._fail(failures(kills, end, self._cluster.settings.tp)))
        self.seconds = time.monotonic() - self._began

    @property
    def suffered(self) -> float:
        return len(self._suffered) / len(self._arrivals)

    @property
    def goodput(self) -> float:
        return sum(arrival.tokens for arrival in self._arrivals) / self.seconds

    async def _until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, self._began + at - time.monotonic()))

    async def _request(self, number: int, arrival: Arrival) -> None:
        at = arrival.at / self._rate
        await self._until(at)
        self._in_flight.add(number)
        seed = self._serial * 1000 + number
        (seen,) = await stream(self._cluster, seed, streams=1, prompt=arrival.prompt, tokens=arrival.tokens)
        assert len(seen.tokens) == arrival.tokens, f"request {number} got {len(seen.tokens)} of {arrival.tokens} tokens"
        self._in_flight.discard(number)
        self.latencies.append(seen.times[-1] - self._began - at)
        self.first_tokens.append(seen.times[0] - self._began - at)

    async def _fail(self, plan: Sequence[tuple[float, int]]) -> None:
        for at, rank in plan:
            await self._until(at)
            os.kill(await self._victim(rank), signal.SIGKILL)
            self._suffered |= self._in_flight
            self.kills += 1

    async def _victim(self, rank: int) -> int:
        """The PID of a rank, once the group is whole and has a spare: a failure without one measures a cold start."""
        while True:
            status = await self._cluster.status()
            if status["state"] == "serving" and any(each["state"] == "spare" for each in status["workers"]):
                return next(int(each["pid"]) for each in status["workers"] if each["rank"] == rank)
            await asyncio.sleep(SPARE_POLL_S)


async def measure(clusters: Mapping[str, LocalCluster], console: Console, *, quick: bool) -> list[Row]:
    """All rows: at each share the modes take turns with the same trace. `none` must be among them."""
    capacity = await _capacity(clusters["none"])
    rate = LOAD * capacity
    rows = list[Row]()
    console.print(f"capacity {capacity:.2f} requests/s; they arrive at {rate:.2f}")
    for number, (share, seconds) in enumerate((QUICK_CELLS_S if quick else CELLS_S).items()):
        count = min(MOST_REQUESTS, max(LEAST_REQUESTS, round(rate * seconds)))
        arrivals = trace(count)
        for mode in (mode for mode in MODES if mode in clusters):
            await quiet(clusters[mode])
            run = _Run(clusters[mode], arrivals, rate, 50_001 + number)
            await run.run(round(share * count))
            rows.append(
                Row(mode, share, run.kills, run.suffered, count, rate, capacity, _centiles(run.latencies),
                    _centiles(run.first_tokens), run.goodput)
            )  # fmt: skip
            console.print(f"{share:.0%} failures, {mode}: median response {rows[-1].latency['p50']:.2f} s")
    return rows


async def _capacity(cluster: LocalCluster) -> float:
    """Requests a second that a cluster finishes when it has all of them at once, and loses no rank."""
    at_once = [Arrival(0.0, arrival.prompt, arrival.tokens) for arrival in trace(LEAST_REQUESTS)]
    await quiet(cluster)
    run = _Run(cluster, at_once, 1.0, 50_000)
    await run.run(0)
    return len(at_once) / run.seconds


def _centiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a person."""
    first = rows[0]
    shown = Table(
        title=f"Poisson arrivals, {first.rate:.2f} a second ({LOAD:.0%} of {first.capacity:.2f}), "
        f"prompts of {PROMPTS.median} tokens and answers of {ANSWERS.median} (medians); bfloat16, TP = 3"
    )
    for column in ("failures", "requests", "kills", "suffered", "mode", "response p50", "p90", "p99",
                   "first token p50", "p90", "p99", "tokens/s"):  # fmt: skip
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            f"{row.share:.0%}", str(row.requests), str(row.kills), f"{row.suffered:.0%}", row.mode,
            *(f"{value:.2f}" for value in row.latency.values()),
            *(f"{value:.2f}" for value in row.first_token.values()), f"{row.goodput:.1f}",
        )  # fmt: skip
    return shown


async def run(quick: bool, console: Console) -> list[Row]:
    """The section, with clusters of its own. The second spare is there while the first one's place is filled again."""
    async with peers(("none", "parity") if quick else MODES, spares=2) as clusters:
        return await measure(clusters, console, quick=quick)


if __name__ == "__main__":
    section.run(__doc__, "none and parity alone, failures in 15%%", run, lambda rows: [table(rows)])
