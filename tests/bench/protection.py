"""What protection costs when nothing fails: throughput of every mode beside `none`, in turns on the same machine.

python -m tests.bench.protection [--quick] [--json FILE]
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from services.cli.local import LocalCluster
from tests.bench import section
from tests.bench.clusters import MODES, peers, stream

PROMPT_TOKENS = 2000
DECODE_TOKENS = 48
DECODE_PROMPT_TOKENS = 256
CASES = (("prefill", 1), ("decode", 1), ("decode", 4), ("decode", 8))
QUICK_CASES = CASES[::2]
JUDGED = ("none", "parity")
ROUNDS, QUICK_ROUNDS, OTHERS_ROUNDS = 7, 5, 3


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens per second of a mode, median; `ratio` is the median of its ratios to `none` in the same turn.

    `quarters`: the first and the third quartile of these ratios.
    """

    what: str
    streams: int
    mode: str
    turns: int
    tokens_s: float
    ratio: float
    quarters: tuple[float, float]


async def _rate(cluster: LocalCluster, what: str, streams: int, seed: int) -> float:
    """Prompt tokens per second of one long prompt, or tokens per second over all streams once all of them decode."""
    if what == "prefill":
        (seen,) = await stream(cluster, seed, streams=1, prompt=PROMPT_TOKENS, tokens=2)
        return PROMPT_TOKENS / seen.first_token_s
    all_seen = await stream(cluster, seed, streams=streams, prompt=DECODE_PROMPT_TOKENS, tokens=DECODE_TOKENS)
    start = max(each.times[0] for each in all_seen)
    end = min(each.times[-1] for each in all_seen)
    tokens = sum(sum(start < at <= end for at in each.times) for each in all_seen)
    return tokens / (end - start)


async def measure(clusters: Mapping[str, LocalCluster], console: Console, *, quick: bool) -> list[Row]:
    """All rows. The clusters take turns, in an order that rotates; `none` must be among them. `quick`: half the cases.

    `none` and what is judged against it take part in all turns, the others in the first OTHERS_ROUNDS alone.
    """
    rows = []
    names = list(clusters)
    for case, (what, streams) in enumerate(CASES):
        if quick and (what, streams) not in QUICK_CASES:
            continue
        rates: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(QUICK_ROUNDS if quick else ROUNDS):
            taking = [name for name in names if name in JUDGED or turn < OTHERS_ROUNDS]
            first = turn % len(taking)
            for name in taking[first:] + taking[:first]:
                seed = 1 + case * 1000 + turn
                rates[name].append(await _rate(clusters[name], what, streams, seed))
        for name in names:
            ratios = [ours / none for ours, none in zip(rates[name], rates["none"], strict=False)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rows.append(Row(what, streams, name, len(ratios), statistics.median(rates[name]), middle, (low, high)))
        shown = ", ".join(f"{row.mode} {row.tokens_s:.1f} ({row.ratio:.3f})" for row in rows[-len(names) :])
        console.print(f"{what}, {streams} stream(s): {shown}")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a person."""
    shown = Table(title="Tokens/s by mode when nothing fails, TP = 3")
    for column in ("what", "streams", "mode", "turns", "tokens/s", "of none", "middle half"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row.what, str(row.streams), row.mode, str(row.turns), f"{row.tokens_s:.1f}", f"{row.ratio:.3f}",
            f"{row.quarters[0]:.3f} to {row.quarters[1]:.3f}",
        )  # fmt: skip
    return shown


async def run(quick: bool, console: Console) -> list[Row]:
    """The section, with clusters of its own."""
    async with peers(JUDGED if quick else list(MODES), spares=0) as clusters:
        return await measure(clusters, console, quick=quick)


if __name__ == "__main__":
    section.run(__doc__, "fewer cases, modes and turns", run, lambda rows: [table(rows)])
