"""A planned move of a rank to a spare, beside the same stream without one: how long does the client wait?

python -m tests.bench.moves [--quick] [--json FILE]

The rank's pages are copied while steps go on; what was written meanwhile is copied between two steps, and then the
epoch changes. Held: from the last step before that to the first one after it.
"""

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from services.cli.drill import Stream, closed_record
from services.cli.local import LocalCluster
from tests.bench import section
from tests.bench.clusters import peers, stream
from tests.cluster.conftest import quiet

CONTEXT, TOKENS, AT_TOKEN = 4096, 96, 8
REPEATS, QUICK_REPEATS = 5, 1
REST_S = 30.0
SEED = 30_000


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds, medians over the repeats; `step_s`: between two tokens without a move, and with one `longest_gap_s`."""

    context: int
    repeats: int
    step_s: float
    held_s: float
    longest_gap_s: float
    longest_gap_without_s: float
    identical: bool


async def measure(cluster: LocalCluster, repeats: int, console: Console) -> list[Row]:
    """One row: the same prompt, in peace and while rank 1 moves."""
    held, gaps, longest, peace, same = [], list[float](), [], [], True
    for _ in range(repeats):
        status = await quiet(cluster)
        (calm,) = await stream(cluster, SEED, streams=1, prompt=CONTEXT, tokens=TOKENS)
        asked: list[asyncio.Task[None]] = []

        def watch(index: int, seen: Stream, asked: list[asyncio.Task[None]] = asked) -> None:
            if not asked and len(seen.tokens) >= AT_TOKEN:
                asked.append(asyncio.get_running_loop().create_task(_replace(cluster)))

        (hit,) = await stream(cluster, SEED, streams=1, prompt=CONTEXT, tokens=TOKENS, watch=watch)
        await asked[0]
        record, _ = await closed_record(cluster, status["now"])
        assert record["planned"], record["reason"]
        held.append(record["ended"] - record["started"])
        gaps += calm.gaps
        longest.append(max(hit.gaps))
        peace.append(max(calm.gaps))
        same &= hit.tokens == calm.tokens
        console.print(f"held for {held[-1]:.3f} s, longest gap {longest[-1]:.3f} s, without a move {peace[-1]:.3f} s")
    middle = statistics.median
    return [Row(CONTEXT, repeats, middle(gaps), middle(held), middle(longest), middle(peace), same)]


async def _replace(cluster: LocalCluster) -> None:
    """Have rank 1 moved."""
    asked = {"action": "replace", "target": "rank:1"}
    async with (
        cluster.client(REST_S) as session,
        session.post(cluster.base_url + "/v1/fault_tolerance/apply", json=asked) as answer,
    ):
        answer.raise_for_status()


def table(rows: Sequence[Row]) -> Table:
    """The row, for a person."""
    shown = Table(title="A rank moves to a spare while a stream goes on, ms (bfloat16, TP = 3)")
    for column in ("context", "moves", "step", "held", "longest gap", "without a move", "same text"):
        shown.add_column(column, justify="right")
    for row in rows:
        times = (row.step_s, row.held_s, row.longest_gap_s, row.longest_gap_without_s)
        shown.add_row(
            str(row.context), str(row.repeats), *(f"{each * 1e3:.0f}" for each in times),
            "yes" if row.identical else "no",
        )  # fmt: skip
    return shown


async def run(quick: bool, console: Console) -> list[Row]:
    """The section, with a cluster of its own."""
    async with peers(("parity",), spares=1) as clusters:
        return await measure(clusters["parity"], QUICK_REPEATS if quick else REPEATS, console)


if __name__ == "__main__":
    section.run(__doc__, "one move", run, lambda rows: [table(rows)])
