"""The configuration table is that of the settings, README's figures are those of bench/results, links lead on.

`python -m tests.pure.test_readme` writes the table and the figures anew.
"""

import re
from pathlib import Path

import pytest

from services.cli.local import ServeSettings
from services.cli.vllm import FLAGS, VllmSettings
from shared.config import CommonSettings, CoordinatorSettings, GatewaySettings, ParityStoreSettings, WorkerSettings
from tests.bench import readme, vllm_tables

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
CONFIGURATION = ROOT / "docs" / "configuration.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(?<=<!-- configuration -->\n).*?(?=<!-- /configuration -->)", re.DOTALL)
CLASSES = {
    "serve": ServeSettings,
    "coordinator": CoordinatorSettings,
    "worker": WorkerSettings,
    "parity-store": ParityStoreSettings,
    "gateway": GatewaySettings,
    "vllm serve": VllmSettings,
}


def table() -> str:
    """One row a setting: the variable (the flag is its lower case with dashes), where it counts, default, meaning."""
    rows: dict[str, tuple[list[str], list[str], str]] = {}
    for command, settings in CLASSES.items():
        for name, field in settings.model_fields.items():
            if settings is VllmSettings and name not in FLAGS:
                continue
            default = "" if field.default in (None, "") else f"`{field.default}`"
            commands, defaults, _ = rows.setdefault(name, ([], [], str(field.description)))
            commands.append(command)
            if default and default not in defaults:
                defaults.append(default)
    lines = ["| variable | for | default | meaning |", "| --- | --- | --- | --- |"]
    for name, (commands, defaults, meaning) in rows.items():
        where = "all" if name in CommonSettings.model_fields else ", ".join(commands)
        lines.append(
            f"| `GHOST_{name.upper()}` | {where} | {' / '.join(defaults)} | {meaning} |".replace("|  |", "| |")
        )
    return "\n".join(lines) + "\n"


def test_the_configuration_names_every_setting_with_its_default() -> None:
    found = TABLE.search(CONFIGURATION.read_text())
    assert found is not None
    assert found[0] == table()


def test_the_measured_figures_are_those_of_the_bench() -> None:
    found = readme.BLOCK.search(README.read_text())
    assert found is not None
    assert found[0] == readme.measured(readme.load(RESULTS))


def test_the_figures_of_vllm_are_those_of_its_bench() -> None:
    found = vllm_tables.README.search(README.read_text())
    assert found is not None
    figures = vllm_tables.load(RESULTS / "vllm_host.json")
    assert found[0] == vllm_tables.in_short(figures)
    assert vllm_tables.section(figures).strip() in (RESULTS / "results.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_links_to_is_there(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert links or document.name == "api.md"
    assert [link for link in links if not (document.parent / link).exists()] == []


if __name__ == "__main__":
    text = readme.written(README.read_text(), readme.load(RESULTS))
    of_vllm = vllm_tables.in_short(vllm_tables.load(RESULTS / "vllm_host.json"))
    README.write_text(vllm_tables.README.sub(lambda _: of_vllm, text))
    CONFIGURATION.write_text(TABLE.sub(lambda _: table(), CONFIGURATION.read_text()))
