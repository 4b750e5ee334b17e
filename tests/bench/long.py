"""One long sequence on real processes: prefilled, decoded, a rank killed in mid-decode, and on with the same tokens.

python -m tests.bench.long [--tokens N ...] [--window N] [--page-tokens N] [--out DIR]

A tiny random model, TP = 2, one spare, one parity store. A short stream decodes beside it all the time: its gaps say
whether others keep their pace. The prompt is computed once in peace and once more out of the pool, when rank 1 is
killed. Adds its rows to bench/results/long.json, in the place of those of the same length, window and pages, and draws
long.png. `make bench-long`.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services.cli.drill import Options, Stream, closed_record, stream_all
from services.cli.local import LocalCluster
from tests.bench.curves import plot_long
from tests.bench.links import Links, measure_links
from tests.bench.machine import machine
from tests.cluster.conftest import settings, whole
from tests.tiny_tokenizer import make_tokenizer_dir
from tests.worker.rank_threads import small_model

TOKENS = 64
VOCABULARY = 400
PAGE_TOKENS = 16
LAYERS, HEAD_DIM = 2, 32
KV_BYTES = LAYERS * 2 * HEAD_DIM * 4
"""Of a token, on one rank of the tiny model: one KV head of float32 in each layer."""
BESIDE = 4000
"""Tokens of each stream that decodes beside it, one after the other."""
ALONE_S = 5.0
"""The stream beside is watched for so long before the long one comes."""
DEADLINE_S = 7200.0


@dataclass(frozen=True, slots=True)
class Row:
    """What one run came to; seconds, but for bytes and counts."""

    tokens: int
    window: int
    """Tokens that attention looks back; 0: all."""
    page_tokens: int
    load: float
    """Of the machine, before it."""
    prefill_s: float
    cached_s: float
    """To the first token when all of the prompt's pages are in the pool."""
    decode_tokens_s: float
    """Beside the other stream."""
    stall_s: float
    phases: dict[str, float]
    restored_pages: int
    recomputed_tokens: int
    restored_bytes: int
    restore_bytes_s: float
    links: Links
    parts: dict[str, float]
    """Of the restore, on the rank that decodes: waiting for the store, exchange, and decoding."""
    beside: dict[str, dict[str, float]]
    """The other stream's median and longest gap: alone, beside a prefill, a decode, and when the rank was lost."""
    memory: dict[str, dict[str, int]]
    """Resident bytes of the coordinator and of rank 0: at first, and when the long one is there; KV is in a rank's."""
    identical: bool


def model(folder: Path, positions: int, window: int) -> Path:
    """The tiny model, with a tokenizer."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "max_position_embeddings": positions,
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

    def gaps(self, since: float, until: float) -> dict[str, float]:
        """Seconds between neighbouring tokens, of those that came in this time: median, and longest."""
        found = [
            after - before
            for times in self.times
            for before, after in itertools.pairwise(times)
            if after > since and before < until
        ]
        return {"median_s": statistics.median(found), "longest_s": max(found)}


async def measure(
    folder: Path,
    tokens: int,
    *,
    window: int = 0,
    page_tokens: int = PAGE_TOKENS,
    say: Callable[[str], None] = lambda _: None,
) -> Row:
    """One row, on a cluster of its own; `say` is told how far it is."""
    longest = tokens + BESIDE + 1000
    memory = 8 + 2 * longest * KV_BYTES // 2**20
    changed = settings(
        tp=2, spares=1, page_tokens=page_tokens, kv_memory_mb=memory, store_memory_mb=2 * memory, record=False,
        threads=1, restore="always",
    )  # fmt: skip
    load = os.getloadavg()[0]
    async with LocalCluster(changed, model(folder, longest, window)) as cluster:
        say(f"{tokens:,} tokens, {f'a window of {window:,}' if window else 'full attention'}: the ranks begin")
        await whole(cluster)
        beside = Beside()
        other = asyncio.create_task(beside.run(cluster))
        try:
            row = await _Run(cluster, beside, tokens, window, page_tokens, load, say).row()
            if other.done():
                await other
            return row
        finally:
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)


@dataclass(slots=True)
class _Run:
    """One row in the making."""

    cluster: LocalCluster
    beside: Beside
    tokens: int
    window: int
    page_tokens: int
    load: float
    say: Callable[[str], None]

    async def row(self) -> Row:
        dice = random.Random(self.tokens)
        prompt = [dice.randrange(3, VOCABULARY) for _ in range(self.tokens)]
        while not any(self.beside.times):
            await asyncio.sleep(0.01)
        pids = {worker["rank"]: worker["pid"] for worker in (await whole(self.cluster))["workers"]}
        watched = {"coordinator": self.cluster.processes["coordinator"].pid, "rank 0": pids[0]}
        self.say(f"pids: {watched}")
        at_first = {name: _resident(pid) for name, pid in watched.items()}
        quiet = time.monotonic()
        await asyncio.sleep(ALONE_S)
        calm = await self._in_peace(prompt)
        memory = {name: {"at_first": at_first[name], "then": _resident(pid)} for name, pid in watched.items()}
        struck: list[float] = []

        def strike(index: int, seen: Stream) -> None:
            if not struck and len(seen.tokens) >= TOKENS // 3:
                struck.append(time.monotonic())
                os.kill(pids[1], signal.SIGKILL)
                self.say(f"rank 1 is killed; the first token had come after {seen.first_token_s:.1f} s")

        hit = await self._stream(prompt, strike)
        record, _ = await closed_record(self.cluster, struck[0])
        self.say(f"it went on after {max(hit.gaps):.2f} s")
        links = await measure_links(self.page_tokens * KV_BYTES, ranks=2)
        return Row(
            tokens=self.tokens,
            window=self.window,
            page_tokens=self.page_tokens,
            load=self.load,
            prefill_s=calm.first_token_s,
            cached_s=hit.first_token_s,
            decode_tokens_s=(len(calm.times) - 1) / (calm.times[-1] - calm.times[0]),
            stall_s=max(hit.gaps),
            phases={"detect_s": max(0.0, record["started"] - struck[0])}
            | {name: record[name] for name in ("regroup_s", "weights_s", "restore_s", "recompute_s")},
            restored_pages=record["restored_pages"],
            recomputed_tokens=record["recomputed_tokens"],
            restored_bytes=record["kv_bytes_restored"],
            restore_bytes_s=record["kv_bytes_restored"] / record["restore_s"],
            links=links,
            parts={name: record[name] for name in ("fetch_s", "exchange_s", "decode_s")},
            beside={
                "alone": self.beside.gaps(quiet, calm.started),
                "prefill": self.beside.gaps(calm.started, calm.times[0]),
                "decode": self.beside.gaps(calm.times[0], calm.times[-2]),  # after the last one, all KV is hashed
                "loss": self.beside.gaps(struck[0], hit.times[-2]),
            },
            memory=memory,
            identical=(hit.tokens, hit.digests) == (calm.tokens, calm.digests),
        )

    async def _in_peace(self, prompt: list[int]) -> Stream:
        """The stream without a fault, and all of it protected afterwards."""
        began = time.monotonic()
        waits = asyncio.create_task(self._progress(began))
        try:
            calm = await self._stream(prompt)
        finally:
            waits.cancel()
        self.say(f"prefilled in {calm.first_token_s:.1f} s")
        async with asyncio.timeout(DEADLINE_S):
            while True:  # until all but what the other stream fills right now is protected
                status = await self.cluster.status()
                if status["stripes_pending"] + status["stripes_unprotected"] <= 8:
                    return calm
                await asyncio.sleep(0.05)

    async def _stream(self, prompt: list[int], watch: Callable[[int, Stream], None] = lambda *_: None) -> Stream:
        options = Options(max_tokens=TOKENS)
        (seen,) = await stream_all(self.cluster, [prompt], options, "long", watch=watch, deadline_s=DEADLINE_S)
        return seen

    async def _progress(self, began: float) -> None:
        """Say now and then how much is prefilled."""
        while True:
            await asyncio.sleep(10)
            held = (await self.cluster.status())["pages_held"] * self.page_tokens
            self.say(f"{held:,} of {self.tokens:,} tokens after {time.monotonic() - began:.0f} s")


def _resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, for a person."""
    shown = Table(title="One long sequence, TP = 2, rank 1 killed in decode; seconds")
    for column in ("tokens", "window", "page", "prefill", "cached", "decode tok/s", "stall", "detect", "regroup",
                   "weights", "restore", "recompute", "MB/s restored", "slowest link", "of its slowest part",
                   "gap beside: alone", "in prefill", "at the loss", "coordinator MiB", "same text, KV"):  # fmt: skip
        shown.add_column(column, justify="right")
    for row in rows:
        gaps = [
            f"{row['beside'][when]['median_s']:.3f}, {row['beside'][when]['longest_s']:.2f}"
            for when in ("alone", "prefill", "loss")
        ]
        memory = row["memory"]["coordinator"]
        shown.add_row(
            f"{row['tokens']:,}", f"{row['window'] or 'all'}", f"{row['page_tokens']}", f"{row['prefill_s']:.1f}",
            f"{row['cached_s']:.1f}", f"{row['decode_tokens_s']:.0f}", f"{row['stall_s']:.2f}",
            *(f"{value:.3f}" for value in row["phases"].values()), f"{row['restore_bytes_s'] / 1e6:.0f}",
            f"{min(row['links'].values()) / 1e6:.0f}",
            f"{row['phases']['restore_s'] / max(*row['parts'].values(), 1e-9):.2f}", *gaps,
            f"+{(memory['then'] - memory['at_first']) / 2**20:.0f}", "yes" if row["identical"] else "no",
        )  # fmt: skip
    return shown


def kept(path: Path, row: Row) -> list[dict[str, Any]]:
    """Write a row beside those of other lengths, windows and pages; returns all."""

    def kind(each: dict[str, Any]) -> tuple[int, int, int]:
        return each["page_tokens"], each["window"], each["tokens"]

    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = sorted([*(each for each in before if kind(each) != kind(asdict(row))), asdict(row)], key=kind)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return rows


def main() -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[50_000, 250_000, 1_000_000], help="of the prompts")
    parser.add_argument("--window", type=int, default=1024, help="tokens that attention looks back; 0: all")
    parser.add_argument("--page-tokens", type=int, default=PAGE_TOKENS, help="tokens a page")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    console, began, identical = Console(width=220), time.monotonic(), True
    arguments.out.mkdir(parents=True, exist_ok=True)
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory() as folder:
            row = asyncio.run(
                measure(
                    Path(folder), tokens, window=arguments.window, page_tokens=arguments.page_tokens,
                    say=lambda text: print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True),
                )
            )  # fmt: skip
        identical &= row.identical
        rows = kept(arguments.out / "long.json", row)
        console.print(table(rows))
        plot_long([each for each in rows if each["page_tokens"] == PAGE_TOKENS], arguments.out / "long.png")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
