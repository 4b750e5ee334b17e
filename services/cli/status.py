"""`ghostserve status` and `ghostserve top`: the cluster as its gateway tells it, in the terminal."""

import argparse
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shared.errors import GhostError, PeerLost
from shared.tls import client_context
from shared.types import EMBEDDED

_DEADLINE_S = 10.0
_PHASES = ("detect_s", "regroup_s", "weights_s", "restore_s", "recompute_s")
_RECOVERIES_SHOWN = 5

Json = dict[str, Any]
Figures = dict[str, float]


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `status`."""
    _add_common(parser)
    parser.add_argument("--json", action="store_true", help="print the status as JSON")
    parser.add_argument("--watch", action="store_true", help="show it anew until Ctrl-C")


def add_top_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `top`."""
    _add_common(parser)
    parser.add_argument("--count", type=int, default=0, metavar="N", help="end after N views; 0: at Ctrl-C [0]")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two views [1]")
    add_gateway_arguments(parser)


def add_gateway_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag of all that ask a gateway."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway's URL [http://127.0.0.1:8000]")
    parser.epilog = "The operators' token, where one is asked for, is read from GHOST_OPERATOR_TOKEN."


def status(arguments: argparse.Namespace) -> int:
    """Print the cluster's status. Returns 0 if it serves, else 1. Raises PeerLost if there is no gateway."""
    console = Console()
    if arguments.watch:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            for shown in _views(arguments):
                live.update(status_view(shown) if not arguments.json else Text(json.dumps(shown)), refresh=True)
    shown = _get_status(arguments.url)
    if arguments.json:
        print(json.dumps(shown, indent=2))
    else:
        console.print(status_view(shown))
    return 0 if shown["state"] == "serving" else 1


def _views(arguments: argparse.Namespace) -> Iterator[Json]:
    while True:
        yield _get_status(arguments.url)
        time.sleep(arguments.interval)


def top(arguments: argparse.Namespace) -> int:
    """Show rates, latencies and load, anew each interval. Raises PeerLost if there is no gateway."""
    console = Console()
    before, shown, left = _figures(arguments.url, _get_status(arguments.url)), 0, arguments.count
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while not left or shown < left:
            time.sleep(arguments.interval)
            status = _get_status(arguments.url)
            now = _figures(arguments.url, status)
            live.update(top_view(status, before, now), refresh=True)
            before, shown = now, shown + 1
    return 0


# -- views -----------------------------------------------------------------------------------------------------------


def status_view(status: Json) -> RenderableType:
    """State, protection, who is there, and the last recoveries."""
    serving = status["state"] == "serving"
    head = Text.assemble(
        (f"{status['served_name']}  ", "bold"),
        (status["state"], "bold green" if serving else "bold yellow"),
        f"  epoch {status['epoch']}  {status['detail']}",
        "" if status["engine"] == EMBEDDED else f"  (requests: {status['engine']})",
    )
    protection = Text.assemble(
        "can lose ",
        (f"{status['can_lose']} rank(s)", "green" if status["can_lose"] else "red"),
        f" now; pages {status['stripes_protected']} protected, {status['stripes_pending']} on their way, "
        f"{status['stripes_unprotected']} unprotected; lag {status['protection_lag_s']:.2f} s",
    )
    if status["reduced_protection"]:
        protection.append(f"\n{status['reduced_protection']}", "yellow")
    if status["unprotected_reason"]:
        protection.append(f"\n{status['unprotected_reason']}", "yellow")
    load = f"{status['running']} running, {status['waiting']} waiting; KV pool {_share(status):.0%} in use"
    parts: list[RenderableType] = [head, protection, load, _members(status)]
    return Group(*parts, _recoveries(status)) if status["recoveries"] else Group(*parts)


def _members(status: Json) -> Table:
    table = Table("what", "state", "name", "device", "where")
    by_rank = {worker["rank"]: worker for worker in status["workers"] if worker["rank"] is not None}
    for rank in range(status["size"]):
        worker = by_rank.get(rank)
        if worker is None:
            table.add_row(f"rank {rank}", "[red]vacant[/red]", "", "", "")
        else:
            state = "[yellow]straggler[/yellow]" if worker["straggler"] else worker["state"]
            table.add_row(f"rank {rank}", state, worker["name"], worker["device"], _place(worker))
    for worker in status["workers"]:
        if worker["rank"] is None:
            table.add_row("spare", worker["state"], worker["name"], worker["device"], _place(worker))
    for store in status["stores"]:
        table.add_row("parity store", "connected", store["store_id"], "", store["bulk_address"])
    return table


def _place(worker: Json) -> str:
    return f"{worker['host']} pid {worker['pid']}"


def _recoveries(status: Json) -> Table:
    table = Table("recovery", *(phase.removesuffix("_s") for phase in _PHASES), "restored", "recomputed", "ago")
    table.caption, table.caption_justify = escape(status["recoveries"][-1]["reason"]), "left"
    for record in status["recoveries"][-_RECOVERIES_SHOWN:]:
        lost = ", ".join(map(str, record["lost_ranks"]))
        table.add_row(
            f"rank {lost} lost" if lost else "rank moved" if record["planned"] else "epoch broken",
            *(f"{record[phase]:.3f}" for phase in _PHASES),
            f"{record['restored_pages']} pages",
            f"{record['recomputed_tokens']} tokens",
            f"{status['now'] - record['ended']:.0f} s",
        )
    return table


def top_view(status: Json, before: Figures, now: Figures) -> RenderableType:
    """What happened between two readings of the gateway's metrics, and the load now."""
    seconds = max(1e-9, now["time"] - before["time"])

    def rate(name: str) -> float:
        return (now.get(name, 0.0) - before.get(name, 0.0)) / seconds

    def mean_ms(name: str) -> str:
        count = now.get(f"{name}_count", 0.0) - before.get(f"{name}_count", 0.0)
        total = now.get(f"{name}_sum", 0.0) - before.get(f"{name}_sum", 0.0)
        return f"{1000 * total / count:.0f} ms" if count else "-"

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("generated", f"{rate('generation_tokens_total'):.1f} tokens/s")
    table.add_row("prompts", f"{rate('prompt_tokens_total'):.1f} tokens/s")
    table.add_row("requests", f"{rate('e2e_request_latency_seconds_count'):.2f}/s ended")
    table.add_row("time to first token", mean_ms("time_to_first_token_seconds"))
    table.add_row("between tokens", mean_ms("inter_token_latency_seconds"))
    table.add_row("running, waiting", f"{status['running']}, {status['waiting']}")
    table.add_row("KV pool", ProgressBar(total=1.0, completed=_share(status), width=30))
    return Group(table, "", status_view(status))


def _share(status: Json) -> float:
    return float(status["pages_held"] / max(1, status["pages_total"]))


# -- the gateway -----------------------------------------------------------------------------------------------------


def _get_status(url: str) -> Json:
    answer: Json = json.loads(call(url, "/v1/fault_tolerance/status"))
    return answer


def _figures(url: str, status: Json) -> Figures:
    """The gateway's metrics without their labels, summed, and the `time` of reading.

    The tokens of a hosted engine pass no gateway: they are counted in the status.
    """
    figures: Figures = {"time": time.monotonic()}
    for family in text_string_to_metric_families(call(url, "/metrics").decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("ghostserve:")
            figures[name] = figures.get(name, 0.0) + sample.value
    if status["engine"] != EMBEDDED:
        figures["generation_tokens_total"] = status["generated_tokens"]
        figures["prompt_tokens_total"] = status["prompt_tokens"]
    return figures


def call(url: str, path: str, body: bytes | None = None) -> bytes:
    """The answer's body; with a `body`, to a POST of this JSON.

    Raises GhostError if the gateway refuses, PeerLost if it is not there.
    """
    request = urllib.request.Request(url.rstrip("/") + path, data=body)
    if body is not None:
        request.add_header("Content-Type", "application/json")
    if token := os.environ.get("GHOST_OPERATOR_TOKEN", "").strip():
        request.add_header("Authorization", f"Bearer {token}")
    tls = client_context(os.environ.get("GHOST_TLS_CA_FILE", ""))
    try:
        with urllib.request.urlopen(request, timeout=_DEADLINE_S, context=tls) as response:
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        with error:
            raise GhostError(f"the gateway refused: {error.code} {_message(error)}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise PeerLost(f"no gateway at {url}: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
