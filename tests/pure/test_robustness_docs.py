"""docs/robustness.md names tests that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "docs" / "robustness.md").read_text().splitlines() if "](../tests/" in line]
NAMED = re.compile(r"\]\(\.\./(tests/[\w/.]+)\)((?:,? ?`\w+`)*)")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_each_line_is_backed_by_tests_that_there_are(row: str) -> None:
    tests = NAMED.findall(row)
    assert tests
    for path, names in tests:
        text = (ROOT / path).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"def test_\w*{name}", text), f"{path} has no test {name}"
