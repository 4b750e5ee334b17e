"""Faults as they are inflicted on a local cluster: by signals where those do, else by the hooks of `--fault-dir`."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from services.cli.local import LocalCluster
from shared.errors import GhostError
from shared.faults import folder, tell
from shared.stripe_index import StripeIndex

SLICE_S = 0.1
"""`slow`: a target runs for a tenth of each of these."""


async def inflict(
    cluster: LocalCluster, fault: str, targets: Iterable[str], status: dict[str, Any], for_s: float
) -> None:
    """Let targets have a fault, all at once, until it is over. `status`: the cluster's, which says who is which rank.

    Raises GhostError for a target that is not there.
    """
    pids = {pid for target in targets for pid in _pids(cluster, target, status)}
    match fault:
        case "kill":
            _signal(pids, signal.SIGKILL)
        case "stop":
            async with _stopped(pids):
                await asyncio.sleep(for_s)
        case "slow":
            await _throttle(pids, for_s)
        case "full" if "redis" in targets:
            await _fill_redis(cluster, for_s)
        case "empty":
            async with StripeIndex(cluster.redis_url) as index:
                await index.command("FLUSHALL")
        case _:
            await asyncio.gather(*(_by_hook(cluster, pid, fault, for_s) for pid in pids))


def _pids(cluster: LocalCluster, target: str, status: dict[str, Any]) -> list[int]:
    """The processes behind a target. Killing all does not spare those that would restart the others."""
    kind, _, number = target.partition(":")
    if kind == "all":
        return [child.pid for child in cluster.processes.values()] + [each["pid"] for each in status["workers"]]
    if kind in ("rank", "spare"):
        rank = int(number) if number else None
        found = [each["pid"] for each in status["workers"] if each["rank"] == rank and each["state"] != "loading"][:1]
    else:
        name = f"store-{number}" if kind == "store" else kind
        found = [cluster.processes[name].pid] if name in cluster.processes else []
    if not found:
        raise GhostError(f"there is no {target} to break")
    return found


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # some die of what befell the others
            os.kill(pid, number)


@asynccontextmanager
async def _stopped(pids: Iterable[int]) -> AsyncIterator[None]:
    _signal(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(pids, signal.SIGCONT)


async def _throttle(pids: Iterable[int], for_s: float) -> None:
    for _ in range(max(1, round(for_s / SLICE_S))):
        async with _stopped(pids):
            await asyncio.sleep(0.9 * SLICE_S)
        await asyncio.sleep(0.1 * SLICE_S)


async def _fill_redis(cluster: LocalCluster, for_s: float) -> None:
    """No room in Redis for some seconds."""
    async with StripeIndex(cluster.redis_url) as index:
        await index.command("CONFIG", "SET", "maxmemory", "1")
        await asyncio.sleep(for_s)
        await index.command("CONFIG", "SET", "maxmemory", "0")


async def _by_hook(cluster: LocalCluster, pid: int, fault: str, for_s: float) -> None:
    if not cluster.settings.fault_dir:
        raise GhostError(f"{fault} needs a cluster that was started with --fault-dir DIR")
    orders = folder(cluster.settings.fault_dir)
    await tell(orders, pid, fault)
    await asyncio.sleep(for_s)
    await tell(orders, pid, "heal")
