"""Everything side by side in one run on this machine: `python -m tests.bench [--quick] [--out DIR]`, `make bench`.

Writes results.json, results.md and results.png, prints the tables as they come, and a summary as the last line. The
exit code is 1 where a goal is missed.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench import checkpoint, engine, goals, plots, projection, protection, recovery, serving
from tests.bench.clusters import MODES, peers


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


async def with_clusters(quick: bool, console: Console) -> tuple[Any, Any, Any]:
    """The sections that need whole clusters, which share them."""
    modes = [mode for mode in MODES if not quick or "=" not in mode]
    async with peers(modes) as clusters:
        cost = await protection.measure(clusters, 3 if quick else 5, console, quick=quick)
        stalls = await recovery.measure(clusters, recovery.QUICK if quick else recovery.FULL, console)
        shares = (0.15,) if quick else serving.SHARES
        loaded = {mode: clusters[mode] for mode in (("none", "parity") if quick else serving.MODES)}
        responses = await serving.measure(loaded, shares, 10 if quick else 14, console)
    return cost, stalls, responses


def markdown(table: Table) -> str:
    """A table as Markdown."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    heads = [str(column.header) for column in table.columns]
    lines = [heads, ["---"] * len(heads), *map(list, zip(*columns, strict=True))]
    return f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> int:
    """Run all, write the files, print the summary. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 5 minutes: fewer cases and repeats")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    arguments = parser.parse_args()
    console, began, quick = Console(width=140), time.monotonic(), arguments.quick
    where = machine()
    speed = engine.measure("bfloat16", (3, 1), quick=quick)
    chunks = checkpoint.run(quick, console)
    cost, stalls, responses = asyncio.run(with_clusters(quick, console))
    computed = projection.project()
    lines = recovery.growth(stalls)
    verdicts = [
        *goals.protection_goals(cost),
        *goals.checkpoint_goals(chunks),
        *goals.recovery_goals(stalls),
        *goals.serving_goals(responses),
        *goals.engine_goals(speed),
    ]
    tables = [
        goals.table(verdicts),
        protection.table(cost),
        checkpoint.table(chunks),
        recovery.table(stalls),
        recovery.growth_table(lines),
        serving.table(responses),
        engine.table(speed),
        *projection.tables(computed),
    ]
    for table in tables:
        console.print(table)
    took = time.monotonic() - began
    results = {
        "machine": where,
        "quick": quick,
        "seconds": round(took),
        "goals": [asdict(goal) | {"met": goal.met} for goal in verdicts],
        "protection": [asdict(row) for row in cost],
        "checkpoint": [asdict(row) for row in chunks],
        "recovery": [asdict(row) for row in stalls],
        "growth": [asdict(line) for line in lines],
        "crossover_tokens": recovery.crossover(lines),
        "serving": [asdict(row) for row in responses],
        "engine": speed,
        "projection": asdict(computed),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    head = f"# Measured by `make bench` on {where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB\n\n"
    (arguments.out / "results.md").write_text(head + "\n".join(map(markdown, tables)))
    plots.plot(stalls, responses, chunks, arguments.out / "results.png")
    missed = [goal.name for goal in verdicts if not goal.met]
    verdict = f"missed: {'; '.join(missed)}" if missed else "all met"
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} goals met in {took / 60:.1f} min; {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
