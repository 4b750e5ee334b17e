"""How long the client's stream stalls when ranks are lost, by mode, context, batch and number of ranks.

python -m tests.bench.recovery [--quick] [--json FILE]

Each case streams its prompts once in peace, so that their pages lie in the pool and are protected, and then again, as
often as it is repeated, with SIGKILL to a rank (or two) after a third of the tokens: what is lost and restored is the
same as if they had just been computed. A strike begins when all workers that earlier ones killed are back. Stall: the
largest gap between tokens that any client saw. Figures are those of the repeat with the median stall.
"""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from services.cli.drill import Stream, closed_record
from services.cli.local import LocalCluster
from tests.bench import section
from tests.bench.clusters import peers, stream
from tests.cluster.conftest import quiet

TOKENS = 24
TAILS = "parity tail=on"


@dataclass(frozen=True, slots=True)
class Case:
    """One situation, and the modes that it is measured in."""

    context: int
    streams: int = 1
    lost: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = ("none", "replicate", "parity")
    repeats: int = 1


QUICK = (Case(1024), Case(4096))
FULL = (
    (
        Case(256),
        Case(1024, repeats=3),
        Case(2048),
        Case(4096, repeats=5, modes=("none", "replicate", "parity", TAILS)),
        Case(8000),
        Case(1024, streams=4),
        Case(512, streams=8),
    ),
    (Case(2048, lost=(0, 2), modes=("none", "replicate", "parity m=2")),),
)
"""Cases of one tuple share their clusters."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one case came to in one mode; seconds."""

    mode: str
    context: int
    streams: int
    lost: int
    stall_s: float
    stalls: list[float]
    """Of all repeats, in their order."""
    new_token_s: float
    """From the kill to the first token at any client after it."""
    phases: dict[str, float]
    restored_pages: int
    recomputed_tokens: int
    identical: bool
    """The text of the run in peace. In bfloat16 near ties may differ between batches of other shapes."""


async def measure(clusters: Mapping[str, LocalCluster], cases: Sequence[Case], console: Console) -> list[Row]:
    """All rows; in each repeat the modes take turns."""
    rows = []
    for number, case in enumerate(cases):
        seed = 10_000 + number
        calm = {mode: await _calm(clusters[mode], case, seed) for mode in case.modes}
        seen: dict[str, list[Row]] = {mode: [] for mode in case.modes}
        for _ in range(case.repeats):
            for mode in case.modes:
                await asyncio.gather(*(quiet(clusters[other]) for other in case.modes))
                seen[mode].append(await _strike(clusters[mode], mode, case, seed, calm[mode]))
        rows += [_median(seen[mode]) for mode in case.modes]
        shown = ", ".join(f"{row.mode} {row.stall_s:.2f} s" for row in rows[-len(case.modes) :])
        console.print(f"{case.context} tokens, {case.streams} stream(s), {len(case.lost)} lost: {shown}")
    return rows


async def _calm(cluster: LocalCluster, case: Case, seed: int) -> list[list[int]]:
    """The tokens of the run in peace."""
    await quiet(cluster)
    seen = await stream(cluster, seed, streams=case.streams, prompt=case.context, tokens=TOKENS)
    return [each.tokens for each in seen]


async def _strike(cluster: LocalCluster, mode: str, case: Case, seed: int, calm: Sequence[Sequence[int]]) -> Row:
    status = await quiet(cluster)
    pids = {worker["rank"]: worker["pid"] for worker in status["workers"]}
    struck: list[float] = []

    def watch(index: int, seen: Stream) -> None:
        if index == 0 and not struck and len(seen.tokens) >= TOKENS // 3:
            struck.append(time.monotonic())
            for rank in case.lost:
                os.kill(pids[rank], signal.SIGKILL)

    hit = await stream(cluster, seed, streams=case.streams, prompt=case.context, tokens=TOKENS, watch=watch)
    record, _ = await closed_record(cluster, struck[0])
    return Row(
        mode=mode,
        context=case.context,
        streams=case.streams,
        lost=len(case.lost),
        stall_s=(stall := max(max(each.gaps) for each in hit)),
        stalls=[stall],
        new_token_s=min(at for each in hit for at in each.times if at > struck[0] + 0.02) - struck[0],
        phases={"detect_s": max(0.0, record["started"] - struck[0])}
        | {name: record[name] for name in ("regroup_s", "weights_s", "restore_s", "recompute_s")},
        restored_pages=record["restored_pages"],
        recomputed_tokens=record["recomputed_tokens"],
        identical=[each.tokens for each in hit] == list(calm),
    )


def _median(rows: Sequence[Row]) -> Row:
    """The row with the median stall (the lower of two)."""
    middle = sorted(rows, key=lambda row: row.stall_s)[(len(rows) - 1) // 2]
    return replace(middle, stalls=[row.stall_s for row in rows])


@dataclass(frozen=True, slots=True)
class Growth:
    """A line through the stalls of one stream and one lost rank."""

    mode: str
    seconds_at_zero: float
    seconds_per_1000: float


def growth(rows: Sequence[Row]) -> list[Growth]:
    """How the stall grows with the context, by mode."""
    lines = []
    for mode in dict.fromkeys(row.mode for row in rows):
        points = [(row.context, row.stall_s) for row in rows if (row.mode, row.streams, row.lost) == (mode, 1, 1)]
        if len(points) > 1:
            fit = statistics.linear_regression(*zip(*points, strict=True))
            lines.append(Growth(mode, fit.intercept, fit.slope * 1000))
    return lines


def crossover(lines: Sequence[Growth]) -> float:
    """Tokens of context below which recomputing is faster than restoring from parity, by the lines; 0 if never."""
    by_mode = {line.mode: line for line in lines}
    none, parity = by_mode["none"], by_mode["parity"]
    slope = (none.seconds_per_1000 - parity.seconds_per_1000) / 1000
    return max(0.0, (parity.seconds_at_zero - none.seconds_at_zero) / slope) if slope > 0 else float("inf")


def growth_table(lines: Sequence[Growth]) -> Table:
    """The lines, for a person."""
    shown = Table(title=f"Growth of the stall; recomputing wins below {crossover(lines):.0f} tokens of context")
    for column in ("mode", "s at no context", "s for each 1,000 tokens"):
        shown.add_column(column, justify="right")
    for line in lines:
        shown.add_row(line.mode, f"{line.seconds_at_zero:.2f}", f"{line.seconds_per_1000:.3f}")
    return shown


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a person."""
    shown = Table(title="Stall of the client's stream after SIGKILL, seconds (bfloat16, TP = 3)")
    for column in ("context", "streams", "lost", "mode", "stall", "from, to", "new token", "detect", "regroup",
                   "weights", "restore", "recompute", "pages", "tokens", "same text"):  # fmt: skip
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            str(row.context), str(row.streams), str(row.lost), row.mode, f"{row.stall_s:.2f}",
            f"{min(row.stalls):.2f}, {max(row.stalls):.2f}" if len(row.stalls) > 1 else "", f"{row.new_token_s:.2f}",
            *(f"{value:.3f}" for value in row.phases.values()), str(row.restored_pages),
            str(row.recomputed_tokens), "yes" if row.identical else "no",
        )  # fmt: skip
    return shown


async def run(quick: bool, console: Console) -> list[Row]:
    """The section, with clusters of its own: as many spares as ranks are lost at once."""
    rows = []
    for cases in (QUICK,) if quick else FULL:
        modes = tuple(dict.fromkeys(mode for case in cases for mode in case.modes))
        async with peers(modes, spares=len(cases[0].lost)) as clusters:
            rows += await measure(clusters, cases, console)
    return rows


if __name__ == "__main__":
    section.run(__doc__, "fewer cases", run, lambda rows: [table(rows), growth_table(growth(rows))])
