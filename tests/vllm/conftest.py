"""One server for the tests of a file: its start takes half a minute."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.server import Server, serving
from tests.vllm.tiny_model import make_model_dir


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers."""
    return make_model_dir(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of three ranks and one spare."""
    with serving(tiny_llama, tmp_path_factory.mktemp("server") / "log") as running:
        yield running
