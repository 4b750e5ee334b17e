"""How runs come back where it is known of all stripes, or is found part by part, where their parity is; for tests."""

from collections.abc import Collection, Mapping
from typing import Any

from services.coordinator.protection.costs import Choice, StoredStripe, Ways
from services.coordinator.protection.host import Run
from services.coordinator.protection.ledger import Ledger
from services.coordinator.protection.rates import Rates
from shared.types import PageKey


def choose(
    ledger: Ledger,
    runs: Collection[Run],
    stripes: Mapping[PageKey, StoredStripe],
    rates: Rates,
    *,
    at_a_time: int = 1_000_000,
    now: float = 0.0,
    **given: Any,
) -> list[Choice]:
    """All choices, in order; so many keys are looked up `at_a_time`."""
    ways = Ways(ledger, runs, rates, **given)
    keys, numbers, choices = ways.keys(), {run.number for run in runs}, list[Choice]()
    for start in range(0, max(1, len(keys)), at_a_time):
        part = keys[start : start + at_a_time]
        found = {key: stripes[key] for key in part if key in stripes}
        choices += ways.found(part, found, runs=numbers, now=now)
    return choices
