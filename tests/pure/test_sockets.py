"""Addresses in all their forms, and few descriptors."""

import asyncio
import socket

import pytest

from shared import sockets
from shared.errors import ConfigError
from shared.sockets import bind, bracketed


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_descriptors_that_are_few_bound_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 512)]
    monkeypatch.setattr(sockets.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(sockets.resource, "setrlimit", lambda _, given: limits.append(given))
    assert sockets.room_for(100) == 100
    assert limits[-1] == (256, 512)
    assert sockets.room_for(2048) == 512 - sockets.OTHER_DESCRIPTORS
    assert limits[-1] == (512, 512)


async def bound_to(host: str, port: int = 0) -> list[str]:
    made = await bind(host, port)
    try:
        assert len({each.getsockname()[1] for each in made}) == 1  # one port, whatever the addresses
        return [each.getsockname()[0] for each in made]
    finally:
        for each in made:
            each.close()


async def test_a_name_of_several_addresses_is_listened_on_with_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(*_: object, **__: object) -> list[object]:
        kind = socket.SOCK_STREAM
        return [
            (socket.AF_INET6, kind, 6, "", ("2001:db8::1", 0, 0, 0)),  # not here: left out
            (socket.AF_INET, kind, 6, "", ("127.0.0.1", 0)),
            (socket.AF_INET, kind, 6, "", ("127.0.0.2", 0)),
        ]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two)
    assert await bound_to("localhost") == ["127.0.0.1", "127.0.0.2"]


async def test_an_address_that_cannot_be_had_is_named() -> None:
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1:0"):
        await bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="listen on no"):
        await bind("no.such.host.invalid", 0)
    (taken,) = await bind("127.0.0.1", 0)
    taken.listen()
    with taken, pytest.raises(ConfigError, match="in use"):
        await bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
async def test_ipv6_is_listened_on_and_the_wildcard_is_for_all() -> None:
    assert await bound_to("::1") == ["::1"]
    (wildcard,) = await bind("::", 0)
    wildcard.listen()
    with wildcard, socket.create_connection(("127.0.0.1", wildcard.getsockname()[1]), timeout=5):
        pass
    assert (bracketed("::1"), bracketed("[::1]"), bracketed("host")) == ("[::1]", "[::1]", "host")
