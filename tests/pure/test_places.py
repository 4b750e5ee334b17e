"""Places that are not like the one where it was written: other kinds of Redis, no home, a health check under TLS."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from services.cli.doctor import examine
from services.worker.engine import model_files
from shared.errors import ConfigError, PeerLost
from shared.stripe_index import StripeIndex
from tests.pure.test_readme import ROOT


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://host:26379/mymaster",
        "redis-cluster://host:6379",
        "redis://one:6379,two:6379/0",
        "http://host",
        "host:6379",
        "",
        "redis://host:port/0",
    ],
)
def test_a_redis_url_of_another_kind_is_refused_in_a_line(url: str) -> None:
    with pytest.raises(ConfigError, match="GHOST_REDIS_URL") as refused:
        StripeIndex(url)
    assert "\n" not in str(refused.value)


def test_a_password_of_commas_is_no_list_of_hosts() -> None:
    assert StripeIndex("redis://:a,b@host:6379/0")


@asynccontextmanager
async def answering(line: bytes) -> AsyncIterator[str]:
    """A server of Redis' protocol that says one thing to all."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(line * max(1, data.count(b"*")))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"-MOVED 3999 10.0.0.7:6381\r\n", "a node of a Redis Cluster"),
        (b"-ERR unknown command 'GET'\r\n", "a Redis Sentinel"),
    ],
)
async def test_another_kind_of_redis_is_named(line: bytes, said: str) -> None:
    async with answering(line) as url, StripeIndex(url) as index:
        with pytest.raises(ConfigError, match=said):
            await index.epoch("g")


async def test_a_redis_that_has_a_trouble_of_its_own_is_waited_for() -> None:
    async with answering(b"-LOADING Redis is loading the dataset in memory\r\n") as url, StripeIndex(url) as index:
        with pytest.raises(PeerLost):
            await index.epoch("g")


def test_without_a_home_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GHOST_CACHE_DIR", raising=False)
    monkeypatch.setattr(model_files.Path, "home", homeless)
    with pytest.raises(ConfigError, match="GHOST_CACHE_DIR"):
        model_files.default_cache_dir()
    monkeypatch.setenv("GHOST_CACHE_DIR", "/somewhere")
    assert model_files.default_cache_dir() == Path("/somewhere")


def test_the_doctor_says_of_shared_memory_what_is_used() -> None:
    (finding,) = [each for each in examine("default", "") if each.name == "shared memory"]
    assert finding.state == "ok"
    assert "/dev/shm" not in finding.found + finding.picked


# -- the containers' health check --------------------------------------------------------------------------------------


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = spec_from_file_location("health", ROOT / "docker" / "health.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("GHOST_PORT", "GHOST_HOST"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_the_health_check_asks_where_the_service_listens(health: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert health.address_of(["gateway"], "port", 8000) == ("127.0.0.1", 8000)
    assert health.address_of(["gateway", "--host", "0.0.0.0", "--port", "9"], "port", 8000) == ("127.0.0.1", 9)
    assert health.address_of(["gateway", "--host=::"], "port", 8000) == ("::1", 8000)
    assert health.address_of(["gateway", "--host", "10.0.0.7"], "port", 8000) == ("10.0.0.7", 8000)
    monkeypatch.setenv("GHOST_PORT", "tcp://10.96.0.12:8000")
    assert health.address_of(["gateway"], "port", 8001) == ("127.0.0.1", 8001)
