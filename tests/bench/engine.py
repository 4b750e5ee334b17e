"""The engine's speed beside transformers' generate(), in one run: `python -m tests.bench.engine [--quick] [--json F]`.

generate() runs in one process with two threads; TP = 3 in three processes, TP = 1 in one, of one thread each.
The prompts are the same random tokens, the weights are the default model's, and each figure is the median of three.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.worker.batch import Chunk
from services.worker.communicator import create, open_rendezvous
from services.worker.kv_pool import KVPool
from services.worker.model import RankModel
from services.worker.model_files import resolve_model
from services.worker.sampler import sample_greedy

PAGE_TOKENS = 16
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

    def measure(self, case: Case, repeats: int) -> float:
        ids = torch.from_numpy(prompts(case)).long()
        if not case.steps:
            seconds = [self._generate(ids, 1, CHUNK) for _ in range(repeats)]
            return case.context / statistics.median(seconds)
        first = self._generate(ids, 1)
        seconds = [self._decode_seconds(ids, case.steps) for _ in range(repeats)]
        del first
        return case.streams * case.steps / statistics.median(seconds)

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


def measure_rank(step: Callable[[list[Chunk]], torch.Tensor], case: Case, repeats: int) -> float:
    """Our tokens a second, as one rank sees it."""
    ids = prompts(case)
    pages = -(-(case.context + case.steps + 1) // PAGE_TOKENS)
    tables = np.arange(case.streams * pages, dtype=np.int32).reshape(case.streams, pages)
    seconds = []
    for turn in range(repeats):
        began = time.perf_counter()
        last: list[int] = []
        if not case.steps or turn == 0:  # decode again over the same context: what is written is the same
            for stream in range(case.streams):
                for start in range(0, case.context, CHUNK):
                    part = ids[stream, start : start + CHUNK]
                    wanted = "last" if start + CHUNK >= case.context else "none"
                    logits = step([Chunk(part, start, case.context, tables[stream], wanted)])  # type: ignore[arg-type]
                last += sample_greedy(logits)
            first = last
        if not case.steps:
            seconds.append(time.perf_counter() - began)
            continue
        tokens = first
        began = time.perf_counter()
        for at in range(case.context, case.context + case.steps):
            chunks = [
                Chunk(np.array([token], dtype=np.int32), at, case.context, table, "last")
                for token, table in zip(tokens, tables, strict=True)
            ]
            tokens = sample_greedy(step(chunks))
        seconds.append(time.perf_counter() - began)
    return (case.streams * case.steps or case.context) / statistics.median(seconds)


def _rank_process(
    model_dir: Path, dtype: torch.dtype, address: str | None, rank: int, size: int, connection: Connection
) -> None:
    torch.set_num_threads(1)
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
    while (message := connection.recv()) is not None:
        case, repeats = message
        connection.send(measure_rank(lambda chunks: model.forward(chunks, pool, communicator), case, repeats))
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

        def measure(case: Case, repeats: int) -> float:
            for end in ends:
                end.send((case, repeats))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat, and no contexts of 4,000 tokens")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sizes", default="3,1", help="TP sizes to measure")
    parser.add_argument("--no-generate", action="store_true", help="ours alone")
    options = parser.parse_args()
    model_dir, dtype = resolve_model(None), getattr(torch, options.dtype)
    cases = [case for case in CASES if not options.quick or case.context <= 2000]
    repeats = 1 if options.quick else 3
    rows: list[dict[str, Any]] = [asdict(case) | {"tokens_per_s": {}} for case in cases]
    for size in map(int, options.sizes.split(",")):
        with rank_processes(model_dir, dtype, size) as measure:
            measure(cases[0], 1)
            for row, case in zip(rows, cases, strict=True):
                row["tokens_per_s"][f"TP={size}"] = measure(case, repeats)
    if not options.no_generate:
        generate = Generate(model_dir, dtype)
        generate.measure(cases[0], 1)
        for row, case in zip(rows, cases, strict=True):
            row["tokens_per_s"]["generate"] = generate.measure(case, repeats)
    for row in rows:
        figures = row["tokens_per_s"]
        line = f"{row['name']:28}" + "".join(f"  {name} {value:7.1f}" for name, value in figures.items())
        if "generate" in figures:
            for name in (name for name in figures if name != "generate"):
                ratio, target = figures[name] / figures["generate"], row["target"][int(name[3:])]
                line += f"  {name}: {ratio:.2f} ({'ok' if ratio >= target else 'below'} {target})"
        print(line)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
