"""`make chaos MINUTES=30 SEED=1`: break a cluster at random under steady load; the last line sums up.

Exits 1 on any broken promise; then the services' logs stay in the folder that it names, and recordings of what the
coordinators saw, which can be replayed. Each run replays its own: a coordinator must do the same again.
"""

import argparse
import asyncio
import random
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import SecretStr

from services.cli.local import LocalCluster, ServeSettings
from services.cli.serve import fetch_model
from services.cli.vllm import VllmCluster, VllmSettings, check_installed, vllm_arguments
from shared.errors import GhostError
from tests.chaos.invariants import check
from tests.chaos.load import Clients, make_requests
from tests.chaos.mayhem import SPOILS, Mayhem

SERVING_S = 300.0
POLL_S = 0.2
REPLAY_S = 600.0
REQUESTS = 24
LAG_S = 1.0
"""A sealed page that is not protected after so long counts as unprotected time."""


class Watcher:
    """Looks at the status all the time: how long KV was exposed, how long nothing was served, that epochs only grow."""

    def __init__(self, cluster: LocalCluster, epoch: int):
        self.unprotected_s = 0.0
        self.not_serving_s = 0.0
        self.epoch = epoch
        self.recoveries = 0
        self.wrong: list[str] = []
        self._cluster = cluster

    async def run(self) -> None:
        """Look, until cancelled."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            try:
                status = await self._cluster.status()
            except (aiohttp.ClientError, TimeoutError):
                status = None
            now = time.monotonic()
            self._take(status, now - before)
            before = now

    def _take(self, status: dict[str, Any] | None, seconds: float) -> None:
        serving = status is not None and status["state"] == "serving"
        self.not_serving_s += 0.0 if serving else seconds
        exposed = status is None or status["protection_lag_s"] > LAG_S
        self.unprotected_s += seconds if exposed else 0.0
        if status is None:
            return
        if status["epoch"] < self.epoch:
            self.wrong.append(f"epoch {status['epoch']} after {self.epoch}")
        self.recoveries += max(0, status["epoch"] - self.epoch)
        self.epoch = status["epoch"]


async def run(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Returns the promises that were broken."""
    model_dir = await asyncio.to_thread(_model, arguments.model, folder, arguments.engine)
    orders = folder / "faults"
    orders.mkdir(mode=0o700)
    of_vllm = arguments.engine == "vllm"
    settings = (VllmSettings if of_vllm else ServeSettings)(
        port=0, tp=3, spares=1 if of_vllm else 2, stores=2, parity=2, dtype="float32",
        kv_memory_mb=arguments.kv_memory_mb, store_memory_mb=256, fault_dir=str(orders), log_dir=str(folder / "logs"),
        max_waiting=64, record=True, served_name=model_dir.name, token=SecretStr(secrets.token_hex(8)),
    )  # fmt: skip
    told: list[str] = []
    async with _cluster(settings, model_dir, told) as cluster:
        status = await cluster.wait_serving(SERVING_S)
        await cluster.wait_spares(SERVING_S)
        requests = make_requests(random.Random(arguments.seed), status["model"]["vocab_size"], REQUESTS)
        clients = Clients(cluster, requests, status["served_name"], arguments.clients)
        await clients.learn()
        watcher = Watcher(cluster, status["epoch"])

        def before(targets: tuple[str, ...]) -> None:
            if {"gateway", "all"} & set(targets):
                clients.broke_gateway_at = time.monotonic() + 1.0  # streams that begin while it dies break as well
            if "all" in targets:
                watcher.epoch = 0  # with its Redis the cluster forgets its epoch

        mayhem = Mayhem(cluster, arguments.seed, arguments.pause, before)
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(arguments.minutes * 60, stop.set)
        began = time.monotonic()
        async with cluster.kept():
            watching = asyncio.create_task(watcher.run())
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(clients.run(arguments.seed, stop))
                    if arguments.pause:
                        tasks.create_task(mayhem.run(stop))
                broken = await check(cluster, SERVING_S, scrub=bool(SPOILS & set(mayhem.injected)))
                wrong = clients.tally.wrong + mayhem.hostile.wrong + watcher.wrong + broken
                if watcher.recoveries and not arguments.pause:
                    wrong.append(f"{watcher.recoveries} false alarms")
            except* GhostError as errors:
                wrong = clients.tally.wrong + [str(error) for error in errors.exceptions]
            finally:
                watching.cancel()
        seconds = time.monotonic() - began
    wrong += await asyncio.to_thread(_replay, cluster.recordings)
    _report(arguments, clients, mayhem, watcher, wrong, seconds)
    return wrong


def _cluster(settings: ServeSettings, model_dir: Path, told: list[str]) -> LocalCluster:
    if not isinstance(settings, VllmSettings):
        return LocalCluster(settings, model_dir, told.append)
    check_installed()
    flags = ("--num-gpu-blocks-override", "200", "--max-model-len", "2048")  # few, so that blocks change hands
    return VllmCluster(settings, model_dir, told.append, arguments=(*vllm_arguments(settings, model_dir), *flags))


def _replay(recordings: Path) -> list[str]:
    """What a replay of the coordinators' recordings complains of."""
    command = [sys.executable, "-m", "services.cli", "replay", str(recordings)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=REPLAY_S)
    return [] if ended.returncode == 0 else [f"the replay differs: {(ended.stdout + ended.stderr)[-500:]}"]


def _model(name: str, folder: Path, engine: str) -> Path:
    if name != "small":
        return fetch_model(name)
    if engine == "vllm":
        from tests.vllm.tiny_model import make_model_dir

        return make_model_dir(folder / "model")
    from tests.tiny_tokenizer import make_tokenizer_dir
    from tests.worker.rank_threads import small_model

    return make_tokenizer_dir(small_model(folder / "model", "Llama", vocab_size=400, max_position_embeddings=4096))


def _report(
    arguments: argparse.Namespace, clients: Clients, mayhem: Mayhem, watcher: Watcher, wrong: list[str], seconds: float
) -> None:
    tally = clients.tally
    for kind, count in sorted(mayhem.injected.items()):
        print(f"  {count:4} x {kind}")
    for outcome, count in sorted(mayhem.hostile.outcomes.items()):
        print(f"  {count:4} x {outcome}")
    for promise in wrong:
        print(f"BROKEN PROMISE: {promise}")
    stalls = sorted(tally.stalls) or [0.0]
    p50, p99 = statistics.median(stalls), stalls[min(len(stalls) - 1, int(0.99 * len(stalls)))]
    print(
        f"{'BROKEN' if wrong else 'ok'}: seed {arguments.seed}, {seconds / 60:.1f} min, "
        f"{mayhem.injected.total()} faults, {watcher.recoveries} epochs; {tally.requests} requests, "
        f"{tally.identical} identical, {tally.cancelled} cancelled, {tally.broken} broken off with their gateway and "
        f"asked again, {tally.refused} told to come back, {len(wrong)} wrong; streams' longest stalls p50 {p50:.2f} s, "
        f"p99 {p99:.2f} s; not serving {watcher.not_serving_s:.1f} s, KV unprotected {watcher.unprotected_s:.1f} s"
    )


def main() -> int:
    """Run, and return the exit code."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--engine", choices=["embedded", "vllm"], default="embedded", help="[embedded]")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults are injected [5]")
    parser.add_argument("--seed", type=int, default=1, help="of faults, prompts and clients [1]")
    parser.add_argument("--clients", type=int, default=6, help="requests at once [6]")
    parser.add_argument(
        "--pause",
        type=float,
        default=5.0,
        help="seconds between faults, on average; 0: none, to see no false alarm [5]",
    )
    parser.add_argument("--model", default="small", help="small (random weights), default, or a directory [small]")
    parser.add_argument("--kv-memory-mb", type=int, default=16, help="KV pool of each rank [16]")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=f"ghostserve-chaos-{arguments.seed}-"))
    wrong = asyncio.run(run(arguments, folder))
    if wrong:
        print(f"logs are in {folder}; ghostserve replay {folder}/logs/recordings", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
