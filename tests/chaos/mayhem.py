"""What is broken, when, and for how long: drawn from the fault matrix by a seed."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from services.cli.drill.faults import inflict
from services.cli.local import LocalCluster
from shared.errors import GhostError
from tests.chaos.hostile import Hostile


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault that can be drawn. `targets` are counts: how many ranks, or whose."""

    fault: str
    target: str
    weight: float
    longest_s: float = 0.0


HOSTILE = "from outside"
"""No fault, but a request or a peer that is wrong; see Hostile."""

KINDS = (
    Kind("kill", "rank", 6),
    Kind("kill", "ranks", 2),
    Kind("kill", "every rank", 0.5),
    Kind("kill", "spare", 1),
    Kind("kill", "rank and store", 1),
    Kind("stop", "rank", 2, 4.0),
    Kind("hang", "rank", 1),
    Kind("slow", "rank", 1, 4.0),
    Kind("cut:peers", "rank", 1, 4.0),
    Kind("cut:coordinator", "rank", 1, 6.0),
    Kind("cut:store", "rank", 1, 4.0),
    Kind("corrupt:wire", "rank", 1, 3.0),
    Kind("kill", "store", 1),
    Kind("stop", "store", 1, 4.0),
    Kind("slow", "store", 1, 4.0),
    Kind("full", "store", 1, 4.0),
    Kind("garbage", "store", 1),
    Kind("corrupt:parity", "store", 1),
    Kind("kill", "redis", 1),
    Kind("stop", "redis", 1, 3.0),
    Kind("full", "redis", 1, 4.0),
    Kind("empty", "redis", 1),
    Kind("kill", "coordinator", 1),
    Kind("stop", "coordinator", 1, 3.0),
    Kind("kill", "gateway", 1),
    Kind("kill", "all", 0.3),
    Kind("replace", "rank", 2),
    Kind(HOSTILE, "poison on all", 2),
    Kind(HOSTILE, "poison on one", 1),
    Kind(HOSTILE, "too many tokens", 1),
    Kind(HOSTILE, "7 MB of text", 1),
    Kind(HOSTILE, "floats", 1),
    Kind(HOSTILE, "garbage", 1),
    Kind(HOSTILE, "wrong token", 1),
    Kind(HOSTILE, "silence", 0.5),
)

SPOILS = {"garbage store", "corrupt:parity store"}
"""What leaves damaged shards in a store, by the names in `Mayhem.injected`."""

OF_VLLM = tuple(
    kind
    for kind in KINDS
    if kind.fault in {"kill", "stop", "garbage", "corrupt:parity", "empty"} and kind.target not in ("gateway", "all")
)
"""What a vLLM whose ranks are protected can have."""


class Mayhem:
    """Inflicts faults on a cluster, every `pause_s` seconds on average.

    `before` is told each one's targets a moment before it comes.
    """

    def __init__(self, cluster: LocalCluster, seed: int, pause_s: float, before: Callable[[tuple[str, ...]], None]):
        self.injected: Counter[str] = Counter()
        self.hostile = Hostile(cluster, random.Random(f"{seed}/hostile"))
        self._cluster = cluster
        self._dice = random.Random(seed)
        self._pause_s = pause_s
        self._before = before

    async def run(self, stop: asyncio.Event) -> None:
        """Inflict faults until `stop` is set; several may be in force at once."""
        async with asyncio.TaskGroup() as tasks:
            kinds = OF_VLLM if self._cluster.hosted else KINDS
            while not stop.is_set():
                kind = self._dice.choices(kinds, [each.weight for each in kinds])[0]
                tasks.create_task(
                    self._inflict(kind, self._targets(kind), self._dice.uniform(0.2, kind.longest_s or 0.2))
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._dice.expovariate(1 / self._pause_s)):
                        await stop.wait()

    def _targets(self, kind: Kind) -> tuple[str, ...]:
        settings, dice = self._cluster.settings, self._dice
        rank, store = f"rank:{dice.randrange(settings.tp)}", f"store:{dice.randrange(settings.stores)}"
        match kind.target:
            case "ranks":
                return tuple(f"rank:{number}" for number in dice.sample(range(settings.tp), 2))
            case "every rank":
                return tuple(f"rank:{number}" for number in range(settings.tp))
            case "rank and store":
                return rank, store
            case "rank":
                return (rank,)
            case "store":
                return (store,)
            case other:
                return (other,)

    async def _inflict(self, kind: Kind, targets: tuple[str, ...], for_s: float) -> None:
        try:
            status = await self._cluster.status()
            print(
                f"  epoch {status['epoch']}, {status['state']}: {kind.fault} of {', '.join(targets)} for {for_s:.1f} s",
                flush=True,
            )
            self._before(targets)
            if kind.fault == HOSTILE:
                await self.hostile.do(kind.target, status)
            elif kind.fault == "replace":
                await self._replace(targets[0])
            else:
                await inflict(self._cluster, kind.fault, targets, status, for_s)
        except (GhostError, aiohttp.ClientError, TimeoutError, OSError) as error:
            print(f"  {kind.fault} of {', '.join(targets)} could not be done: {error}", flush=True)
        else:
            self.injected[f"{kind.fault} {kind.target}"] += 1

    async def _replace(self, target: str) -> None:
        """An operator's wish rather than a fault: a rank moves to a spare, if none moves already."""
        url, body = self._cluster.base_url + "/v1/fault_tolerance/apply", {"action": "replace", "target": target}
        async with aiohttp.ClientSession(raise_for_status=True) as session, session.post(url, json=body):
            return
