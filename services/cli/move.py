"""`ghostserve drain`, `replace` and `resume`: a rank moves to a spare while requests go on, on the operator's word."""

import argparse
import json
import time
from collections.abc import Collection
from typing import Any

from rich.console import Console

from services.cli.status import add_gateway_arguments, call
from shared.errors import GhostError

_POLL_S = 0.2
_GIVEN_UP_S = 2.0
"""Of a group that serves, and moves nothing: it has told by then that a rank has moved, or none has."""


def add_arguments(parser: argparse.ArgumentParser, summary: str) -> None:
    """The flags of all three."""
    parser.description = summary
    parser.add_argument("target", metavar="TARGET", help="rank:N, or worker:NAME")
    parser.add_argument("--deadline", type=float, default=120.0, metavar="S", help="how long to wait for it [120]")
    parser.add_argument("--no-wait", action="store_true", help="return when it is under way")
    add_gateway_arguments(parser)


def move(arguments: argparse.Namespace) -> int:
    """Ask for it, and wait until it is done. Raises GhostError where it is refused, or not done in time."""
    console = Console()
    asked = {"action": arguments.action, "target": arguments.target}
    before = {record["started"] for record in _moves(_status(arguments.url))}
    told = json.loads(call(arguments.url, "/v1/fault_tolerance/apply", json.dumps(asked).encode()))
    console.print(told["message"], highlight=False)
    if arguments.no_wait or "moves" not in told["message"]:
        return 0
    end = time.monotonic() + arguments.deadline
    with console.status("copying") as shown:
        while (status := _status(arguments.url))["handover"] is not None:
            on_its_way = status["handover"]
            shown.update(f"{on_its_way['phase']}: {on_its_way['pages_left']} pages left {on_its_way['trouble']}")
            if time.monotonic() > end:
                raise GhostError(f"not done after {arguments.deadline:.0f} s: {on_its_way['phase']}")
            time.sleep(_POLL_S)
    record = _record(arguments.url, before, end)
    stall = record["ended"] - record["started"]
    console.print(f"done: {record['reason']}; requests waited {1000 * stall:.0f} ms", highlight=False)
    return 0


def _record(url: str, before: Collection[float], end: float) -> dict[str, Any]:
    """The move's record, which closes when requests go on. Raises GhostError if there is none, at `end` at last."""
    serves_since = None
    while True:
        status, now = _status(url), time.monotonic()
        if found := [record for record in _moves(status) if record["started"] not in before]:
            return found[-1]
        serves_since = (serves_since or now) if status["state"] == "serving" else None
        if now > end or (serves_since is not None and now - serves_since > _GIVEN_UP_S):
            raise GhostError("the rank did not move; the coordinator's log says why")
        time.sleep(_POLL_S)


def _status(url: str) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(call(url, "/v1/fault_tolerance/status"))
    return shown


def _moves(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for record in status["recoveries"] if record["planned"]]
