"""Which keys the rows of a step attend to, and in what portions: a layer gathers no more at once than one round. Pure.

Everything is cut where a position says so, and never where a step begins or ends: so the same sums are taken in the
same order however the tokens were put into steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.worker.engine.batch import Chunk, Int32

TILE = 64
"""Rows of a prompt that are computed together; a tile begins at a multiple of it."""
BLOCK = 4096
"""Keys of one product of a tile: positions between two multiples of it. Scores of so many stay in the cache."""
GATHERED = 8192
"""Keys of a round, and of one product of a single query: positions between two multiples of it. Whole blocks."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some of a prompt's rows: [row, row + rows) of the step are its rows [lead, lead + rows)."""

    row: int
    rows: int
    lead: int


@dataclass(frozen=True, slots=True)
class TileLook:
    """A tile and some of its keys, which are [first, first + count) of what a round gathers.

    Its row i must not see key j of them where j - i <= `hidden`, and of its last look's last TILE keys those after i.
    """

    tile: Tile
    first: int
    count: int
    hidden: int
    begins: bool
    ends: bool


@dataclass(frozen=True, slots=True)
class QueryLook:
    """A generated position, row `row` of the step, and some of its keys: [first, first + count) of a round's."""

    row: int
    first: int
    count: int
    begins: bool
    ends: bool


@dataclass(slots=True)
class Round:
    """What is gathered at once: the keys of `pages` one after the other, but for zeros at [first, last) of `blank`."""

    pages: list[Int32] = field(default_factory=list)
    keys: int = 0
    blank: list[tuple[int, int]] = field(default_factory=list)
    tiles: list[TileLook] = field(default_factory=list)
    queries: list[QueryLook] = field(default_factory=list)


def most_gathered(page_tokens: int) -> int:
    """Keys of the largest round: those of a portion, on whole pages."""
    return GATHERED + 2 * page_tokens


def plan_rounds(chunks: Sequence[Chunk], window: int | None, page_tokens: int) -> tuple[Round, ...]:
    """The rounds of a layer whose rows see `window` keys up to their own; None: all."""
    rounds = [Round()]
    row = 0
    for chunk in chunks:
        rows = _Rows.of(chunk, row, window)
        for start, end in cuts(rows.first, rows.last, GATHERED):
            page, written = start // page_tokens, min(end, chunk.end)
            keys = (-(-end // page_tokens) - page) * page_tokens
            if rounds[-1].keys + keys > most_gathered(page_tokens):
                rounds.append(Round())
            into = rounds[-1]
            table = chunk.pages[page : -(-written // page_tokens)]
            zero = into.keys - page * page_tokens  # where the key of position 0 would be
            into.pages.append(np.pad(table, (0, keys // page_tokens - len(table))))
            into.keys += keys
            if written < end:
                into.blank.append((zero + written, zero + end))
            into.tiles += rows.tile_looks(start, end, zero)
            into.queries += rows.query_looks(start, end, zero)
        row += len(chunk.tokens)
    return tuple(rounds)


def cuts(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, end), cut at the multiples of `size`."""
    if start < end:
        for at in range(start // size * size, end, size):
            yield max(at, start), min(at + size, end)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A chunk's rows, with the positions [first, last) that each of them sees: tiles, and queries by their row."""

    tiles: tuple[tuple[Tile, int, int], ...]
    queries: tuple[tuple[int, int, int], ...]
    window: int | None

    @classmethod
    def of(cls, chunk: Chunk, row: int, window: int | None) -> "_Rows":
        split = min(max(chunk.prompt_tokens, chunk.start), chunk.end)  # positions from here on were generated
        tiles = []
        for at in range(chunk.start // TILE * TILE, split, TILE) if split > chunk.start else ():
            first, last = max(at, chunk.start), min(at + TILE, split)
            sees = 0 if window is None else max(0, (at - window + 1) // TILE * TILE)
            tiles.append((Tile(row + first - chunk.start, last - first, first - at), sees, at + TILE))
        queries = (
            (row + at - chunk.start, 0 if window is None else max(0, at + 1 - window), at + 1)
            for at in range(split, chunk.end)
        )
        return cls(tuple(tiles), tuple(queries), window)

    @property
    def first(self) -> int:
        return min(first for _, first, _ in self._all())

    @property
    def last(self) -> int:
        return max(last for _, _, last in self._all())

    def _all(self) -> Iterable[tuple[object, int, int]]:
        return (*self.tiles, *self.queries)

    def tile_looks(self, start: int, end: int, zero: int) -> Iterator[TileLook]:
        for tile, first, last in self.tiles:
            for a, b in cuts(max(first, start), min(last, end), BLOCK):
                hidden = -TILE if self.window is None else last - TILE - self.window - a
                yield TileLook(tile, zero + a, b - a, hidden, a == first, b == last)

    def query_looks(self, start: int, end: int, zero: int) -> Iterator[QueryLook]:
        for row, first, last in self.queries:
            a, b = max(first, start), min(last, end)
            if a < b:
                yield QueryLook(row, zero + a, b - a, a == first, b == last)
