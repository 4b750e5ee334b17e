"""The peers: clusters on this machine that differ in how KV is protected and in nothing else."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from services.cli.drill import Options, Stream, stream_all
from services.cli.local import LocalCluster, ServeSettings
from services.cli.serve import fetch_model
from tests.cluster.conftest import quiet

TOKEN_IDS = (100, 40_000)
"""Random prompts draw from these; the default model has 49,152."""

MODES: dict[str, dict[str, Any]] = {
    "none": {"protection": "none", "stores": 0},
    "replicate": {"protection": "replicate", "stores": 2},
    "parity": {"protection": "parity", "parity": 1, "stores": 1},
    "parity m=2": {"protection": "parity", "parity": 2, "stores": 2},
    "parity tail=on": {"protection": "parity", "parity": 1, "stores": 1, "protect_tail": True},
}
"""`none`: recompute after a loss. `replicate`: raw copies at host stores, the usual checkpoint."""


@asynccontextmanager
async def peers(modes: Sequence[str], *, spares: int, **changes: Any) -> AsyncIterator[dict[str, LocalCluster]]:
    """A cluster for each mode, all of them serving; they take turns, and those at rest cost nearly nothing but memory.

    A worker takes half a GiB, so a section has no more of them than it needs. They are started one after the other:
    all at once they would keep each other from answering in time.
    """
    model_dir = await asyncio.to_thread(fetch_model, "default")
    shape: dict[str, Any] = {"port": 0, "spares": spares, "kv_memory_mb": 160, "store_memory_mb": 512}
    async with AsyncExitStack() as stack:
        running = {}
        for mode in modes:
            settings = ServeSettings(**(shape | MODES[mode] | changes))
            cluster = running[mode] = await stack.enter_async_context(LocalCluster(settings, model_dir))
            await quiet(cluster)
            await stream(cluster, 0, streams=1, prompt=600, tokens=8)
        yield running


def random_prompts(seed: int, streams: int, tokens: int) -> list[list[int]]:
    """The same prompts for the same seed."""
    dice = random.Random(seed)
    return [[dice.randrange(*TOKEN_IDS) for _ in range(tokens)] for _ in range(streams)]


async def stream(
    cluster: LocalCluster, seed: int, *, streams: int, prompt: int, tokens: int, **more: Any
) -> list[Stream]:
    """Complete random prompts, all at once."""
    prompts = random_prompts(seed, streams, prompt)
    return await stream_all(cluster, prompts, Options(max_tokens=tokens), f"bench-{seed}", digest=False, **more)
