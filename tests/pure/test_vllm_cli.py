"""What `ghostserve vllm serve` makes of its flags, and what it says without vLLM."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.main import main, parse
from services.cli.vllm import PREFIX, VllmSettings, asked, engine_command
from shared.config import load_settings
from shared.errors import ConfigError


def test_flags_that_are_not_ours_go_to_vllm_in_their_order() -> None:
    given = ["DIR", "--tensor-parallel-size", "3", "--port", "9000", "--dtype=float32", "-O", "2", "--host", "::1"]
    parsed = parse(["vllm", "serve", *given[:3], "--ghost-spares", "2", "--ghost-allow-faults", *given[3:]])
    assert parsed.rest == given
    settings = load_settings(VllmSettings, parsed)
    assert (settings.spares, settings.allow_faults, settings.port) == (2, True, 8001)


def test_flags_that_begin_as_ours_do_not_are_not_ours() -> None:
    assert parse(["vllm", "serve", "M", "--p", "1"]).rest == ["M", "--p", "1"]


def test_other_commands_still_refuse_what_they_do_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "--nonsense"])
    assert "--nonsense" in capsys.readouterr().err


def test_a_wrong_value_is_named_with_the_flag_as_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(VllmSettings, parse(["vllm", "serve", "M", "--ghost-parity", "99"]), prefix=PREFIX)
    assert "--ghost-parity / GHOST_PARITY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "ranks", "url"),
    [
        (["M"], 1, "http://127.0.0.1:8000"),
        (["M", "-tp", "4", "--port=81"], 4, "http://127.0.0.1:81"),
        (["M", "--tensor_parallel_size=2", "--host", "0.0.0.0"], 2, "http://127.0.0.1:8000"),
        (["M", "--config", "f.yaml", "-tp=3", "--ssl-certfile", "c", "--host", "h"], 3, "https://h:8000"),
    ],
)
def test_ranks_and_address_are_known_before_vllm_is(arguments: list[str], ranks: int, url: str) -> None:
    found = asked(arguments)
    assert (found.model, found.ranks, found.url) == ("M", ranks, url)


def test_a_file_of_flags_must_not_hide_how_many_ranks_there_are() -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel-size"):
        asked(["M", "--config", "f.yaml"])


def test_vllm_gets_its_flags_and_where_the_coordinator_is() -> None:
    settings = VllmSettings(spares=2, patience_s=7)
    command = engine_command(settings, ["M", "-tp", "3"], "ws://127.0.0.1:1", Path("log"))
    assert command.arguments[-3:] == ("M", "-tp", "3")
    assert command.environment["GHOST_COORDINATOR_URL"] == "ws://127.0.0.1:1"
    assert command.environment["GHOST_SPARES"] == "2"
    assert float(command.environment["GHOST_PATIENCE_S"]) == 7


def test_without_vllm_it_says_in_one_line_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["vllm", "serve", "M"]) != 0
    told = capsys.readouterr().err.strip()
    assert "make vllm-setup" in told
    assert "\n" not in told


def test_the_command_line_does_not_import_vllm() -> None:
    code = "import sys, services.cli.main as m; m.parse(['vllm', 'serve', 'M']); sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
