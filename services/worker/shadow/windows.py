"""A RestorePlan as a rank goes through it: windows, each one round of exchange, and in them stripes of one kind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.worker.memory import Ids, Sums
from shared.messages import RestorePlan, StripeKind
from shared.types import PageKey


@dataclass(frozen=True, slots=True, eq=False)
class Alike:
    """The stripes of one kind in a window. `at`: their places in it. Sums: uint64, one row a stripe."""

    number: int
    """Of the kind, in the plan."""
    kind: StripeKind
    at: Ids
    pages: Ids
    keys: list[PageKey]
    shard_sums: Sums
    slice_sums: Sums


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Stripes [start, start + len(pages)) of a plan."""

    start: int
    pages: Ids
    keys: Sequence[PageKey]
    groups: list[Alike]

    def receivers(self, size: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Who lacks which: [stripes, ranks]."""
        to = np.zeros((len(self.pages), size), dtype=np.bool_)
        for group in self.groups:
            for rank in group.kind.lost:
                to[group.at, rank] = True
        return to


def page_ids(packed: bytes) -> Ids:
    """Ids as messages carry them, for indexing."""
    return np.frombuffer(packed, "<i4").astype(np.int64)


def windows(plan: RestorePlan, length: int) -> Iterator[Window]:
    """A plan, `length` stripes at a time."""
    pages, of_kind = page_ids(plan.pages), np.frombuffer(plan.of_kind, "<u2")
    sums = np.frombuffer(plan.sums, "<u8").astype(np.uint64)
    counts = np.array([kind.sums for kind in plan.kinds], dtype=np.int64)[of_kind]
    first = np.cumsum(counts) - counts
    for start in range(0, len(pages), length):
        part = slice(start, start + length)
        keys, groups = plan.keys[part], []
        for number in np.unique(of_kind[part]).tolist():
            kind, at = plan.kinds[number], np.flatnonzero(of_kind[part] == number)
            told = sums[first[part][at, None] + np.arange(kind.sums)]
            shards = len(kind.shards)
            groups.append(
                Alike(
                    number,
                    kind,
                    at,
                    pages[part][at],
                    [keys[i] for i in at.tolist()],
                    told[:, :shards],
                    told[:, shards:],
                )
            )
        yield Window(start, pages[part], keys, groups)


def lost_pages(plan: RestorePlan, rank: int) -> list[tuple[int, int, PageKey]]:
    """What `rank` lacks of a plan: its place in it, page and key."""
    of_kind = np.frombuffer(plan.of_kind, "<u2")
    lacks = np.array([rank in kind.lost for kind in plan.kinds], dtype=np.bool_)
    at = np.flatnonzero(lacks[of_kind]) if len(of_kind) else of_kind
    pages = page_ids(plan.pages)[at].tolist()
    return [(place, page, plan.keys[place]) for place, page in zip(at.tolist(), pages, strict=True)]
