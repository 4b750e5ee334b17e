"""What the compose files and their example of an .env say exists: commands parse, variables are settings."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from services.cli.main import parse
from tests.pure.test_readme import CLASSES, ROOT

FILES = sorted((ROOT / "docker").rglob("*.yml"))
EXAMPLE = ROOT / "docker" / "hosts" / "env.example"
SETTINGS = {f"GHOST_{name.upper()}" for settings in CLASSES.values() for name in settings.model_fields}
INTERPOLATED = {name for path in FILES for name in re.findall(r"\$\{(GHOST_\w+)", path.read_text())}


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every service of every file, with its place."""
    for path in FILES:
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            yield f"{path.name}:{name}", service


SERVICES = dict(services())


@pytest.mark.parametrize("place", SERVICES)
def test_a_service_is_a_command_with_variables_that_it_reads(place: str) -> None:
    service = SERVICES[place]
    if "command" in service:
        assert parse(service["command"]).run is not None
    assert {name for name in service.get("environment", {}) if name.startswith("GHOST_")} <= SETTINGS


def test_the_example_names_settings_and_what_the_compose_files_ask_for() -> None:
    named = set(re.findall(r"^#?(GHOST_\w+)=", EXAMPLE.read_text(), re.MULTILINE))
    assert named - SETTINGS - INTERPOLATED == set()
    assert INTERPOLATED - SETTINGS - named <= {
        "GHOST_NETWORK",
        "GHOST_PUBLISH",
        "GHOST_PUBLISH_STATUS",
        "GHOST_BASE",
        "GHOST_FLAVOUR",
        "GHOST_FABRIC",
    }
