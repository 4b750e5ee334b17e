"""vLLM's own API server with our classes, as a process; its workers found and broken by real signals."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from openai import AsyncOpenAI

START_S = 240.0
SPARE_S = 90.0
CLASSES = {
    "--distributed-executor-backend": "services.vllm.executor.GhostExecutor",
    "--worker-cls": "services.vllm.worker.GhostCpuWorker",
    "--scheduler-cls": "services.vllm.scheduler.GhostScheduler",
}
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Server:
    """A server that is up."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    size: int = 3

    def client(self) -> AsyncOpenAI:
        """The official client, for one event loop; to be closed."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="-", timeout=240, max_retries=0)

    def titles(self) -> dict[str, int]:
        """Titles and process ids of the server's processes."""
        return dict(_titles_below(self.process.pid))

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        return {int(title.rpartition("_TP")[2]): pid for title, pid in self.titles().items() if "_TP" in title}

    def spares(self) -> list[int]:
        """Processes that are ready to take a rank."""
        return [pid for title, pid in self.titles().items() if title.endswith("_spare")]

    def engine_core(self) -> int:
        """The process of the engine core."""
        return next(pid for title, pid in self.titles().items() if "EngineCore" in title)

    def kill(self, *ranks: int, how: signal.Signals = signal.SIGKILL) -> float:
        """Send a signal to ranks, all at once. Returns when."""
        pids = self.ranks()
        at = time.monotonic()
        for rank in ranks:
            os.kill(pids[rank], how)
        return at

    async def whole(self, spares: int = 1) -> None:
        """Wait until all ranks are there, and as many spares are ready."""
        end = time.monotonic() + SPARE_S
        while len(self.ranks()) < self.size or len(self.spares()) < spares:
            assert time.monotonic() < end, f"{self.titles()}\n{self.tail()}"
            await asyncio.sleep(0.1)

    def healthy(self) -> bool:
        """Whether /health says so."""
        with suppress(OSError), urlopen(f"{self.url}/health", timeout=5) as answer:
            return int(answer.status) == 200
        return False

    def tail(self, lines: int = 60) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass
class Seen:
    """What came of one stream."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish: str = ""

    def stall(self, since: float) -> float:
        """The longest time without a token that ended after `since`, which is when something broke."""
        return max(after - before for before, after in pairwise(self.times) if after > since)


@contextmanager
def serving(
    model: Path, log: Path, *flags: str, classes: bool = True, size: int = 3, **environment: str
) -> Iterator[Server]:
    """Start a server and wait until it is healthy; end it, and all its processes, with SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = [word for pair in CLASSES.items() for word in pair] if classes else []
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "m",
               "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--tensor-parallel-size", str(size),
               "--enforce-eager", "--max-model-len", "4096", "--block-size", "32", "--max-num-seqs", "16",
               "--max-num-batched-tokens", "256", *ours, *flags]  # fmt: skip
    root = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | ENVIRONMENT | {"PYTHONPATH": root} | environment
        )
    server = Server(f"http://127.0.0.1:{port}", process, log, size)
    try:
        end = time.monotonic() + START_S
        while not server.healthy():
            assert process.poll() is None, server.tail()
            assert time.monotonic() < end, server.tail()
            time.sleep(0.2)
        yield server
    finally:
        below = [pid for _, pid in _titles_below(process.pid)]
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in (process.pid, *below):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def prompt(seed: int, tokens: int) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(5, 500, tokens).tolist()  # type: ignore[no-any-return]


async def stream(
    server: Server, ids: list[int], tokens: int, saw: Callable[[int], None] = lambda count: None, **parameters: Any
) -> Seen:
    """Read one completion to its end. `saw` is told how many tokens have come."""
    extra = {"ignore_eos": True, "return_token_ids": True} | parameters.pop("extra_body", {})
    seen = Seen()
    async with server.client() as client:
        events = await client.completions.create(
            model="m", prompt=ids, max_tokens=tokens, stream=True, extra_body=extra, **({"temperature": 0} | parameters)
        )
        async for event in events:
            for choice in event.choices:
                new = getattr(choice, "token_ids", None) or []
                seen.tokens += new
                seen.times += [time.monotonic()] * len(new)
                seen.finish = choice.finish_reason or seen.finish
                if new:
                    saw(len(seen.tokens))
    return seen


def _titles_below(root: int) -> Iterator[tuple[str, int]]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    queue = [root]
    while queue:
        for pid in children.get(queue.pop(), []):
            queue.append(pid)
            with suppress(OSError):
                yield Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip(), pid
