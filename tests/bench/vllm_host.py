"""vLLM with its ranks protected, the same without protection, and stock vLLM, side by side: `make bench-vllm`.

python -m tests.bench.vllm_host [--quick] [--out DIR], in vLLM's environment. Prints tables, writes vllm_host.json and
its section of results.md. The two of ours run at once and are measured in turns; stock vLLM, whose ranks spin while
they wait, runs by itself afterwards, and is started again by hand when its rank was killed. Exit code 1 where a goal is
missed.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import openai
import vllm
from rich.console import Console

from services.cli.drill import closed_record
from services.cli.vllm import VllmCluster, VllmSettings, vllm_arguments
from services.worker.engine.model_files import resolve_model
from tests.bench.machine import machine
from tests.bench.vllm_tables import (
    CONTEXT,
    PHASES,
    PROTECTED,
    STOCK,
    UNPROTECTED,
    Figures,
    Kill,
    Memory,
    Speed,
    goals,
    section,
    tables,
    written,
)
from tests.vllm.server import ENVIRONMENT, Server, prompt, serving, stream

RANKS = 3
START_S, WAIT_S = 400.0, 180.0
BEFORE_KILL, AFTER_KILL = 20, 24
"""Tokens of the stream."""
FLAGS = ("--max-model-len", "8192", "--max-num-batched-tokens", "2048")
PREFILL_TOKENS = 2000


class Bench:
    """What is measured so far. Prompts never come twice: each is of a seed of its own."""

    def __init__(self, quick: bool, console: Console):
        self.figures = Figures(machine(), quick, vllm.__version__)
        self.repeats = 1 if quick else 5
        self.kills = 1 if quick else 5
        self.tokens = 24 if quick else 96
        self.console = console
        self._seed = 1000

    def prompt(self, tokens: int) -> list[int]:
        """Tokens that nobody has seen."""
        self._seed += 1
        return prompt(self._seed, tokens)

    async def speed(self, what: str, streams: int, mode: str, server: Server) -> None:
        """Measure once more."""
        rate = await (self._prefill(server) if what == "prefill" else self._decode(server, streams))
        kept = [each for each in self.figures.speeds if (each.what, each.streams, each.mode) == (what, streams, mode)]
        if not kept:
            kept = [Speed(what, streams, mode)]
            self.figures.speeds += kept
        kept[0].rates.append(rate)
        self.console.print(f"{what}, {streams} stream(s), {mode}: {rate:.1f} tokens/s")

    async def _prefill(self, server: Server) -> float:
        began = time.monotonic()
        seen = await stream(server, self.prompt(PREFILL_TOKENS), 1)
        return PREFILL_TOKENS / (seen.times[0] - began)

    async def _decode(self, server: Server, streams: int) -> float:
        """While all of them decode."""
        all_seen = await asyncio.gather(*(stream(server, self.prompt(64), self.tokens) for _ in range(streams)))
        began, ended = max(seen.times[0] for seen in all_seen), min(seen.times[-1] for seen in all_seen)
        return sum(began < at <= ended for seen in all_seen for at in seen.times) / (ended - began)

    def keep(self, kill: Kill) -> None:
        """Take in a kill."""
        self.figures.kills.append(kill)
        self.console.print(f"kill, {kill.mode}: stall {kill.stall_s:.2f} s {kill.phases}")


@asynccontextmanager
async def ours(model: Path, folder: Path, protection: str) -> AsyncIterator[VllmCluster]:
    """vLLM with our classes, and a warm spare."""
    settings = VllmSettings(port=0, tp=RANKS, dtype="float32", served_name="m", log_dir=str(folder / protection),
                            protection=protection, store_memory_mb=2048)  # fmt: skip
    arguments = (*vllm_arguments(settings, model), *FLAGS)
    async with VllmCluster(settings, model, arguments=arguments) as cluster:
        await cluster.wait_serving(START_S)
        await cluster.wait_spares(WAIT_S)
        yield cluster


def client_of(cluster: VllmCluster) -> Server:
    """As the tests' clients know a server."""
    assert cluster.engine is not None
    return Server(cluster.api_url, cluster.engine.process, cluster.log_dir / "vllm.log")  # type: ignore[arg-type]


async def kill(bench: Bench, cluster: VllmCluster, mode: str) -> Kill:
    """Kill rank 1 in decode; its spare is warm."""
    await cluster.wait_spares(WAIT_S)
    server, ids, killed = client_of(cluster), bench.prompt(CONTEXT - BEFORE_KILL), []
    victim = next(each["pid"] for each in (await cluster.status())["workers"] if each["rank"] == 1)

    def saw(tokens: int) -> None:
        if tokens >= BEFORE_KILL and not killed:
            killed.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)

    hit = await stream(server, ids, BEFORE_KILL + AFTER_KILL, saw)
    record, _ = await closed_record(cluster, killed[0])
    await cluster.wait_spares(WAIT_S)
    calm = await stream(server, ids, BEFORE_KILL + AFTER_KILL, extra_body={"cache_salt": "calm"})
    phases = {name: record[name] for name in PHASES} | {"detect_s": max(0.0, record["started"] - killed[0])}
    return Kill(mode, CONTEXT, hit.stall(killed[0]), hit.tokens == calm.tokens, phases, record["restored_pages"],
                record["recomputed_tokens"])  # fmt: skip


async def stock(bench: Bench, model: Path, folder: Path) -> None:
    """Stock vLLM: its speed; then a rank is killed, and the server started again as soon as it has ended."""
    flags = (*FLAGS, "--distributed-executor-backend", "mp")
    ids, killed = bench.prompt(CONTEXT - BEFORE_KILL), []
    with serving(model, folder / "stock.log", *flags, classes=False) as server:
        await warm_up(bench, server)
        for _ in range(bench.repeats):
            for what, streams in CASES:
                await bench.speed(what, streams, STOCK, server)

        def saw(tokens: int) -> None:
            if tokens >= BEFORE_KILL and not killed:
                killed.append(server.kill(1))

        with suppress(openai.OpenAIError):
            await stream(server, ids, BEFORE_KILL + AFTER_KILL, saw)
        while server.process.poll() is None and time.monotonic() - killed[0] < WAIT_S:
            await asyncio.sleep(0.1)
    with serving(model, folder / "stock-again.log", *flags, classes=False) as server:
        seen = await stream(server, ids, 2)
    bench.keep(Kill(STOCK, CONTEXT, seen.times[0] - killed[0], False))


CASES = (("decode", 1), ("decode", 4), ("decode", 8), ("prefill", 1))


async def warm_up(bench: Bench, server: Server) -> None:
    """The first requests of a server are slow."""
    for _ in range(2):
        await asyncio.gather(*(stream(server, bench.prompt(200), 8) for _ in range(4)))


def pss(pid: int) -> int:
    """A process's memory, what is shared divided by those that share it, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


async def memory(cluster: VllmCluster) -> Memory:
    """Once all is protected."""
    await cluster.wait_protected(WAIT_S)
    status = await cluster.status()
    kv = status["stripes_protected"] * status["model"]["page_bytes"] * RANKS
    by_state: dict[str, list[int]] = {}
    for each in status["workers"]:
        by_state.setdefault(each["state"], []).append(pss(each["pid"]))
    return Memory(kv, status["parity_bytes_stored"], sum(by_state["member"]) // RANKS, by_state["spare"][0])


async def measure(bench: Bench, model: Path, folder: Path) -> None:
    """Everything."""
    async with ours(model, folder, "parity") as with_parity, ours(model, folder, "none") as without:
        modes: dict[str, VllmCluster] = {PROTECTED: with_parity, UNPROTECTED: without}
        for cluster in modes.values():
            await warm_up(bench, client_of(cluster))
        for turn in range(bench.repeats):
            for what, streams in CASES:
                for mode, cluster in list(modes.items())[:: 1 if turn % 2 == 0 else -1]:
                    await bench.speed(what, streams, mode, client_of(cluster))
        bench.figures.memory = await memory(with_parity)
        for _ in range(bench.kills):
            for mode, cluster in modes.items():
                bench.keep(await kill(bench, cluster, mode))
    await stock(bench, model, folder)


def main() -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each once, fewer tokens")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    arguments = parser.parse_args()
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    console = Console(width=140)
    bench = Bench(arguments.quick, console)
    with TemporaryDirectory(prefix="bench-vllm-") as folder:
        asyncio.run(measure(bench, resolve_model(None), Path(folder)))
    for table in tables(bench.figures):
        console.print(table)
    (arguments.out / "vllm_host.json").write_text(json.dumps(asdict(bench.figures), indent=2) + "\n")
    results = arguments.out / "results.md"
    results.write_text(written(results.read_text() if results.exists() else "", section(bench.figures)))
    verdicts = list(goals(bench.figures))
    missed = [each.name for each in verdicts if not each.met]
    print(
        f"{len(verdicts) - len(missed)} of {len(verdicts)} goals met"
        + (f"; missed: {'; '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
