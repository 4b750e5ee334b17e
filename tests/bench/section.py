"""One section of the bench by itself, on the command line."""

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

RowT = TypeVar("RowT")


def run(
    description: str | None,
    quick: str,
    measure: Callable[[bool, Console], Coroutine[Any, Any, Sequence[RowT]]],
    tables: Callable[[Sequence[RowT]], Sequence[Table]],
) -> None:
    """Measure and print the tables. `quick`: what the flag of that name leaves out; `--json FILE` keeps the rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", default="", metavar="FILE")
    arguments = parser.parse_args()
    console = Console(width=140)
    rows = asyncio.run(measure(arguments.quick, console))
    for table in tables(rows) if rows else ():
        console.print(table)
    if arguments.json:
        keep(arguments.json, rows)


def keep(path: str | Path, rows: Sequence[Any]) -> None:
    """Write rows, which are dataclasses, as JSON."""
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def markdown(table: Table) -> str:
    """A table as Markdown."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    heads = [str(column.header) for column in table.columns]
    lines = [heads, ["---"] * len(heads), *map(list, zip(*columns, strict=True))]
    return f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
