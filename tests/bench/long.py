"""One long sequence on real processes: prefilled, decoded, a rank killed in mid-decode, and on with the same tokens.

python -m tests.bench.long [--tokens N] [--window N] [--out DIR]

A tiny random model, TP = 2, one spare, one parity store. A short stream decodes beside it all the time: its gaps say
whether others keep their pace. The prompt is computed once in peace and once more out of the pool, when rank 1 is
killed. Writes bench/results/long.json. `make bench-long`.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.cli.drill import Options, Stream, closed_record, stream_all
from services.cli.local import LocalCluster
from tests.bench.links import Links, measure_links
from tests.bench.machine import machine
from tests.cluster.conftest import settings, whole
from tests.tiny_tokenizer import make_tokenizer_dir
from tests.worker.rank_threads import small_model

TOKENS = 24
VOCABULARY = 400
PAGE_TOKENS = 16
KV_BYTES = 64
"""Of a token, on one rank of the tiny model: one layer, one KV head of 8 float32."""
BESIDE = 4000
"""Tokens of each stream that decodes beside it, one after the other."""
PROTECTED_S = 300.0


@dataclass(frozen=True, slots=True)
class Row:
    """What one run came to; seconds, but for bytes and counts."""

    tokens: int
    window: int
    """Tokens that attention looks back; 0: all."""
    prefill_s: float
    stall_s: float
    phases: dict[str, float]
    restored_pages: int
    recomputed_tokens: int
    restored_bytes: int
    restore_bytes_s: float
    links: Links
    parts: dict[str, float]
    """Of the restore, on the rank that decodes: waiting for the store, exchange, and decoding."""
    beside_median_s: float
    beside_prefill_s: float
    """The longest gap of the other stream while the long one was prefilled, and when the rank was lost."""
    beside_loss_s: float
    identical: bool


def model(folder: Path, positions: int, window: int) -> Path:
    """The tiny model, with a tokenizer."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": positions,
    }  # fmt: skip
    if window:
        return make_tokenizer_dir(small_model(folder, "Mistral", **sizes, sliding_window=window))
    return make_tokenizer_dir(small_model(folder, "Llama", **sizes))


@dataclass(slots=True)
class Beside:
    """Streams one after the other, until cancelled; when each of their tokens came."""

    times: list[list[float]] = field(default_factory=list)

    async def run(self, cluster: LocalCluster) -> None:
        """Stream."""
        for number in itertools.count():
            seen: list[float] = []
            self.times.append(seen)

            def watch(index: int, stream: Stream, seen: list[float] = seen) -> None:
                seen.extend(stream.times[len(seen) :])

            await stream_all(
                cluster, [[5 + number % 90] * 8], Options(max_tokens=BESIDE), "beside", digest=False, watch=watch
            )

    def gaps(self, since: float, until: float) -> list[float]:
        """Seconds between neighbouring tokens, of those that came in this time."""
        return [
            after - before
            for times in self.times
            for before, after in itertools.pairwise(times)
            if after > since and before < until
        ]


async def measure(folder: Path, tokens: int, *, window: int = 0) -> Row:
    """One row, on a cluster of its own."""
    longest = tokens + BESIDE + 1000
    memory = 8 + 2 * longest * KV_BYTES // 2**20
    changed = settings(
        tp=2, spares=1, page_tokens=PAGE_TOKENS, kv_memory_mb=memory, store_memory_mb=2 * memory, record=False,
        threads=1,
    )  # fmt: skip
    async with LocalCluster(changed, model(folder, longest, window)) as cluster:
        await whole(cluster)
        beside = Beside()
        other = asyncio.create_task(beside.run(cluster))
        try:
            row = await _strike(cluster, tokens, window, beside, await measure_links(PAGE_TOKENS * KV_BYTES, ranks=2))
            if other.done():
                await other
            return row
        finally:
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)


async def _strike(cluster: LocalCluster, tokens: int, window: int, beside: Beside, links: Links) -> Row:
    dice = random.Random(tokens)
    prompt = [dice.randrange(3, VOCABULARY) for _ in range(tokens)]
    options = Options(max_tokens=TOKENS)
    while not any(beside.times):
        await asyncio.sleep(0.01)
    (calm,) = await stream_all(cluster, [prompt], options, "long")
    await _protected(cluster)
    pids = {worker["rank"]: worker["pid"] for worker in (await whole(cluster))["workers"]}
    struck: list[float] = []

    def watch(index: int, seen: Stream) -> None:
        if not struck and len(seen.tokens) >= TOKENS // 3:
            struck.append(time.monotonic())
            os.kill(pids[1], signal.SIGKILL)

    (hit,) = await stream_all(cluster, [prompt], options, "long", watch=watch)
    record, _ = await closed_record(cluster, struck[0])
    prefilled, in_peace = calm.times[0], beside.gaps(calm.started, calm.times[0])
    return Row(
        tokens=tokens,
        window=window,
        prefill_s=calm.first_token_s,
        stall_s=max(hit.gaps),
        phases={"detect_s": max(0.0, record["started"] - struck[0])}
        | {name: record[name] for name in ("regroup_s", "weights_s", "restore_s", "recompute_s")},
        restored_pages=record["restored_pages"],
        recomputed_tokens=record["recomputed_tokens"],
        restored_bytes=record["kv_bytes_restored"],
        restore_bytes_s=record["kv_bytes_restored"] / record["restore_s"],
        links=links,
        parts={name: record[name] for name in ("fetch_s", "exchange_s", "decode_s")},
        beside_median_s=statistics.median(in_peace),
        beside_prefill_s=max(beside.gaps(calm.started, prefilled)),
        beside_loss_s=max(beside.gaps(struck[0], hit.times[-1])),
        identical=(hit.tokens, hit.digests) == (calm.tokens, calm.digests),
    )


async def _protected(cluster: LocalCluster) -> None:
    """Wait until all but what the other stream fills right now is protected."""
    async with asyncio.timeout(PROTECTED_S):
        while True:
            status = await cluster.status()
            if status["stripes_pending"] + status["stripes_unprotected"] <= 8:
                return
            await asyncio.sleep(0.05)


def table(rows: list[Row]) -> Table:
    """The rows, for a person."""
    shown = Table(title="One long sequence, TP = 2, rank 1 killed in decode; seconds")
    for column in ("tokens", "window", "prefill", "stall", "detect", "regroup", "weights", "restore", "recompute",
                   "MB/s restored", "slowest link", "of its slowest part", "gap beside: median", "longest in prefill",
                   "at the loss", "same text and KV"):  # fmt: skip
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            f"{row.tokens:,}", f"{row.window or 'all'}", f"{row.prefill_s:.1f}", f"{row.stall_s:.2f}",
            *(f"{value:.3f}" for value in row.phases.values()), f"{row.restore_bytes_s / 1e6:.0f}",
            f"{row.links.slowest / 1e6:.0f}",
            f"{row.phases['restore_s'] / max(row.parts.values()):.2f}", f"{row.beside_median_s:.3f}",
            f"{row.beside_prefill_s:.2f}", f"{row.beside_loss_s:.2f}", "yes" if row.identical else "no",
        )  # fmt: skip
    return shown


def main() -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000, 1_000_000], help="of the prompts")
    parser.add_argument("--window", type=int, default=1024, help="tokens that attention looks back; 0: all")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    rows = []
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(asyncio.run(measure(Path(folder), tokens, window=arguments.window)))
        Console(width=200).print(table(rows))
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    (arguments.out / "long.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(row.identical for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
