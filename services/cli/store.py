"""`ghostserve store`: a parity store's admin endpoint on the command line."""

import argparse
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shared.errors import GhostError, PeerLost
from shared.tls import client_context

_DEADLINE_S = 10.0
_POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their flags."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--url", required=True, help="the store's admin URL, as it printed it")
    common.add_argument("--json", action="store_true", help="print the answer as JSON")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    actions.add_parser("status", parents=[common], help="capacity, use, stripes, epochs, scrub")
    stripes = actions.add_parser("stripes", parents=[common], help="the stripes that it holds")
    stripes.add_argument("--limit", type=int, default=100, help="how many [100]")
    stripes.add_argument("--key", default="", help="only this page key")
    actions.add_parser("scrub", parents=[common], help="check all checksums; exit code 1 if one was wrong")
    actions.add_parser("drain", parents=[common], help="have it emptied; it leaves when all is elsewhere")
    parser.epilog = (
        "The cluster's token is read from GHOST_TOKEN, the authorities of an https URL from GHOST_TLS_CA_FILE."
    )


def store(arguments: argparse.Namespace) -> int:
    """Do the action. Returns the exit code. Raises GhostError, with the store's own words, when it refuses."""
    match arguments.action:
        case "status":
            answer = _call(arguments.url, "GET", "/admin/status")
        case "stripes" if arguments.key:
            answer = _call(arguments.url, "GET", f"/admin/stripes/{urllib.parse.quote(arguments.key, safe='')}")
            answer = {"stripes": [answer], "next_cursor": None}
        case "stripes":
            answer = _call(arguments.url, "GET", f"/admin/stripes?limit={arguments.limit}")
        case "scrub":
            answer = _scrub(arguments.url)
        case "drain":
            answer = _call(arguments.url, "POST", "/admin/drain")
        case _:
            raise GhostError(f"unknown action {arguments.action}")
    if arguments.json:
        print(json.dumps(answer, indent=2))
    elif arguments.action == "stripes":
        _print_stripes(answer)
    else:
        _print_fields(answer)
    return int(arguments.action == "scrub" and answer["damaged"] > 0)


def _scrub(url: str) -> dict[str, Any]:
    """Scrub, with a progress display; return how it ended."""
    scrub = _call(url, "POST", "/admin/scrub")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scrub", total=scrub["total"] or None)
        while scrub["running"]:
            time.sleep(_POLL_S)
            scrub = _call(url, "GET", "/admin/status")["scrub"]
            progress.update(task, completed=scrub["checked"])
    return scrub


def _print_stripes(answer: dict[str, Any]) -> None:
    table = Table("page key", "group", "shard", "k+m", "epoch", "bytes", "age")
    for stripe in answer["stripes"]:
        for shard in stripe["shards"]:
            shape = f"{shard['k']}+{shard['m']}"
            cells = (stripe["page_key"], shard["group"], shard["number"], shape, shard["epoch"], shard["bytes"])
            table.add_row(*(str(cell) for cell in cells), f"{shard['age_s']:.0f} s")
    Console().print(table)
    if answer["next_cursor"]:
        Console().print("there are more: --limit", style="dim")


def _print_fields(answer: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in answer.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    Console().print(table)


def _call(url: str, method: str, path: str) -> dict[str, Any]:
    """Return the JSON answer. Raises GhostError if the store refuses, PeerLost if it is not there."""
    request = urllib.request.Request(url.rstrip("/") + path, method=method)
    if token := os.environ.get("GHOST_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    tls = client_context(os.environ.get("GHOST_TLS_CA_FILE", ""))
    try:
        with urllib.request.urlopen(request, timeout=_DEADLINE_S, context=tls) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        with error:
            raise GhostError(f"the store refused: {error.code} {_message(error.read())}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise PeerLost(f"no parity store at {url}: {error}") from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
