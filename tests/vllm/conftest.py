"""One server for most tests: its start takes half a minute."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.vllm.protected import Protected, protected
from tests.vllm.tiny_model import make_model_dir

PARITY = 2


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers."""
    return make_model_dir(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def guarded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    """Three ranks and a spare, two of which may be lost at once."""
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with protected(tiny_llama, tmp_path_factory.mktemp("guarded"), *tools, parity=PARITY) as running:
        yield running


@pytest.fixture
async def whole(guarded: Protected) -> AsyncIterator[Protected]:
    """All ranks and the spare are there; the engine core and the API server are the same afterwards."""
    async for each in kept_whole(guarded):
        yield each


async def kept_whole(protected: Protected) -> AsyncIterator[Protected]:
    """Whole before and after, with the same engine core and API server."""
    await protected.whole()
    server = protected.server
    before = server.engine_core()
    yield protected
    assert server.process.poll() is None, server.tail()
    assert server.engine_core() == before
    assert server.healthy()
