"""Where a step of decode goes: python -m tests.bench.engine_profile [--quick] [--json FILE]

One rank by itself, at TP = 1 with all threads and at TP = 3 with one: its communicator answers at once, so what ranks
wait for each other is not in it. A step is timed without the profiler, which then says how it divides. Floor: the
rank's weights and KV over the memory bandwidth.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from services.worker.communicator.base import Communicator, Memory
from services.worker.engine.batch import Chunk
from services.worker.engine.kv_pool import KVPool
from services.worker.engine.model import RankModel
from services.worker.engine.model_files import resolve_model
from services.worker.engine.sampler import sample_greedy
from tests.bench import engine_floor, section

CONTEXT, PAGE_TOKENS = 512, 16
STEPS, PROFILED = 16, 4
PARTS = {
    "linears": ("mkldnn::_linear_pointwise",),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::bmm", "aten::_softmax"),
    "gather": ("aten::index_select", "aten::index_copy_"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of one step. `operations`: how many torch ran in it; `other_ms`: all that is in no part."""

    ranks: int
    streams: int
    step_ms: float
    floor_ms: float
    linears_ms: float
    attention_ms: float
    gather_ms: float
    other_ms: float
    operations: int


class _Alone(Communicator):
    """A rank whose peers are always there already, with the same as it has."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """The sum is what this rank has."""

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        out[:] = tensor

    def all_to_all(self, send: Sequence[Sequence[Memory]], receive: Sequence[Sequence[Memory]]) -> None:
        """No step of the model exchanges pages."""

    def abort(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """It has nothing."""


class _Decode:
    """One rank's model with `streams` sequences of CONTEXT tokens in its pool."""

    def __init__(self, ranks: int, streams: int) -> None:
        self._model = RankModel(resolve_model(None), size=ranks, dtype=torch.bfloat16)
        self._model.load(0)
        spec, pages = self._model.spec, (CONTEXT + STEPS + PROFILED) // PAGE_TOKENS + 1
        self._pool = KVPool(
            pages=streams * pages,
            layers=spec.layers,
            page_tokens=PAGE_TOKENS,
            kv_heads=spec.kv_heads // ranks,
            head_dim=spec.head_dim,
            dtype=torch.bfloat16,
        )
        self._communicator = _Alone(0, ranks, 1.0) if ranks > 1 else None
        self._tables = np.arange(streams * pages, dtype=np.int32).reshape(streams, pages)
        self._at = CONTEXT
        prompt = np.arange(100, 100 + CONTEXT, dtype=np.int32)
        for table in self._tables:
            self._model.forward([Chunk(prompt, 0, CONTEXT, table, "last")], self._pool, self._communicator)

    def step(self) -> float:
        """One token for each sequence. Returns seconds."""
        token = np.array([300], dtype=np.int32)
        began = time.perf_counter()
        chunks = [Chunk(token, self._at, CONTEXT, table, "last") for table in self._tables]
        sample_greedy(self._model.logits(self._model.forward(chunks, self._pool, self._communicator)))
        self._at += 1
        return time.perf_counter() - began


def measure_one(ranks: int, streams: int) -> Row:
    """One rank of `ranks`, with as many threads as `serve` gives it."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    least = engine_floor.measure(resolve_model(None), torch.bfloat16)
    decode = _Decode(ranks, streams)
    seconds = statistics.median([decode.step() for _ in range(STEPS)][1:])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED):
            decode.step()
    spent: dict[str, float] = dict.fromkeys([*PARTS, "other"], 0.0)
    operations = 0
    for event in profiled.key_averages():
        part = next((part for part, names in PARTS.items() if event.key in names), "other")
        spent[part] += event.self_cpu_time_total
        operations += event.count
    scale = seconds * 1e3 / sum(spent.values())
    floor = (least.weight_bytes + streams * CONTEXT * least.token_bytes) / ranks / least.bytes_s
    parts = {f"{part}_ms": value * scale for part, value in spent.items()}
    return Row(ranks, streams, seconds * 1e3, floor * 1e3, **parts, operations=operations // PROFILED)


async def run(quick: bool, console: Console) -> list[Row]:
    """All rows."""
    rows = []
    for ranks in (1, 3):
        for streams in (1, 4) if quick else (1, 4, 8, 16):
            rows.append(await asyncio.to_thread(measure_one, ranks, streams))
            console.print(f"TP = {ranks}, {streams} stream(s): {rows[-1].step_ms:.1f} ms")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a person."""
    shown = Table(title=f"One rank's step of decode after {CONTEXT} tokens, ms, and what it divides into")
    for column in ("TP", "streams", "step", "floor", *PARTS, "other", "operations"):
        shown.add_column(column, justify="right")
    for row in rows:
        figures = (row.step_ms, row.floor_ms, row.linears_ms, row.attention_ms, row.gather_ms, row.other_ms)
        shown.add_row(str(row.ranks), str(row.streams), *(f"{each:.1f}" for each in figures), str(row.operations))
    return shown


if __name__ == "__main__":
    section.run(__doc__, "batches of 1 and 4 alone", run, lambda rows: [table(rows)])
