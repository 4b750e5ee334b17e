"""A group of one rank: its parity is a copy of its KV, which outlives its process."""

from pathlib import Path

import pytest

from services.cli.drill import Options, run_drill
from services.cli.local import LocalCluster
from tests.cluster.conftest import SERVING_S, settings

pytestmark = pytest.mark.timeout(400)


async def check_survival(model_dir: Path, device: str) -> None:
    """Kill the only worker process in mid-stream. The next one, on the same device, goes on from what the store has."""
    async with LocalCluster(settings(tp=1, spares=0, device=device, allow_faults=True), model_dir) as cluster:
        await cluster.wait_serving(SERVING_S)
        report = await run_drill(cluster, Options("kill", ("rank:0",), "decode", 300, 48, cached=True))
        assert report.identical
        assert report.kv_identical
        assert report.restored_pages >= 299 // 16, cluster.logs()


async def test_text_and_kv_are_the_same_when_the_only_rank_dies(small_model_dir: Path) -> None:
    await check_survival(small_model_dir, "cpu")
