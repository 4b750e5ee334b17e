"""The dashboard and the alert rules as data: every expression in them, parsed by Prometheus' own grammar."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import yaml

FOLDER = Path(__file__).parents[2] / "docs" / "monitoring"
DOCUMENT = FOLDER.parent / "alerts.md"


def rules() -> list[dict[str, Any]]:
    """All alert rules."""
    groups: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """Every PromQL expression of rules and panels."""
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    return [rule["expr"] for rule in rules()] + [target["expr"] for panel in panels for target in panel["targets"]]


def metrics_named() -> set[str]:
    """The metrics that the expressions select. Raises ValueError for an expression that does not parse."""
    names: set[str] = set()
    for expression in expressions():
        promql_parser.parse(expression)
        names |= set(re.findall(r"ghostserve:[a-z0-9_]+", expression))
    return names
