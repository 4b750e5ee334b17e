"""Everything side by side in one run on this machine: `python -m tests.bench [--quick] [--out DIR]`, `make bench`.

Writes results.json, results.md and results.png, prints the tables as they come, and a summary as the last line. The
exit code is 1 where a goal is missed.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench import (
    checkpoint,
    engine,
    engine_profile,
    goals,
    load_generator,
    moves,
    plots,
    projection,
    protection,
    recovery,
    serving,
    stripes,
    vllm_tables,
)
from tests.bench.machine import machine
from tests.bench.section import markdown


class Results:
    """What has been measured so far, by section: printed as it comes, and kept in a file should a later one fail."""

    def __init__(self, folder: Path, console: Console, quick: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._console = console
        self._began = time.monotonic()
        self.figures: dict[str, Any] = {"machine": machine(), "quick": quick, "seconds": 0}
        self.tables: list[Table] = []

    def add(self, name: str, rows: Any, *tables: Table) -> None:
        """Take in a section. `rows`: what its JSON is made of, dataclasses or not."""
        self.figures[name] = [_plain(row) for row in rows] if isinstance(rows, list) else _plain(rows)
        self.figures["seconds"] = round(time.monotonic() - self._began)
        self.tables += tables
        for table in tables:
            self._console.print(table)
        self._console.print(f"{name}: done after {self.figures['seconds'] / 60:.1f} min")
        (self._folder / "results.json.part").write_text(json.dumps(self.figures, indent=2) + "\n")

    def finish(self) -> None:
        """Write the files, the section that came last (the goals) before all others."""
        (self._folder / "results.json.part").rename(self._folder / "results.json")
        where = self.figures["machine"]
        head = f"# Measured by `make bench` on {where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB"
        *sections, goals = map(markdown, self.tables)
        path = self._folder / "results.md"
        of_vllm = vllm_tables.kept(path.read_text()) if path.exists() else ""  # measured apart from the rest
        path.write_text("\n".join([head, "", goals, *sections]) + of_vllm)


def _plain(row: Any) -> Any:
    return asdict(row) if is_dataclass(row) and not isinstance(row, type) else row


async def with_services(quick: bool, console: Console, results: Results) -> tuple[Any, Any, Any]:
    """The sections that need whole clusters, and where a step of the engine goes."""
    if not quick:
        steps = await engine_profile.run(quick, console)
        results.add("engine_profile", steps, engine_profile.table(steps))
    cost = await protection.run(quick, console)
    results.add("protection", cost, protection.table(cost))
    stalls = await recovery.run(quick, console)
    lines = recovery.growth(stalls)
    results.add("recovery", stalls, recovery.table(stalls), recovery.growth_table(lines))
    results.add("growth", lines)
    results.add("crossover_tokens", recovery.crossover(lines))
    if quick:
        return cost, stalls, []
    responses = await serving.run(quick, console)
    results.add("serving", responses, serving.table(responses))
    moved = await moves.run(quick, console)
    results.add("moves", moved, moves.table(moved))
    rows = await load_generator.run(quick, console)
    results.add("load_generator", rows, *([load_generator.table(rows)] if rows else []))
    return cost, stalls, responses


def main() -> int:
    """Run all, write the files, print the summary. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 5 minutes: no load, fewer cases and repeats")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    arguments = parser.parse_args()
    console, began, quick = Console(width=140), time.monotonic(), arguments.quick
    results = Results(arguments.out, console, quick)
    speed = engine.measure("bfloat16", (3, 1), quick=quick)
    results.add("engine", speed, engine.table(speed))
    chunks = checkpoint.run(quick, console)
    results.add("checkpoint", chunks, checkpoint.table(chunks))
    kept = stripes.run(stripes.QUICK_STRIPES if quick else stripes.STRIPES)
    results.add("stripes", kept, stripes.table(kept))
    cost, stalls, responses = asyncio.run(with_services(quick, console, results))
    computed = projection.project()
    results.add("projection", computed, *projection.tables(computed))
    verdicts = [
        *goals.protection_goals(cost),
        *goals.checkpoint_goals(chunks),
        *goals.recovery_goals(stalls),
        *goals.serving_goals(responses),
        *goals.engine_goals(speed),
    ]
    results.add("goals", [asdict(goal) | {"met": goal.met} for goal in verdicts], goals.table(verdicts))
    results.finish()
    plots.plot(stalls, responses, chunks, arguments.out / "results.png")
    took = time.monotonic() - began
    missed = [goal.name for goal in verdicts if not goal.met]
    verdict = f"missed: {'; '.join(missed)}" if missed else "all met"
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} goals met in {took / 60:.1f} min; {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
