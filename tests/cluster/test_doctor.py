"""`ghostserve doctor` says what it found, and its exit code whether GhostServe can serve."""

import json
from pathlib import Path

import pytest

from services.cli.main import main
from shared.transport import ucx_engine


def test_on_a_machine_that_is_set_up_nothing_has_failed(capsys: pytest.CaptureFixture[str], redis_url: str) -> None:
    assert main(["doctor", "--json", "--redis-url", redis_url]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"processors", "huge pages", "erasure code, CPU", "bulk transport", "UCX", "Redis", "model"} <= set(findings)
    assert findings["Redis"]["found"].startswith("it answers")
    assert findings["bulk transport"]["picked"].startswith(("tcp: ", "ucx: "))
    if ucx_engine.is_installed():
        assert "tcp/lo" in findings["UCX"]["found"]


def test_what_can_not_work_is_named_and_the_rest_is_still_looked_at(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["doctor", "--redis-url", "redis://127.0.0.1:1", "--model", str(tmp_path)]
    assert main([*arguments, "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in findings if finding["state"] == "failed"] == ["Redis", "model"]
    assert main(arguments) == 1
    assert "ISA-L" in capsys.readouterr().out
