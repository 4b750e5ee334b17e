"""One coordinator leads a group: the one that holds the group's lease in Redis, and goes on saying so.

A second one is refused, rather than both raising the epoch in turn. After a crash the lease runs out by itself; where
it can be told that its holder is dead, it is taken at once.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import msgpack

from shared.errors import ConfigError, GhostError, PeerLost
from shared.stripe_index import StripeIndex

log = logging.getLogger(__name__)

LEASE_S = 3.0
RENEW_S = 1.0
PAUSE_S = 0.2
PATIENCE_S = LEASE_S + 1.0
"""A lease that is held for longer than this while we wait for it is renewed: its holder lives."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A coordinator: where it listens, and what tells on its own machine whether it lives."""

    name: str  # random, of this life
    url: str
    network: str  # two processes that have the same one can't both listen at one URL
    processes: str  # in the same one, a pid means the same process
    pid: int
    began: int  # when it was started, so that a pid that is used again is another one

    @classmethod
    def here(cls, url: str) -> "Holder":
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network, processes = (f"{boot}/{os.readlink(f'/proc/self/ns/{kind}')}" for kind in ("net", "pid"))
        return cls(os.urandom(8).hex(), url, network, processes, os.getpid(), _began(os.getpid()))

    @classmethod
    def packed(cls, data: bytes) -> "Holder":
        """The inverse of `pack`. Raises ConfigError for what is not a holder."""
        try:
            return cls(*msgpack.unpackb(data))
        except (ValueError, TypeError, msgpack.UnpackException):
            raise ConfigError("the lease in Redis is of another version's coordinator") from None

    def pack(self) -> bytes:
        """As it stands in Redis."""
        return bytes(msgpack.packb(astuple(self)))

    def buries(self, other: "Holder") -> bool:
        """Whether the other is known to be dead: we listen where it did, or its process is gone."""
        if self.network == other.network and self.url == other.url:
            return True
        return self.processes == other.processes and _began(other.pid) != other.began


class Lease:
    """A group's lease, for the coordinator at `url`."""

    def __init__(self, index: StripeIndex, group: str, url: str):
        self._index = index
        self._group = group
        self._me = Holder.here(url)
        self._left = asyncio.Event()

    async def take(self, tell: Callable[[str], None]) -> None:
        """Take the lease, as soon as Redis is there and no other holds it; `tell` is told what is waited for.

        Raises ConfigError where another coordinator holds on to it.
        """
        waited, dead = 0.0, b""
        while True:
            try:
                held = await self._index.take_lease(self._group, self._me.pack(), LEASE_S, dead)
            except PeerLost as error:
                tell(f"Redis does not tell who leads the group: {error}")
            else:
                if held == self._me.pack():
                    return
                holder = Holder.packed(held)
                if self._me.buries(holder):
                    dead = held
                    continue
                tell(f"the lease of the coordinator at {holder.url} has to run out")
                if waited > PATIENCE_S:
                    raise ConfigError(
                        f"group {self._group!r} has a coordinator already, at {holder.url} (pid {holder.pid}): "
                        "stop it first, or name another group (--group)"
                    )
                waited += PAUSE_S
            await asyncio.sleep(PAUSE_S)

    async def keep(self) -> None:
        """Renew it until it is left. Raises GhostError when another coordinator has taken it: this one was away."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._left.wait()
                    return
            try:
                held = await self._index.take_lease(self._group, self._me.pack(), LEASE_S)
            except PeerLost as error:
                log.debug("the lease is not renewed: %s", error)
                continue
            if held != self._me.pack():
                raise GhostError(f"group {self._group!r} is led by the coordinator at {Holder.packed(held).url} now")

    def end(self) -> None:
        """Renew it no more. A cancellation would not do: redis-py swallows one that comes as its answer does."""
        self._left.set()

    async def leave(self) -> None:
        """Give it back, for whoever comes next."""
        try:
            await self._index.leave_lease(self._group, self._me.pack())
        except PeerLost as error:
            log.debug("the lease runs out by itself: %s", error)


def _began(pid: int) -> int:
    """When a process was started, in ticks since the machine was; 0: there is none of this pid."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
