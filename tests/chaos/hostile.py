"""Requests and peers that are wrong, drawn among the faults: nobody else may notice, and each gets its own answer."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from services.cli.local import LocalCluster
from shared.channel import CHANNEL_PATH
from shared.errors import GhostError
from shared.faults import tell

POISON = (397, 3, 398, 5)
"""Steps raise errors in which these tokens stand one after the other; no answer has them by chance."""
ANSWER_S = 60.0
"""In which whoever asks has an answer, whatever breaks meanwhile; or finds the connection closed."""
STRANGER_S = 90.0
"""In which a stranger that says nothing of use is shown out."""
AWAY = {429, 503}


class Wrong(AssertionError):
    """It got another answer than it should have."""


class Hostile:
    """What can be done to a cluster from outside, by name. `outcomes` counts what came of it."""

    def __init__(self, cluster: LocalCluster, dice: random.Random):
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._cluster = cluster
        self._dice = dice
        self._deeds: dict[str, Callable[[dict[str, Any]], Awaitable[str]]] = {
            "poison on all": lambda status: self._poison(status, set(range(cluster.settings.tp))),
            "poison on one": lambda status: self._poison(status, {dice.randrange(cluster.settings.tp)}),
            "too many tokens": lambda status: self._refused(status, [5] * 4090),
            "7 MB of text": lambda status: self._refused(status, "ghost " * ((7 << 20) // 6)),
            "floats": lambda status: self._refused(status, [0.5] * 300_000),
            "garbage": self._garbage,
            "wrong token": self._wrong_token,
            "silence": self._silence,
        }

    async def do(self, name: str, status: dict[str, Any]) -> None:
        """Do it, and note what came of it; what should not have is in `wrong`."""
        try:
            async with asyncio.timeout(2 * ANSWER_S):
                outcome = await self._deeds[name](status)
        except Wrong as error:
            self.wrong.append(f"{name}: {error}")
            outcome = "wrong"
        except TimeoutError:
            self.wrong.append(f"{name}: no answer within {2 * ANSWER_S:.0f} s")
            outcome = "wrong"
        self.outcomes[f"{name}: {outcome}"] += 1

    # -- requests ----------------------------------------------------------------------------------------------------

    async def _poison(self, status: dict[str, Any], ranks: set[int]) -> str:
        orders = Path(self._cluster.settings.fault_dir)
        pids = [each["pid"] for each in status["workers"] if each["rank"] in ranks]
        order = f"raise {','.join(map(str, POISON))} {self._dice.choice(('before', 'after'))}"
        for pid in pids:
            with contextlib.suppress(GhostError):  # it hangs, or is stopped
                await tell(orders, pid, order)
        try:
            return await self._asked([7, *POISON] * self._dice.choice((1, 30)))
        finally:
            for pid in pids:
                with contextlib.suppress(GhostError):
                    await tell(orders, pid, "heal")

    async def _asked(self, prompt: list[int]) -> str:
        """A stream that may end with an error which says that it was tried; or may be served, where the poison died."""
        status, lines = await self._post(prompt, stream=True)
        if status in AWAY or not lines:
            return "not served"
        if status != 200:
            raise Wrong(f"{status}: {lines[-1][:200]!r}")
        last = [line for line in lines if line.startswith(b"data: {")][-1:]
        event = json.loads(last[0].removeprefix(b"data: ")) if last else {}
        if message := event.get("error", {}).get("message"):
            return "ended with an error" if "failed" in message else "broken off"
        return "served"

    async def _refused(self, status: dict[str, Any], prompt: object) -> str:
        got, lines = await self._post(prompt, stream=False)
        if got in AWAY or not lines:
            return "not served"
        if got not in (400, 413):
            raise Wrong(f"{got}: {lines[-1][:200]!r}")
        return "refused"

    async def _post(self, prompt: object, *, stream: bool) -> tuple[int, list[bytes]]:
        """The status and lines of an answer; none if the gateway was away or died."""
        model = self._cluster.settings.served_name
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "stream": stream, "temperature": 0}
        try:
            timeout = aiohttp.ClientTimeout(2 * ANSWER_S)
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(self._cluster.api_url + "/v1/completions", json=body) as response,
            ):
                return response.status, [line async for line in response.content]
        except (aiohttp.ClientError, OSError):
            return 0, []

    # -- strangers ---------------------------------------------------------------------------------------------------

    def _port(self, status: dict[str, Any]) -> tuple[str, int]:
        """One that speaks no HTTP to clients: of the coordinator, of a store."""
        addresses = [
            self._cluster.processes["coordinator"].address,
            *(each["bulk_address"] for each in status["stores"]),
        ]
        parts = urlsplit(self._dice.choice(addresses))
        return str(parts.hostname), int(parts.port or 0)

    async def _garbage(self, status: dict[str, Any]) -> str:
        return await self._shown_out(
            self._port(status), self._dice.randbytes(self._dice.randrange(1, 1 << 16)), end=True
        )

    async def _silence(self, status: dict[str, Any]) -> str:
        return await self._shown_out(self._port(status), b"", end=False)

    async def _shown_out(self, place: tuple[str, int], data: bytes, *, end: bool) -> str:
        """Says something, or nothing, and waits to be shown out."""
        try:
            reader, writer = await asyncio.open_connection(*place)
        except OSError:
            return "nobody there"
        try:
            writer.write(data)
            if end:
                writer.write_eof()
            async with asyncio.timeout(STRANGER_S):
                while await reader.read(1 << 16):
                    pass
        except TimeoutError:
            raise Wrong(f"a stranger was on {place[1]} for {STRANGER_S:.0f} s") from None
        except OSError:
            pass
        finally:
            writer.close()
        return "shown out"

    async def _wrong_token(self, status: dict[str, Any]) -> str:
        url = self._cluster.processes["coordinator"].address + CHANNEL_PATH
        headers = {"Authorization": "Bearer not-this-one"}
        try:
            async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=headers):
                raise Wrong("a peer with another token was let in")
        except aiohttp.WSServerHandshakeError as error:
            if error.status not in (401, 403):
                raise Wrong(f"a peer with another token got {error.status}") from error
            return "refused"
        except (aiohttp.ClientError, OSError):
            return "nobody there"
