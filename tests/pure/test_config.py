"""Settings: flags over the environment over files."""

import argparse
from pathlib import Path

import pytest

from shared.config import GatewaySettings, add_flags, load_settings
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
