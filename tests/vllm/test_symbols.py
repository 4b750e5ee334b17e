"""What is private to vLLM and used here is as it was when it was tried."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from services.vllm import versions
from tests.vllm import symbols

PINNED = Path(__file__).with_name("symbols.txt")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_private_names_of_vllm_have_not_moved() -> None:
    pinned, found = PINNED.read_text().splitlines(), list(symbols.lines())
    moved = sorted({line.split(maxsplit=2)[1] for line in set(pinned) ^ set(found)})
    assert not moved, f"not as in vLLM {versions.TRIED[-1]}: {', '.join(moved)}"


def test_untried_versions_of_vllm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.check(versions.TRIED[-1] + "+cpu") == ""
    assert "0.99.1 was not tried" in versions.check("0.99.1")
    monkeypatch.setenv("GHOST_VLLM_ANY_VERSION", "1")
    assert versions.check("0.99.1") == ""
