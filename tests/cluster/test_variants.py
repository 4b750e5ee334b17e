"""Other shapes of a cluster lose ranks as well: one rank, ranks over gloo, two ranks at once with two parity shards."""

from pathlib import Path
from typing import Any

import pytest

from services.drill import Options, run_drill
from services.local import LocalCluster
from tests.cluster.conftest import SERVING_S, settings, whole

pytestmark = pytest.mark.timeout(400)


@pytest.mark.parametrize(
    ("shape", "lost", "restores"),
    [
        pytest.param({"tp": 1}, (0,), False, id="one rank"),
        pytest.param({"tp": 2, "communicator": "gloo"}, (1,), True, id="gloo"),
        pytest.param({"tp": 3, "parity": 2, "stores": 2, "spares": 2}, (0, 2), True, id="two of three"),
        pytest.param({"tp": 2, "protection": "none", "stores": 0}, (0,), False, id="no protection"),
        pytest.param({"tp": 2, "protection": "replicate", "spares": 2, "stores": 2}, (0, 1), True, id="raw copies"),
    ],
)
async def test_other_shapes_survive(
    small_model_dir: Path, shape: dict[str, Any], lost: tuple[int, ...], restores: bool
) -> None:
    async with LocalCluster(settings(**shape), small_model_dir) as cluster:
        await cluster.wait_serving(SERVING_S)
        report = await run_drill(cluster, Options("kill", tuple(f"rank:{rank}" for rank in lost), "decode", 200, 32, 2))
        assert report.identical
        assert report.kv_identical
        assert (report.restored_pages >= 2 * (200 // 16)) == restores
        assert (report.parity_bytes_stored > 0) == restores


async def test_with_two_parity_shards_in_two_stores_a_rank_and_a_store_may_be_lost_at_once(
    small_model_dir: Path,
) -> None:
    async with LocalCluster(settings(tp=2, parity=2, stores=2), small_model_dir) as cluster:
        await cluster.wait_serving(SERVING_S)
        async with cluster.kept():
            report = await run_drill(cluster, Options("kill", ("store:0", "rank:1"), "decode", 200, 32, 2))
            assert report.identical
            assert report.kv_identical
            assert report.restored_pages >= 2 * (200 // 16)
            await whole(cluster)
