"""`ghostserve vllm serve` as a person has it: one command, a chat, a rank that dies, a status, Ctrl-C."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from openai import OpenAI

from tests.vllm.server import ENVIRONMENT

pytestmark = pytest.mark.timeout(400)

START_S, STOP_S, SEEN_S = 240.0, 60.0, 30.0
TOKENS, KILL_AT = 300, 5
"""Of an answer; most of it is still to come when the rank dies, however far the server is ahead of its client."""
ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "services.cli")


@dataclass
class Running:
    """The command, up."""

    process: subprocess.Popen[bytes]
    api: str
    page: str
    log: Path

    def status(self) -> dict[str, Any]:
        """The cluster's."""
        with urlopen(self.page + "/v1/fault_tolerance/status", timeout=10) as answer:
            return json.load(answer)  # type: ignore[no-any-return]

    def left(self) -> list[str]:
        """What lives of the command's session, which all that it starts is of."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()[:120])
            except OSError:
                continue
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(model: Path, log: Path, *flags: str) -> Running:
    ports = free_port(), free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*COMMAND, "vllm", "serve", str(model), "--port", str(ports[0]), "--served-model-name", "tiny",
             "--tensor-parallel-size", "3", "--dtype", "float32", "--enforce-eager", "--block-size", "32",
             "--max-model-len", "2048", "--ghost-port", str(ports[1]), *flags],
            stdout=out, stderr=out, env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
    return Running(process, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", log)


@pytest.fixture(scope="module")
def running(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The command with protected ranks and a spare. It always restores: what is faster depends on the machine."""
    command = start(tiny_llama, tmp_path_factory.mktemp("serve") / "log", "--ghost-restore", "always")
    try:
        wait(lambda: "Ctrl-C stops" in command.log.read_text() and has_spare(command), START_S, command)
        yield command
    finally:
        if command.process.poll() is None:
            os.killpg(command.process.pid, signal.SIGTERM)
            command.process.wait(STOP_S)


def has_spare(command: Running) -> bool:
    return any(worker["state"] == "spare" for worker in command.status()["workers"])


def wait(met: Any, seconds: float, command: Running) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert command.process.poll() is None, command.log.read_text()[-5000:]
        assert time.monotonic() < end, command.log.read_text()[-5000:]
        time.sleep(0.2)


def chat(command: Running, *, kill_at: int = -1) -> str:
    """One streamed answer; rank 1 dies after so many pieces of it."""
    text, pieces = "", 0
    with OpenAI(base_url=command.api + "/v1", api_key="-", max_retries=0, timeout=200) as client:
        for event in client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "ghost " * 200}], max_tokens=TOKENS, temperature=0,
            stream=True, extra_body={"ignore_eos": True, "min_tokens": TOKENS},
        ):  # fmt: skip
            if event.choices and (event.choices[0].delta.content or event.choices[0].finish_reason):
                text += event.choices[0].delta.content or ""
                pieces += 1
                if pieces == kill_at:
                    os.kill(next(each["pid"] for each in command.status()["workers"] if each["rank"] == 1), 9)
    return text


def test_one_command_serves_loses_a_rank_in_mid_stream_and_leaves_no_process(running: Running) -> None:
    before = chat(running)
    wait(lambda: not running.status()["stripes_pending"] + running.status()["stripes_unprotected"], SEEN_S, running)
    assert running.status()["recoveries"] == []
    after = chat(running, kill_at=KILL_AT)
    assert after == before

    def closed() -> bool:
        return any(record["lost_ranks"] == [1] and record["ended"] for record in running.status()["recoveries"])

    wait(closed, SEEN_S, running)
    shown = subprocess.run(
        [*COMMAND, "status", "--url", running.page], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"COLUMNS": "160"},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout
    assert "rank 1 lost" in shown.stdout
    assert "vLLM" in shown.stdout
    wait(lambda: running.status()["generated_tokens"] >= 2 * TOKENS, SEEN_S, running)  # told once a second
    record = running.status()["recoveries"][-1]
    assert (record["sequences"], record["restored_pages"] > 0) == (1, True), json.dumps(record)

    wait(lambda: running.status()["running"] == running.status()["pages_held"] == 0, SEEN_S, running)

    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(STOP_S) == 0, running.log.read_text()[-3000:]
    assert running.left() == []


def test_a_command_that_is_killed_leaves_no_process(tiny_llama: Path, tmp_path: Path) -> None:
    command = start(tiny_llama, tmp_path / "log")
    try:
        wait(lambda: "Ctrl-C stops" in command.log.read_text(), START_S, command)
    finally:
        command.process.kill()
        command.process.wait()
    end = time.monotonic() + STOP_S
    while left := command.left():
        assert time.monotonic() < end, left
        time.sleep(0.2)


def test_a_flag_that_is_not_protected_ends_the_command_in_a_line(tiny_llama: Path, tmp_path: Path) -> None:
    command = start(tiny_llama, tmp_path / "log", "--no-enable-prefix-caching")
    assert command.process.wait(START_S) == 78
    *_, last = [line for line in command.log.read_text().splitlines() if line.startswith("ghostserve vllm:")]
    assert "--no-enable-prefix-caching" in last
    assert command.left() == []
