"""A real cluster of local processes over a small random model, shared by the tests that break it and leave it whole."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.cli.local import LocalCluster, ServeSettings
from shared.stripe_index import StripeIndex
from shared.types import StoreInfo
from tests.cluster.store_harness import StoreCoordinator, StoreProcess, store_process
from tests.tiny_tokenizer import make_tokenizer_dir

SERVING_S = 180.0


@pytest.fixture(scope="session")
def small_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer, as a model directory."""
    from tests.worker.rank_threads import small_model

    folder = small_model(tmp_path_factory.mktemp("model"), "Llama", vocab_size=400, max_position_embeddings=4096)
    return make_tokenizer_dir(folder)


def settings(**changes: Any) -> ServeSettings:
    """Settings of a test's cluster: free ports, float32, little memory."""
    return ServeSettings(
        **(
            {
                "port": 0,
                "dtype": "float32",
                "kv_memory_mb": 16,
                "store_memory_mb": 64,
                "restore": "always",
                "record": True,
            }
            | changes
        )
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """Three ranks, a spare, a store; it serves before a test and must serve after it."""
    orders = str(tmp_path_factory.mktemp("faults"))
    extra = {"coordinator": ["--hang-timeout-s", "2"], "worker": ["--put-deadline-s", "3"]}
    changed = settings(fault_dir=orders, allow_faults=True)
    async with LocalCluster(changed, small_model_dir, extra=extra) as running:
        await running.wait_serving(SERVING_S)
        yield running
        await whole(running)


async def whole(cluster: LocalCluster, *, without: str = "") -> dict[str, Any]:
    """Wait until the group serves, with all its workers ready again, `without` (just killed) none of them.

    Returns the status.
    """
    end = time.monotonic() + SERVING_S
    wanted = cluster.settings.tp + cluster.settings.spares
    while True:
        status = await cluster.wait_serving(SERVING_S)
        names = [worker["name"] for worker in status["workers"] if worker["state"] != "loading"]
        if len(names) == wanted and without not in names:
            return status
        assert time.monotonic() < end, f"no full set of workers: {status['workers']}\n{cluster.logs()}"
        await asyncio.sleep(0.05)


async def quiet(cluster: LocalCluster) -> dict[str, Any]:
    """Wait until nothing runs and nothing waits for protection. Returns the status, told after this was called."""
    began = time.monotonic()
    end = began + SERVING_S
    while True:
        status = await whole(cluster)
        if status["now"] >= began and not (
            status["running"] or status["waiting"] or status["stripes_pending"] or status["pages_held"]
        ):
            return status
        assert time.monotonic() < end, f"work is left over: {status}"
        await asyncio.sleep(0.05)


@pytest.fixture
def group() -> str:
    """A name of its own for the test's group, since the index is shared."""
    return f"group-{os.urandom(4).hex()}"


@pytest.fixture
async def coordinator(group: str) -> AsyncIterator[StoreCoordinator]:
    """A scripted coordinator for a store."""
    async with StoreCoordinator(group) as coordinator:
        yield coordinator


@pytest.fixture
async def index(redis_url: str) -> AsyncIterator[StripeIndex]:
    """The stripe index, as others see it."""
    async with StripeIndex(redis_url) as index:
        yield index


@pytest.fixture
async def store(coordinator: StoreCoordinator, redis_url: str) -> AsyncIterator[StoreProcess]:
    """A parity store as a real process."""
    async with store_process(coordinator.url, redis_url, "--name", "store-a", "--capacity-mb", "16") as store:
        yield store


@pytest.fixture
async def info(coordinator: StoreCoordinator, store: StoreProcess) -> StoreInfo:
    """What the store said of itself in its hello."""
    return await coordinator.next_store()
