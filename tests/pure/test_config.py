"""Settings: flags over the environment over files."""

import argparse
from pathlib import Path

import pytest

from shared.config import GatewaySettings, ParityStoreSettings, add_flags, load_settings
from shared.errors import ConfigError


def loaded(*flags: str) -> GatewaySettings:
    parser = argparse.ArgumentParser()
    add_flags(parser, GatewaySettings)
    return load_settings(GatewaySettings, parser.parse_args(flags))


def test_a_secret_comes_from_the_file_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.setenv("GHOST_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.delenv("GHOST_TOKEN", raising=False)
    assert loaded().secret == "s3cret"
    monkeypatch.setenv("GHOST_TOKEN", "nearer")
    assert loaded().secret == "nearer"
    assert loaded("--token", "nearest").secret == "nearest"


def test_a_file_that_is_not_there_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GHOST_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="GHOST_TOKEN_FILE: can't read"):
        loaded()


def test_a_service_link_of_kubernetes_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOST_PORT", "tcp://10.96.0.12:8000")
    assert loaded().port == 8000
    assert loaded("--port", "9000").port == 9000
    monkeypatch.setenv("GHOST_ADMIN_PORT", "tcp://10.96.0.12:8201")
    assert ParityStoreSettings().admin_port == 0


def test_a_port_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GHOST_PORT", "http://x")
    with pytest.raises(SystemExit):
        loaded()
    assert "--port / GHOST_PORT" in capsys.readouterr().err
