"""Addresses to listen on, however a host writes them, and how many connections a process has descriptors for."""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from typing import Any

from shared.errors import ConfigError

log = logging.getLogger(__name__)

OTHER_DESCRIPTORS = 128
"""What a process has open besides connections."""


def bracketed(host: str) -> str:
    """A host as URLs have it."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def room_for(connections: int) -> int:
    """How many connections there are descriptors for, of so many; the process's limit is raised as far as it may be."""
    wanted = connections + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft < wanted:
            connections = max(1, soft - OTHER_DESCRIPTORS)
            log.warning("%d descriptors: no more than %d connections at a time (ulimit -n)", soft, connections)
    return connections


async def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets for all of a host's addresses that this machine has, on one port. Raises ConfigError."""
    sockets: list[socket.socket] = []
    missing = OSError(errno.EADDRNOTAVAIL, "no such address here")
    try:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                sockets.append(_bound(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
            port = port or (sockets[0].getsockname()[1] if sockets else 0)
        if not sockets:
            raise missing
    except OSError as error:
        for each in sockets:
            each.close()
        raise ConfigError(f"can't listen on {bracketed(host)}:{port}: {error.strerror or error}") from error
    return sockets


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")  # :: is for all who come
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound
