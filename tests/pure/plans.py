"""A RestorePlan's columns as the stripes that it was made of, for tests."""

from dataclasses import dataclass

import numpy as np

from shared.messages import RestorePlan
from shared.types import PageKey, unpack_ids


@dataclass(frozen=True, slots=True)
class Planned:
    """One stripe: which page, who lacks it, and its shards in stores."""

    page: int
    key: PageKey
    lost: tuple[int, ...]
    shards: tuple[int, ...]


def stripes_of(plan: RestorePlan) -> list[Planned]:
    """In the plan's order."""
    kinds = [plan.kinds[number] for number in np.frombuffer(plan.of_kind, "<u2").tolist()]
    pages = unpack_ids(plan.pages)
    return [Planned(*each, kind.lost, kind.shards) for *each, kind in zip(pages, plan.keys, kinds, strict=True)]
