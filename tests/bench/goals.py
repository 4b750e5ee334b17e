"""What the figures must come to. A goal that is missed ends the bench with an exit code that is not zero."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tests.bench.checkpoint import Row as CheckpointRow
from tests.bench.checkpoint import replica_of
from tests.bench.protection import Row as ProtectionRow
from tests.bench.recovery import Row as RecoveryRow
from tests.bench.serving import JUDGED_SHARE
from tests.bench.serving import Row as ServingRow


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise and the figure that was measured for it. `at_least`: whether more is better."""

    name: str
    figure: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the figure keeps the promise."""
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit


def protection_goals(rows: Sequence[ProtectionRow]) -> Iterator[Goal]:
    """At most 3% of throughput, in every case."""
    for row in rows:
        if row.mode == "parity":
            yield Goal(f"{row.what}, {row.streams} stream(s): throughput with parity, of none", row.ratio, 0.97, True)


def checkpoint_goals(rows: Sequence[CheckpointRow]) -> Iterator[Goal]:
    """Bytes at most m/k of the copies', and over a network 2.7 times sooner with four ranks or more."""
    for row in rows:
        if row.mode == "parity":
            share = row.store_bytes / replica_of(row, rows).store_bytes
            link = f"{row.link_gbit:g} Gb/s" if row.link_gbit else "memory"
            yield Goal(f"k = {row.k}, m = {row.m}, {link}: stored, of m/k of copies", share * row.k / row.m, 1.0, False)
            if row.link_gbit and row.m == 1 and row.k >= 4:
                speedup = replica_of(row, rows).chunk_s / row.chunk_s
                yield Goal(f"k = {row.k}, {link}: a chunk's checkpoint, times faster than copies", speedup, 2.7, True)


def recovery_goals(rows: Sequence[RecoveryRow]) -> Iterator[Goal]:
    """At 4,096 tokens, one stream, one rank lost."""
    at = {row.mode: row for row in rows if (row.context, row.streams, row.lost) == (4096, 1, 1)}
    if at:
        parity = at["parity"]
        yield Goal("4,096 tokens: stall, times shorter than recomputing", at["none"].stall_s / parity.stall_s, 12, True)
        yield Goal("4,096 tokens: stall, of that with copies", parity.stall_s / at["replicate"].stall_s, 1.0, False)
        yield Goal("4,096 tokens: first new token after the kill, s", parity.new_token_s, 0.6, False)


def serving_goals(rows: Sequence[ServingRow]) -> Iterator[Goal]:
    """With a failure in 15% of requests."""
    at = {row.mode: row.latency["p50"] for row in rows if row.share == JUDGED_SHARE}
    if at:
        yield Goal("15% failures: median response, times shorter than recompute", at["none"] / at["parity"], 1.5, True)


def engine_goals(rows: Sequence[dict[str, Any]]) -> Iterator[Goal]:
    """One process of ours beside generate()."""
    for row in rows:
        if row["name"] == "decode at 512, 4 streams" and "TP=1" in row["ratio"]:
            yield Goal("engine, TP = 1, batch 4: tokens/s, of generate()", row["ratio"]["TP=1"], 1.4, True)


def table(goals: Sequence[Goal]) -> Table:
    """The goals, for a person."""
    shown = Table(title="Goals")
    for column in ("goal", "figure", "limit", ""):
        shown.add_column(column, justify="left" if column == "goal" else "right")
    for goal in goals:
        limit = f"{'>=' if goal.at_least else '<='} {goal.limit:g}"
        shown.add_row(goal.name, f"{goal.figure:.3g}", limit, "met" if goal.met else "MISSED")
    return shown
