"""Children of a local cluster are started again where they were, and given up when they can't live."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from services.cli import local
from services.cli.child import Command, start
from services.cli.local import LocalCluster, ServeSettings
from shared.errors import GhostError

LISTENER = """
import socket, sys, time
port = int(sys.argv[-1]) if "--port" in sys.argv else 0
listener = socket.create_server(("127.0.0.1", port))
print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
time.sleep(60)
"""


def made(tmp_path: Path, *arguments: str, port_flag: str = "") -> tuple[LocalCluster, Command, list[str]]:
    told: list[str] = []
    cluster = LocalCluster(ServeSettings(log_dir=str(tmp_path)), tmp_path, told.append)
    return cluster, Command("child", arguments, os.environ, tmp_path / "child.log", port_flag), told


async def test_a_killed_child_comes_back_on_its_address(tmp_path: Path) -> None:
    cluster, command, told = made(tmp_path, sys.executable, "-c", LISTENER, port_flag="--port")
    child = cluster.processes["child"] = await start(command)
    await child.listening()
    async with cluster.kept(), asyncio.timeout(30):
        os.kill(child.pid, signal.SIGKILL)
        while "child is back" not in told:
            await cluster.check_alive()
            await asyncio.sleep(0.01)
    again = cluster.processes["child"]
    assert again.pid != child.pid
    assert again.address == child.address
    await cluster.stop()
    assert not again.alive


@pytest.mark.parametrize(
    ("code", "starts", "words"),
    [(1, 3, "(?s)child ended with exit code 1.*no luck"), (78, 1, "^child: no luck$")],  # 78: its own words say it
)
async def test_a_child_that_dies_again_and_again_is_given_up_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, starts: int, words: str
) -> None:
    monkeypatch.setattr(local, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(local, "MAX_QUICK_DEATHS", 3)
    cluster, command, told = made(tmp_path, "sh", "-c", f"echo no luck >&2; exit {code}")
    cluster.processes["child"] = await start(command)
    with pytest.raises(GhostError, match=words):
        await asyncio.wait_for(cluster.keep(), 30)
    assert sum("restarting it" in each for each in told) == starts - 1
    assert (tmp_path / "child.log").read_text().count("no luck") == starts
    await cluster.stop()
