"""What protection costs when nothing fails: throughput of every mode beside `none`, in turns on the same machine.

python -m tests.bench.protection [--quick] [--json FILE]
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.local import LocalCluster
from tests.bench.clusters import MODES, peers, stream

PROMPT_TOKENS = 2000
DECODE_TOKENS = 48
DECODE_PROMPT_TOKENS = 256
CASES = (("prefill", 1), ("decode", 1), ("decode", 4), ("decode", 8))
QUICK_CASES = CASES[::2]


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens per second of a mode, median; `ratio` is the median of its ratios to `none` in the same turn."""

    what: str
    streams: int
    mode: str
    tokens_s: float
    ratio: float


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


async def measure(
    clusters: Mapping[str, LocalCluster], rounds: int, console: Console, *, quick: bool = False
) -> list[Row]:
    """All rows. The clusters take turns, in an order that rotates; `none` must be among them. `quick`: half of them."""
    rows = []
    names = list(clusters)
    for case, (what, streams) in enumerate(CASES):
        if quick and (what, streams) not in QUICK_CASES:
            continue
        rates: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seed = 1 + case * 1000 + turn
                rates[name].append(await _rate(clusters[name], what, streams, seed))
        for name in names:
            ratios = [ours / none for ours, none in zip(rates[name], rates["none"], strict=True)]
            rows.append(Row(what, streams, name, statistics.median(rates[name]), statistics.median(ratios)))
        shown = ", ".join(f"{row.mode} {row.tokens_s:.1f} ({row.ratio:.3f})" for row in rows[-len(names) :])
        console.print(f"{what}, {streams} stream(s): {shown}")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a person."""
    shown = Table(title="Tokens/s by mode when nothing fails, TP = 3")
    for column in ("what", "streams", "mode", "tokens/s", "of none"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(row.what, str(row.streams), row.mode, f"{row.tokens_s:.1f}", f"{row.ratio:.3f}")
    return shown


async def _main(modes: Sequence[str], dtype: str, rounds: int, console: Console) -> list[Row]:
    async with peers(modes, dtype) as clusters:
        return await measure(clusters, rounds, console)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--modes", default=",".join(MODES), metavar="M,M", help="which, none among them")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", default="", metavar="FILE")
    arguments = parser.parse_args()
    console = Console(width=120)
    rows = asyncio.run(_main(arguments.modes.split(","), arguments.dtype, 3 if arguments.quick else 9, console))
    console.print(table(rows))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
