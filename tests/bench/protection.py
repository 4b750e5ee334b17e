"""What protection costs when nothing fails: a cluster with parity beside one without, in turns on the same machine.

python -m tests.bench.protection [--quick] [--json FILE]
"""

import argparse
import asyncio
import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.drill import Options, Stream, stream_all
from services.local import LocalCluster, ServeSettings
from services.serve import fetch_model

SERVING_S = 300.0
PROMPT_TOKENS = 2000
DECODE_TOKENS = 64
DECODE_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens per second in both clusters, medians; `ratio` is the median of the ratios of neighbouring runs."""

    what: str
    streams: int
    parity: float
    none: float
    ratio: float


async def prefill_rate(cluster: LocalCluster, seed: int) -> float:
    """Prompt tokens per second of one long prompt."""
    streams = await _run(cluster, seed, 1, PROMPT_TOKENS, 2)
    return PROMPT_TOKENS / streams[0].first_token_s


async def decode_rate(cluster: LocalCluster, seed: int, streams: int) -> float:
    """Tokens per second over all streams, once all of them decode."""
    seen = await _run(cluster, seed, streams, DECODE_PROMPT_TOKENS, DECODE_TOKENS)
    start = max(each.times[0] for each in seen)
    end = min(each.times[-1] for each in seen)
    tokens = sum(sum(start < at <= end for at in each.times) for each in seen)
    return tokens / (end - start)


async def _run(cluster: LocalCluster, seed: int, streams: int, prompt: int, tokens: int) -> list[Stream]:
    dice = random.Random(seed)
    prompts = [[dice.randrange(100, 40_000) for _ in range(prompt)] for _ in range(streams)]
    return await stream_all(cluster, prompts, Options(max_tokens=tokens), f"bench-{seed}", digest=False)


async def measure(dtype: str, rounds: int, console: Console) -> list[Row]:
    """All rows. The clusters take turns, and the order of a turn alternates."""
    model_dir = await asyncio.to_thread(fetch_model, "default")
    protected = ServeSettings(port=0, dtype=dtype, protection="parity")  # type: ignore[arg-type]
    bare = ServeSettings(port=0, dtype=dtype, protection="none", stores=0)  # type: ignore[arg-type]
    async with LocalCluster(protected, model_dir) as first, LocalCluster(bare, model_dir) as second:
        for cluster in (first, second):
            await cluster.wait_serving(SERVING_S)
            await prefill_rate(cluster, 0)
        rows = []
        for what, streams in (("prefill", 1), ("decode", 1), ("decode", 4), ("decode", 8)):
            rates: dict[LocalCluster, list[float]] = {first: [], second: []}
            for turn in range(rounds):
                for cluster in (first, second) if turn % 2 else (second, first):
                    seed = hash((what, streams, turn)) & 0xFFFFFF
                    rate = prefill_rate(cluster, seed) if what == "prefill" else decode_rate(cluster, seed, streams)
                    rates[cluster].append(await rate)
            ratios = [a / b for a, b in zip(rates[first], rates[second], strict=True)]
            rows.append(
                Row(
                    what,
                    streams,
                    statistics.median(rates[first]),
                    statistics.median(rates[second]),
                    statistics.median(ratios),
                )
            )
            console.print(rows[-1])
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", default="", metavar="FILE")
    arguments = parser.parse_args()
    console = Console()
    rows = asyncio.run(measure(arguments.dtype, 3 if arguments.quick else 9, console))
    table = Table(title=f"Tokens/s with parity and without, {arguments.dtype}, TP = 3")
    for column in ("what", "streams", "parity", "none", "parity / none"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.what, str(row.streams), f"{row.parity:.1f}", f"{row.none:.1f}", f"{row.ratio:.3f}")
    console.print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
