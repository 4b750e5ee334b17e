"""`ghostserve drill --engine vllm`: vLLM's ranks, and what protects them, broken by the same hand as ours."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from services.cli.drill import Options, run_drill
from services.cli.vllm import VllmCluster, VllmSettings, vllm_arguments
from tests.vllm.server import ENVIRONMENT

pytestmark = [pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmCluster]:
    """vLLM with three ranks and a spare, and services that are restarted."""
    logs = tmp_path_factory.mktemp("drill")
    settings = VllmSettings(port=0, tp=3, dtype="float32", served_name="tiny", log_dir=str(logs))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = VllmCluster(settings, tiny_llama, arguments=vllm_arguments(settings, tiny_llama))
        async with made:
            await made.wait_serving(240)
            async with made.kept():
                yield made


@pytest.mark.parametrize(
    ("fault", "target"), [("kill", "rank:1"), ("stop", "rank:0"), ("kill", "store:0"), ("kill", "redis")]
)
async def test_streams_of_vllm_are_identical_whatever_is_broken(cluster: VllmCluster, fault: str, target: str) -> None:
    report = await run_drill(cluster, Options(fault, (target,), prompt_tokens=300, max_tokens=64, seed=3))
    assert report.identical, f"{report.events}\n{cluster.logs()}"
    assert report.kv_identical is None
    assert bool(report.phases) == target.startswith("rank")


async def test_a_rank_lost_with_its_coordinator_is_computed_again_with_the_same_tokens(cluster: VllmCluster) -> None:
    report = await run_drill(
        cluster,
        Options(
            "kill", ("coordinator",), prompt_tokens=300, max_tokens=200, seed=4, when="token:20",
            then=("rank:2",), then_s=0.05,
        ),  # far shorter than 180 steps take: vLLM goes on without a coordinator
    )  # fmt: skip
    assert report.identical, f"{report.events}\n{cluster.logs()}"
