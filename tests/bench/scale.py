"""What a thousand streams and a million tokens cost the coordinator and a gateway: `python -m tests.bench.scale
[--quick]`.

The coordinator's core among simulated ranks, by its CPU time: no model, no network. The gateway is a real process
(`scale_gateway`), as is the coordinator that ranks wait for between two steps (`scale_steps`). Writes
bench/results/scale.json, and the growth curves to scale.png; the exit code is 1 where a limit is missed.
`make bench-scale`.
"""

import argparse
import asyncio
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.service import COLLECT_AFTER
from tests.bench import scale_gateway, scale_steps
from tests.bench.curves import plot_scale
from tests.bench.goals import Goal, table
from tests.bench.machine import machine
from tests.bench.scaled import PAGE_TOKENS, Scaled, prompt

STEPS = 150


@dataclass(frozen=True, slots=True)
class Row:
    """Steps of `streams` that decode, each at so many tokens; `held` and `cached` pages beside."""

    streams: int
    context: int
    held: int
    cached: int
    median_ms: float
    p99_ms: float
    longest_ms: float
    status_ms: float
    """What telling the gateways the state takes, twice a second."""
    sent_bytes: int
    """To each rank and gateway, of a step; what the stores are told is in it."""
    mib: float
    """Of memory, that it grew by."""


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def decoding(streams: int, context: int, *, cached: int = 0, shared: int = 0) -> tuple[Scaled, float]:
    """A core in which so many streams decode, and by how many bytes it made the process grow.

    `shared`: tokens of a beginning that all have alike. `cached`: idle pages of requests that have ended.
    """
    gc.collect()
    before = resident()
    dice = random.Random(streams + context)
    pages = streams * (-(-context // PAGE_TOKENS) + 64) + cached
    world = Scaled(pages, streams=streams + 1, step_tokens=max(8192, 2 * streams))
    for _ in range(-(-cached // 4096)):
        world.submit(prompt(dice, 4096 * PAGE_TOKENS), 1)
    world.settle()
    beginning = prompt(dice, shared)
    for _ in range(streams):
        world.submit(beginning + prompt(dice, context - shared), 100_000)
    while any(each.remaining != 1 for each in world.engine.scheduler.requests()):
        world.step()
    gc.collect()
    gc.freeze()  # as after a while: what is there for long is not looked through again and again
    return world, float(resident() - before)


def measured(streams: int, context: int, *, cached: int = 0) -> Row:
    """The row of one such core."""
    world, grown = decoding(streams, context, cached=cached)
    for _ in range(2 * PAGE_TOKENS):
        world.step()
    world.status()
    sent = world.sent_bytes
    times = sorted(world.step() * 1e3 for _ in range(STEPS))
    sent = (world.sent_bytes - sent) // STEPS
    status = statistics.median(world.status() * 1e3 for _ in range(5))
    shown = world.group.status()
    return Row(
        streams, context, shown.pages_held, shown.pages_cached, statistics.median(times),
        times[int(len(times) * 0.99)], times[-1], status, sent, grown / 2**20,
    )  # fmt: skip


def long_one(streams: int, context: int) -> dict[str, float]:
    """A sequence of `context` tokens comes while others decode: by how much the longest step grows, and when it ends.

    Once all of it is new, once its prefix is in the pool.
    """
    world, _ = decoding(streams, 512, cached=context // PAGE_TOKENS + 64)
    usual = sorted(world.step() * 1e3 for _ in range(100))[-1]
    dice = random.Random(7)
    tokens = prompt(dice, context)
    told = {"usual_longest_ms": usual}
    for name in ("new", "cached"):
        world.spent_s = 0.0
        world.submit(tokens, 8)
        times = [world.spent_s * 1e3]
        while world.engine.scheduler.waiting or len(world.engine.scheduler.running) > streams:
            times.append(world.step() * 1e3)
        told |= {f"{name}_submitted_ms": times[0], f"{name}_longest_ms": max(times[:-1]), f"{name}_ended_ms": times[-1]}
    return told


def apart(what: str) -> Any:
    """One measurement in a process of its own: memory of one is not that of another."""
    line = [sys.executable, "-m", "tests.bench.scale", "--only", what]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def only(what: str) -> Any:
    """The measurement of this name."""
    kind, *numbers = what.split(",")
    measure: dict[str, Callable[..., Any]] = {
        "steps": lambda streams, context, cached: asdict(measured(streams, context, cached=cached)),
        "long": long_one,
        "waits": lambda streams: [asdict(row) for row in asyncio.run(scale_steps.all_measured(streams))],
        **{kind: partial(_gateway, kind) for kind in scale_gateway.KINDS},
    }
    return measure[kind](*map(int, numbers))


def _gateway(kind: str, streams: int) -> dict[str, Any]:
    return asdict(asyncio.run(scale_gateway.measured(kind, streams)))


def goals(found: dict[str, Any]) -> list[Goal]:
    """The limits, and what was measured."""
    plain, many, long = found["plain"], found["many_pages"], found["long"]
    tokens, pages = plain["streams"] * plain["context"], plain["held"]
    per_token = plain["mib"] * 2**20 / tokens
    per_page = (many["mib"] - found["few_pages"]["mib"]) * 2**20 / many["cached"]
    alike = found["few_pages"]["median_ms"]
    return [
        Goal("step of 1,000 that decode at 8K tokens: median, ms", plain["median_ms"], 5.0, False),
        Goal("the same: p99, ms", plain["p99_ms"], 10.0, False),
        Goal("1,000,000 pages cached beside: median, of that without", many["median_ms"] / alike, 1.2, False),
        Goal("1M tokens come beside 500: longest step, ms more", long["new_longest_ms"] - long["usual_longest_ms"],
             10.0, False),
        Goal("1M tokens that are cached: longest step, ms more", long["cached_longest_ms"] - long["usual_longest_ms"],
             10.0, False),
        Goal(f"memory with {pages} pages held, bytes a token of context", per_token, 100.0, False),
        Goal("memory, bytes a cached page", per_page, 250.0, False),
        *(
            Goal(f"ranks that compute a step of 1,000 for {row['compute_ms']:.0f} ms wait for the next, ms",
                 row["waited_ms"], 0.5, False)
            for row in found["waits"] if row["steps_in_flight"] == 2
        ),
        *(
            Goal(f"gateway, 1,000 streams of {row['kind']}: tokens by a second of its core", row["tokens_cpu_s"],
                 20_000.0, True)
            for row in found["gateway"][:2]
        ),
    ]  # fmt: skip


def growth(rows: list[dict[str, Any]]) -> Table:
    """How a step grows, for a person."""
    shown = Table(title="A step of the coordinator, CPU time")
    for column in ("streams", "context", "held", "cached", "median ms", "p99 ms", "status ms", "bytes sent", "MiB"):
        shown.add_column(column, justify="right")
    for row in rows:
        figures = (f"{row['median_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['status_ms']:.2f}")
        counts = (f"{row[name]:,}" for name in ("streams", "context", "held", "cached"))
        shown.add_row(*counts, *figures, f"{row['sent_bytes']:,}", f"{row['mib']:.0f}")
    return shown


def main() -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no growth curves")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    gc.set_threshold(COLLECT_AFTER)  # as in a service
    if arguments.only:
        print(json.dumps(only(arguments.only)))
        return 0
    console, found = Console(width=140), {"machine": machine()}
    wanted = {
        "plain": "steps,1000,8192,0", "few_pages": "steps,1000,1600,0", "many_pages": "steps,1000,1600,1000000",
        "long": "long,500,1000000",
    }  # fmt: skip
    for name, what in wanted.items():
        found[name] = apart(what)
        console.print(name, found[name])
    found["gateway"] = [apart(f"{kind},1000") for kind in scale_gateway.KINDS]
    console.print(scale_gateway.table(found["gateway"]))
    found["waits"] = apart("waits,1000")
    console.print(scale_steps.table(found["waits"]))
    if not arguments.quick:
        curves = ["steps,100,1600,0", "steps,300,1600,0", "steps,1000,400,0", "steps,1000,1600,100000"]
        found["growth"] = [found["few_pages"], found["many_pages"], found["plain"], *map(apart, curves)]
        console.print(growth(found["growth"]))
    verdicts = goals(found)
    found["goals"] = [asdict(goal) | {"met": goal.met} for goal in verdicts]
    console.print(table(verdicts))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "scale.json").write_text(json.dumps(found, indent=2) + "\n")
    if not arguments.quick:
        plot_scale(found["growth"], arguments.out / "scale.png")
    return 0 if all(goal.met for goal in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
