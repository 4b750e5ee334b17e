"""What a drill sees happen to a cluster: each change of its state, with the time."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from services.cli.local import LocalCluster

POLL_S = 0.05


@dataclass(slots=True)
class History:
    """Looks at a cluster's status all the time while it is entered."""

    cluster: LocalCluster
    seen: list[tuple[float, str]] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def since(self, began: float) -> list[str]:
        """What was seen from then on, one line each."""
        before = [told for at, told in self.seen if at < began][-1:]
        return before + [f"{at - began:7.3f} s  {told}" for at, told in self.seen if at >= began]

    async def _look(self) -> None:
        while True:
            try:
                told = _in_words(await self.cluster.status())
            except (aiohttp.ClientError, TimeoutError) as error:
                told = f"no status: {getattr(error, 'status', '') or type(error).__name__}"
            if not self.seen or self.seen[-1][1] != told:
                self.seen.append((time.monotonic(), told))
            await asyncio.sleep(POLL_S)


def _in_words(status: dict[str, Any]) -> str:
    states = [worker["state"] for worker in status["workers"]]
    words = [
        f"epoch {status['epoch']}: {status['state']}",
        f"{states.count('spare')} spare(s), {states.count('loading')} loading, {len(status['stores'])} store(s)",
    ]
    if status["unprotected_reason"]:
        words.append(f"unprotected: {status['unprotected_reason']}"[:160])
    return ", ".join(words)
