"""The engine's speed beside transformers' generate(), in one run: `python -m tests.bench.engine [--quick] [--json F]`.

generate() runs in one process with two threads; TP = 3 in three processes of one thread, TP = 1 in one of two.
The prompts are the same random tokens, the weights are the default model's. The peers take turns, case by case, so that
what else the machine does hits all of them; figures are medians of the turns, ratios medians of each turn's ratio.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from services.worker.communicator import create, open_rendezvous
from services.worker.engine.batch import Chunk
from services.worker.engine.kv_pool import KVPool
from services.worker.engine.model import RankModel
from services.worker.engine.model_files import resolve_model
from services.worker.engine.sampler import sample_greedy
from tests.bench import engine_floor

PAGE_TOKENS = 16
JUDGED_STREAMS = 4
"""The batch that a goal is for: it has more turns."""
CHUNK = 512
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Case:
    """One figure: prefill (steps = 0) of a prompt, or decode of `steps` tokens a stream after prompts of `context`."""

    name: str
    context: int
    streams: int
    steps: int
    target: dict[int, float]  # by TP size: the least ratio to generate()


CASES = (
    Case("prefill 2000", 2000, 1, 0, {3: 0.85, 1: 0.95}),
    Case("decode at 512, 1 stream", 512, 1, 24, {3: 0.75, 1: 1.3}),
    Case("decode at 512, 4 streams", 512, 4, 16, {3: 1.1, 1: 1.3}),
    Case("decode at 512, 8 streams", 512, 8, 16, {3: 0.9, 1: 1.3}),
    Case("decode at 512, 16 streams", 512, 16, 16, {3: 0.9, 1: 1.3}),
    Case("decode at 4000, 4 streams", 4000, 4, 8, {3: 1.8, 1: 2.0}),
    Case("decode at 4000, 8 streams", 4000, 8, 6, {3: 2.2, 1: 2.0}),
)


def prompts(case: Case) -> np.ndarray[Any, np.dtype[np.int32]]:
    """int32 [streams, context]."""
    return np.random.default_rng(case.context).integers(100, 40_000, (case.streams, case.context), dtype=np.int32)


class Generate:
    """transformers, as its users call it; the prefill in the same chunks as ours."""

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(2)
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)

    def measure(self, case: Case, turn: int) -> float:
        """Tokens a second."""
        ids = torch.from_numpy(prompts(case)).long()
        if not case.steps:
            return case.context / self._generate(ids, 1, CHUNK)
        return case.streams * case.steps / self._decode_seconds(ids, case.steps)

    def _generate(self, ids: torch.Tensor, count: int, chunk: int | None = None) -> float:
        began = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            prefill_chunk_size=chunk,
        )
        return time.perf_counter() - began

    def _decode_seconds(self, ids: torch.Tensor, steps: int) -> float:
        """The time of `steps` tokens after the first, taken inside generate() by a streamer's clock."""
        clock = _Clock()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,
            do_sample=False,
            stopping_criteria=[clock],
        )
        return clock.times[-1] - clock.times[0]


class _Clock:
    """A stopping criterion that never stops: it is called after each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: object, **_options: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


class RankBench:
    """Our tokens a second, as one rank sees it. Turns after a case's first decode again over the same context."""

    def __init__(self, step: Callable[[list[Chunk]], torch.Tensor]) -> None:
        self._step = step
        self._first: list[int] = []

    def measure(self, case: Case, turn: int) -> float:
        """Tokens a second."""
        ids = prompts(case)
        pages = -(-(case.context + case.steps + 1) // PAGE_TOKENS)
        tables = np.arange(case.streams * pages, dtype=np.int32).reshape(case.streams, pages)
        began = time.perf_counter()
        if not case.steps or turn == 0:
            self._first = []
            for prompt, table in zip(ids, tables, strict=True):
                for start in range(0, case.context, CHUNK):
                    wanted = "last" if start + CHUNK >= case.context else "none"
                    chunk = Chunk(prompt[start : start + CHUNK], start, case.context, table, wanted)  # type: ignore[arg-type]
                    logits = self._step([chunk])
                self._first += sample_greedy(logits)
        if not case.steps:
            return case.context / (time.perf_counter() - began)
        tokens = self._first
        began = time.perf_counter()
        for at in range(case.context, case.context + case.steps):
            chunks = [
                Chunk(np.array([token], dtype=np.int32), at, case.context, table, "last")
                for token, table in zip(tokens, tables, strict=True)
            ]
            tokens = sample_greedy(self._step(chunks))
        return case.streams * case.steps / (time.perf_counter() - began)


def _rank_process(
    model_dir: Path, dtype: torch.dtype, address: str | None, rank: int, size: int, connection: Connection
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))  # as `serve` has it
    model = RankModel(model_dir, size=size, dtype=dtype)
    model.load(rank)
    spec = model.spec
    pool = KVPool(
        pages=max(c.streams * -(-(c.context + c.steps + 1) // PAGE_TOKENS) for c in CASES),
        layers=spec.layers,
        page_tokens=PAGE_TOKENS,
        kv_heads=spec.kv_heads // size,
        head_dim=spec.head_dim,
        dtype=dtype,
    )
    communicator = create("shm", address, rank, size, timeout=60) if address else None
    bench = RankBench(lambda chunks: model.logits(model.forward(chunks, pool, communicator)))
    while (message := connection.recv()) is not None:
        connection.send(bench.measure(*message))
    if communicator:
        communicator.close()


@contextmanager
def rank_processes(model_dir: Path, dtype: torch.dtype, size: int) -> Iterator[Callable[[Case, int], float]]:
    """A function that measures a case on `size` processes, which are ended at exit."""
    handle = open_rendezvous("shm", size) if size > 1 else None
    ends, processes = [], []
    try:
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            arguments = (model_dir, dtype, handle.address if handle else None, rank, size, theirs)
            process = _CONTEXT.Process(target=_rank_process, args=arguments, daemon=True)
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)

        def measure(case: Case, turn: int) -> float:
            for end in ends:
                end.send((case, turn))
            return min(end.recv() for end in ends)

        yield measure
        for end in ends:
            end.send(None)
        for process in processes:
            process.join(20)
    finally:
        for process in processes:
            process.kill()
        if handle:
            handle.close()


def measure(dtype_name: str, sizes: Sequence[int], *, quick: bool, generate: bool = True) -> list[dict[str, Any]]:
    """All rows; the peers take turns at each case. `quick`: one turn, and no contexts of 4,000 tokens.

    `floor` in a row: tokens/s at the least time, see engine_floor.
    """
    model_dir, dtype = resolve_model(None), getattr(torch, dtype_name)
    cases = [case for case in CASES if not quick or (case.context <= 2000 and case.streams <= 4)]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        peers: dict[str, Callable[[Case, int], float]] = {}
        if generate:
            peers["generate"] = Generate(model_dir, dtype).measure
        for size in sizes:
            peers[f"TP={size}"] = stack.enter_context(rank_processes(model_dir, dtype, size))
        for measure_peer in peers.values():
            measure_peer(cases[0], 0)
        torch.set_num_threads(os.cpu_count() or 1)
        least = engine_floor.measure(model_dir, dtype)
        for case in cases:
            turns = [
                {name: measure_peer(case, turn) for name, measure_peer in peers.items()}
                for turn in range(1 if quick else 5 if case.streams == JUDGED_STREAMS else 3)
            ]
            rows.append(_row(case, turns) | {"floor": least.tokens_s(case.context, case.streams, case.steps)})
            print(_line(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one turn, and no contexts of 4,000 tokens")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sizes", default="3,1", help="TP sizes to measure")
    parser.add_argument("--no-generate", action="store_true", help="ours alone")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    rows = measure(options.dtype, sizes, quick=options.quick, generate=not options.no_generate)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def _row(case: Case, turns: list[dict[str, float]]) -> dict[str, Any]:
    figures = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    ratios = {
        name: statistics.median(turn[name] / turn["generate"] for turn in turns)
        for name in figures
        if "generate" in figures and name != "generate"
    }
    return asdict(case) | {"tokens_per_s": figures, "ratio": ratios}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows, for a person."""
    names = list(rows[0]["tokens_per_s"])
    shown = Table(title="Tokens/s of the engine, bfloat16, beside transformers' generate() in turns (ratio)")
    for column in ("case", *names, "floor"):
        shown.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{row['tokens_per_s'][name]:.1f}" + (f" ({row['ratio'][name]:.2f})" if name in row["ratio"] else "")
            for name in names
        ]
        shown.add_row(row["name"], *cells, f"{row['floor']:.0f}")
    return shown


def _line(row: dict[str, Any]) -> str:
    line = f"{row['name']:28}" + "".join(f"  {name} {value:7.1f}" for name, value in row["tokens_per_s"].items())
    for name, ratio in row["ratio"].items():
        target = row["target"][int(name[3:])]
        line += f"  {name}: {ratio:.2f} ({'ok' if ratio >= target else 'below'} {target})"
    return line


if __name__ == "__main__":
    main()
