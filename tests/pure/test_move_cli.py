"""`ghostserve drain` and its kin: what they wait for, and what they say of it."""

import argparse
import json
from typing import Any

import pytest

from services.cli import move as move_cli
from shared.errors import GhostError

KEPT = 4
"""Records that the status has at most."""


class Gateway:
    """Answers as a gateway does: a move that was asked for is over after three looks, if it comes about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, moves: bool):
        self._moves = moves
        self._left = 0
        self._now = 100.0
        self._recoveries = [self._record(float(n), planned=True) for n in range(KEPT)]
        monkeypatch.setattr(move_cli, "call", self._call)
        monkeypatch.setattr(move_cli.time, "sleep", self._sleep)
        monkeypatch.setattr(move_cli.time, "monotonic", lambda: self._now)

    def _record(self, started: float, *, planned: bool) -> dict[str, Any]:
        return {"planned": planned, "started": started, "ended": started + 0.04, "reason": f"move at {started:g}"}

    def _sleep(self, seconds: float) -> None:
        self._now += seconds
        self._left -= 1
        if self._left == 0 and self._moves:
            self._recoveries = [*self._recoveries, self._record(self._now, planned=True)][-KEPT:]

    def _call(self, url: str, path: str, body: bytes | None = None) -> bytes:
        if body is not None:
            self._left = 3
            return json.dumps({"message": f"rank 1 moves, as {json.loads(body)['action']} says"}).encode()
        handover = {"phase": "copying", "pages_left": 7, "trouble": ""} if self._left > 0 else None
        return json.dumps({"state": "serving", "handover": handover, "recoveries": self._recoveries}).encode()


def _arguments(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"action": "drain", "target": "rank:1", "deadline": 60.0, "no_wait": False, "url": "http://gateway"} | changes
    )


def test_a_move_is_seen_though_no_more_records_are_kept_than_there_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Gateway(monkeypatch, moves=True)
    assert move_cli.move(_arguments()) == 0
    assert "requests waited 40 ms" in capsys.readouterr().out


def test_a_move_that_was_given_up_is_said_so_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(monkeypatch, moves=False)
    with pytest.raises(GhostError, match="did not move"):
        move_cli.move(_arguments())
    assert gateway._now < 104


def test_a_move_that_takes_too_long_is_said_so_with_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    Gateway(monkeypatch, moves=True)
    with pytest.raises(GhostError, match="not done after 0 s: copying"):
        move_cli.move(_arguments(deadline=0.1))
