"""Worker processes that end by themselves while they are being ended."""

import subprocess
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_process_that_has_just_ended_can_be_killed_once_more() -> None:
    from services.vllm.crew import Member

    ended = subprocess.Popen(["true"])
    ended.wait()
    process = SimpleNamespace(pid=ended.pid, is_alive=lambda: True)  # as it says until its end has been told
    Member("Worker_0", process, None).kill()  # type: ignore[arg-type]
