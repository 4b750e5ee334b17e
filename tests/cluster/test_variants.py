"""Other shapes of a cluster lose ranks as well: one rank, ranks over gloo, two parity shards, raw copies."""

from pathlib import Path
from typing import Any

import pytest

from services.cli.drill import Options, run_drill
from services.cli.local import LocalCluster
from tests.cluster.conftest import SERVING_S, settings, whole

pytestmark = pytest.mark.timeout(400)

Drill = tuple[str, str, bool]
"""A fault, its targets, and whether what is lost can be restored."""


@pytest.mark.parametrize(
    ("shape", "drills"),
    [
        pytest.param({"tp": 1}, [("kill", "rank:0", True)], id="one rank"),
        pytest.param(
            {"tp": 2, "communicator": "gloo"},
            [("kill", "rank:1", True), ("stop", "rank:0", True), ("cut:peers", "rank:1", True)],
            id="gloo",
        ),
        pytest.param(
            {"tp": 3, "parity": 2, "stores": 2, "spares": 2},
            [
                ("kill", "rank:0,rank:2", True),
                ("kill", "rank:1,store:0", True),
                ("kill", "rank:0,rank:1,rank:2", False),
            ],
            id="two parity shards",
        ),
        pytest.param({"protect_tail": True}, [("kill", "rank:1", True)], id="protected tails"),
        pytest.param({"tp": 2, "protection": "none", "stores": 0}, [("kill", "rank:0", False)], id="no protection"),
        pytest.param(
            {"tp": 2, "protection": "replicate", "spares": 2, "stores": 2},
            [("kill", "rank:0,rank:1", True)],
            id="raw copies",
        ),
    ],
)
async def test_other_shapes_survive(
    small_model_dir: Path, tmp_path: Path, shape: dict[str, Any], drills: list[Drill]
) -> None:
    orders = tmp_path / "faults"
    orders.mkdir(mode=0o700)
    async with LocalCluster(settings(fault_dir=str(orders), **shape), small_model_dir) as cluster:
        await cluster.wait_serving(SERVING_S)
        async with cluster.kept():
            for fault, targets, restores in drills:
                options = Options(fault, tuple(targets.split(",")), "decode", 200, 32, 2, cached=restores)
                report = await run_drill(cluster, options)
                assert report.identical, (fault, targets, report.events)
                assert report.kv_identical, (fault, targets, report.events)
                assert (report.restored_pages >= 2 * (199 // 16)) == restores, (fault, targets, report.events)
                if shape.get("protect_tail"):
                    assert report.tail_tokens > 0
                await whole(cluster)
        assert (report.parity_bytes_stored > 0) == (shape.get("stores") != 0)


@pytest.mark.slow
async def test_a_straggler_moves_to_a_spare_where_that_is_asked_for(small_model_dir: Path) -> None:
    async with LocalCluster(settings(tp=2, replace_stragglers=True), small_model_dir) as cluster:
        before = await cluster.wait_serving(SERVING_S)
        victim = next(each["name"] for each in before["workers"] if each["rank"] == 1)
        async with cluster.kept():
            options = Options("slow", ("rank:1",), "token:20", 200, 200, 2, for_s=15.0)
            report = await run_drill(cluster, options)
        assert report.identical, report.events
        assert report.kv_identical, report.events
        after = await whole(cluster)
        assert [each["rank"] for each in after["workers"] if each["name"] == victim] == [None]
        assert [record["lost_ranks"] for record in after["recoveries"]] == [[]]  # moved, not lost
