"""`ghostserve replay`: a coordinator's recording, lived again and told."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import GhostError

if TYPE_CHECKING:
    from rich.console import Console

    from services.coordinator.recording.replay import Until


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `replay`."""
    parser.add_argument("file", type=Path, nargs="+", help="files of a recording, or a folder: all lives in it")
    parser.add_argument(
        "--until", metavar="N|SECONDSs", help="end after event N, or so many seconds after the beginning: 1200, 12.5s"
    )
    parser.add_argument("--events", action="store_true", help="print each event, and what came out")


def run(arguments: argparse.Namespace) -> int:
    """Replay, print the narrator, and return 0 if all went as it was recorded. Raises ProtocolError."""
    from rich.console import Console

    from services.coordinator.recording.replay import lives

    console = Console(soft_wrap=True, highlight=False)
    failed = [life for life in lives(arguments.file) if not _replay(life, arguments, console)]
    return 1 if failed else 0


def _replay(life: list[Path], arguments: argparse.Namespace, console: "Console") -> bool:
    """Whether a life went as it was recorded."""
    from services.cli.status import status_view
    from services.coordinator.recording.narrator import Narrator
    from services.coordinator.recording.replay import header, other_code, replay

    first = header(life[0])
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(first.wall))
    begins = f"from its event {first.first} on" if first.first else "from its start"
    console.print(f"the coordinator of {at}Z ({first.life}), {begins}", style="bold")
    if other_code(first):
        console.print("recorded by other code of this version: what differs may be the code", style="yellow")
    narrator = Narrator(
        lambda text, style: console.print(text, style=style, markup=False), first.now, events=arguments.events
    )
    began = time.perf_counter()
    with narrator:
        replayed = replay(life, narrator, _until(arguments.until, first.now))
    took_s = time.perf_counter() - began
    console.print()
    console.print(status_view(asdict(replayed.status)))
    console.print(f"\n{replayed.events} events of {replayed.seconds:.1f} s replayed in {took_s:.1f} s", style="dim")
    if replayed.failure:
        console.print(replayed.failure, style="bold red", markup=False)
    else:
        console.print("all as it was recorded", style="green")
    return not replayed.failure


def _until(given: str | None, began: float) -> "Until":
    from services.coordinator.recording.replay import Until

    try:
        if given is None:
            return Until()
        return Until(now=began + float(given[:-1])) if given.endswith("s") else Until(event=int(given))
    except ValueError:
        raise GhostError(f"--until {given}: an event's number, or seconds as 12.5s") from None
