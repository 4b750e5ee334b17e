"""Log lines: one an event, with epoch and request, for people and for machines."""

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from shared import logs
from shared.config import CommonSettings, add_flags, load_settings


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave logging as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(logs._Formatter, "epoch", 0)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("services.coordinator").setLevel(logging.NOTSET)


def logged(monkeypatch: pytest.MonkeyPatch, levels: str, *, as_json: bool) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("gateway", levels, as_json=as_json)
    return stream


def test_a_text_line_carries_epoch_request_and_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = logged(monkeypatch, "info", as_json=False)
    logs.epoch_is(7)
    token = logs.request_id.set("cmpl-1")
    logging.getLogger("services.gateway.app").info("two\nlines of %s", "text", extra={"rank": 1, "why": "a b"})
    logs.request_id.reset(token)
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(
        'INFO gateway services.gateway.app: two\\nlines of text epoch=7 request=cmpl-1 rank=1 why="a b"'
    )


def test_a_json_line_is_one_object_even_with_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = logged(monkeypatch, "info", as_json=True)
    logs.epoch_is(3)
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        logging.getLogger("services.x").exception("it %s", "failed", extra={"request": "r-9"})
    (line,) = stream.getvalue().splitlines()
    body = json.loads(line)
    assert {key: body[key] for key in ("level", "service", "module", "message", "epoch", "request")} == {
        "level": "error",
        "service": "gateway",
        "module": "services.x",
        "message": "it failed",
        "epoch": 3,
        "request": "r-9",
    }
    assert "ValueError: broken" in body["exception"]


def test_levels_differ_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = logged(monkeypatch, "warning,services.coordinator=debug", as_json=False)
    logging.getLogger("services.coordinator.group").debug("seen")
    logging.getLogger("services.gateway").info("not seen")
    assert [line.rsplit(": ", 1)[1] for line in stream.getvalue().splitlines()] == ["seen"]


@pytest.mark.parametrize("spec", ["loud", "info,=debug", "info,services", "info,a b=debug", "services.gateway=debug"])
def test_a_level_that_is_none_is_named(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings("--log-level", spec)
    assert "--log-level / GHOST_LOG_LEVEL" in capsys.readouterr().err


def settings(*flags: str) -> CommonSettings:
    parser = argparse.ArgumentParser()
    add_flags(parser, CommonSettings)
    return load_settings(CommonSettings, parser.parse_args(flags))


def test_json_is_a_flag_that_needs_no_value() -> None:
    assert settings("--log-json").log_json
    assert not settings("--log-json", "false").log_json
    assert not settings().log_json
