"""`ghostserve serve` as a person runs it: it greets, answers, and leaves nothing behind."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest

from services.cli.local import LocalCluster
from shared.errors import ConfigError
from shared.service import EXIT_CONFIG
from tests.cluster.conftest import settings

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def serving(model_dir: Path, *flags: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run `ghostserve serve` until it greets; yields the process and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", "serve", "--port", "0", "--model", str(model_dir), "--dtype", "float32",
        "--kv-memory-mb", "16", "--store-memory-mb", "16", "--served-name", "small", *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    printed = ""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(200):
            while "Ctrl-C" not in printed:
                line = await process.stdout.readline()
                assert line, f"serve ended early: {printed}"
                printed += line.decode()
        yield process, printed
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def pids(printed: str) -> dict[str, int]:
    return {name: int(pid) for name, pid in re.findall(r"^\s+(\S+)\s+pid (\d+)", printed, re.MULTILINE)}


def descendants(roots: set[int]) -> set[int]:
    """All processes below these, by /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pids: set[int]) -> None:
    async with asyncio.timeout(15):
        while any(alive(pid) for pid in pids):
            await asyncio.sleep(0.02)


async def test_serve_answers_the_official_client_and_leaves_no_process(small_model_dir: Path, tmp_path: Path) -> None:
    async with serving(small_model_dir, "--log-dir", str(tmp_path)) as (process, printed):
        assert {"redis", "coordinator", "workers", "gateway", "store-0"} <= pids(printed).keys()
        base_url = re.search(r"Base URL\s+(\S+)", printed)
        assert base_url is not None
        assert "curl" in printed
        async with openai.AsyncOpenAI(base_url=base_url[1], api_key="unused") as client:
            chat = await client.chat.completions.create(
                model="small", messages=[{"role": "user", "content": "the quick brown fox"}], max_tokens=8
            )
            assert chat.choices[0].finish_reason in ("stop", "length")
            again = [
                await client.completions.create(model="small", prompt="the fox", max_tokens=8, seed=3, temperature=1.0)
                for _ in range(2)
            ]
            assert again[0].choices[0].text == again[1].choices[0].text
        family = descendants({process.pid})
        assert len(family) >= 1 + 5 + 4  # serve, its services, four workers
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        await gone(family)
    assert not warnings(tmp_path)  # an end in order is nothing to be warned of


def warnings(folder: Path) -> list[str]:
    """What the services' own logs warn of."""
    lines = [line for log in folder.glob("*.log") if log.name != "redis.log" for line in log.read_text().splitlines()]
    return [line for line in lines if " WARNING " in line or " ERROR " in line]


async def said(process: asyncio.subprocess.Process, text: str) -> None:
    """Read what serve prints until it has said this."""
    assert process.stdout is not None
    printed = ""
    async with asyncio.timeout(60):
        while text not in printed:
            line = await process.stdout.readline()
            assert line, f"serve ended: {printed}"
            printed += line.decode()


async def test_serve_restarts_what_dies_on_the_same_address(small_model_dir: Path) -> None:
    async with serving(small_model_dir) as (process, printed):
        base_url = re.search(r"Base URL\s+(\S+)", printed)
        assert base_url is not None
        family = descendants({process.pid})
        for name in ("redis", "store-0", "coordinator", "gateway"):
            os.kill(pids(printed)[name], signal.SIGKILL)
            await said(process, f"{name} ended with signal SIGKILL")
            await said(process, f"{name} is back")
        async with openai.AsyncOpenAI(base_url=base_url[1], api_key="unused", max_retries=20) as client:
            answer = await client.completions.create(model="small", prompt="the fox", max_tokens=8)
            assert answer.usage is not None
            assert answer.usage.completion_tokens
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        await gone(family)


async def test_nothing_outlives_a_killed_serve(small_model_dir: Path) -> None:
    async with serving(small_model_dir) as (process, _):
        family = descendants({process.pid})
        process.kill()
        await gone(family)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["serve", "--tp", "x"], "--tp / GHOST_TP"),
        (["serve", "--model", "/no/such/place"], "no such directory"),
        (["serve", "--tp", "4", "--port", "0", "--model", "MODEL"], "can't be split into 4 ranks; allowed: 1, 2, 3, 6"),
        (["serve", "--host", "0.0.0.0", "--model", "MODEL"], "GHOST_API_KEYS"),
        (["coordinator", "--port", "99999"], "--port / GHOST_PORT"),
        (["coordinator", "--host", "0.0.0.0", "--port", "0"], "GHOST_TOKEN"),
        (["worker", "--device", "tpu"], "--device / GHOST_DEVICE"),
        (["parity-store", "--capacity-mb", "0"], "--capacity-mb / GHOST_CAPACITY_MB"),
        (["drill", "--target", "rank:9"], "rank:N with N from 0 to 2"),
        (["drill", "--when", "never"], "prefill, decode, or token:N"),
    ],
)
async def test_bad_settings_are_named(small_model_dir: Path, flags: list[str], said: str) -> None:
    arguments = [str(small_model_dir) if flag == "MODEL" else flag for flag in flags]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode in (1, 2, 78)
    assert said in printed.decode()
    assert "Traceback" not in printed.decode()


async def refusal(model_dir: Path, *flags: str) -> tuple[int, str, float]:
    """How `ghostserve serve` ends that can't serve a model: its exit code, what it said, after how many seconds."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", "serve", "--port", "0", "--model", str(model_dir), *flags,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        _, said = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode().strip(), time.monotonic() - began


def pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def cut(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size // 2)


def larger_vocabulary(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))


@pytest.mark.parametrize(
    ("harm", "flags", "named"),
    [
        (pointer, (), "model.safetensors is a Git LFS pointer"),
        (cut, (), "model.safetensors is cut"),
        (larger_vocabulary, (), "model.embed_tokens.weight has shape [400, 48]"),
        (lambda model: None, ("--tp", "4"), "allowed: 1, 2, 3, 6"),
    ],
)
async def test_a_model_that_can_not_be_served_ends_serve_in_one_line_before_anybody_waits(
    small_model_dir: Path, tmp_path: Path, harm: Callable[[Path], None], flags: tuple[str, ...], named: str
) -> None:
    model = Path(shutil.copytree(small_model_dir, tmp_path / "model"))
    harm(model)
    code, said, seconds = await refusal(model, *flags)
    assert (code, len(said.splitlines())) == (EXIT_CONFIG, 1), said
    assert named in said
    assert seconds < 10


async def test_workers_that_find_the_model_wrong_end_the_cluster_in_one_line(
    small_model_dir: Path, tmp_path: Path
) -> None:
    """Where nobody has looked before them, as on another host."""
    model = Path(shutil.copytree(small_model_dir, tmp_path / "model"))
    larger_vocabulary(model)
    async with LocalCluster(settings(), model) as cluster:
        with pytest.raises(ConfigError, match=r"^workers: .*model.embed_tokens.weight has shape") as caught:
            await cluster.wait_serving(60)
    assert "\n" not in str(caught.value)
