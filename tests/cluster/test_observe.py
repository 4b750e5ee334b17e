"""What operators see of a real cluster: metrics before and after a kill, the command line, the log."""

import asyncio
import json
import os
import re
import shlex
import signal
import sys
import time

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.cli.local import LocalCluster
from tests.cluster.conftest import SERVING_S, quiet, whole
from tests.pure.monitoring import metrics_named
from tests.pure.test_readme import ROOT

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]


async def scrape(cluster: LocalCluster) -> dict[str, float]:
    """All samples of all services, by name and labels, the labels as `k=v`; one series of a name also as that name."""
    samples: dict[str, float] = {}
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        for service in ("gateway", "coordinator", "store-0"):
            url = cluster.processes[service].address.replace("ws://", "http://") + "/metrics"
            async with session.get(url) as response:
                for family in text_string_to_metric_families(await response.text()):
                    for sample in family.samples:
                        labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                        samples[sample.name] = sample.value
                        samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


async def test_a_kill_shows_in_the_metrics_and_all_that_alarms_need_is_there(cluster: LocalCluster) -> None:
    status = await quiet(cluster)
    before = await scrape(cluster)
    victim = next(worker for worker in status["workers"] if worker["rank"] == 2)
    body = {"prompt": [9] * 200, "max_tokens": 200, "ignore_eos": True, "stream": True}
    events = 0
    async with (
        aiohttp.ClientSession(raise_for_status=True) as session,
        session.post(cluster.base_url + "/v1/completions", json=body) as stream,
    ):
        async for line in stream.content:
            if line.startswith(b"data: "):
                events += 1
                if events == 60:
                    os.kill(victim["pid"], signal.SIGKILL)
    await whole(cluster, without=victim["name"])
    await quiet(cluster)
    after = await scrape(cluster)
    grew = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grew["ghostserve:epoch"] >= 1
    assert grew["ghostserve:rank_failures_total{reason=closed}"] == 1
    assert grew["ghostserve:recoveries_total"] == 1
    assert grew["ghostserve:requests_recovered_total{method=restore}"] == 1
    assert grew["ghostserve:requests_recovered_total{method=recompute}"] == 0
    assert grew["ghostserve:recovery_duration_seconds_count{phase=restore}"] == 1
    assert grew["ghostserve:kv_reconstructed_bytes_total"] > 0
    assert grew["ghostserve:parity_bytes_total"] > 0
    assert grew["ghostserve:generation_tokens_total"] == grew["ghostserve:sampled_tokens_total"] == 200
    assert grew["ghostserve:requests_total{endpoint=/v1/completions,outcome=length}"] == 1
    assert after["ghostserve:spares"] == after["ghostserve:can_lose"] == after["ghostserve:stores"] == 1
    assert after["ghostserve:kv_unprotected_tokens"] == after["ghostserve:protection_lag_seconds"] == 0
    assert {f"ghostserve:rank_step_seconds_count{{rank={rank}}}" for rank in range(3)} <= after.keys()
    assert metrics_named() - after.keys() == set(), "alarms or panels name metrics that do not exist"


async def ghostserve(*arguments: str) -> tuple[int | None, str]:
    """Run a command; its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=os.environ | {"COLUMNS": "160"},
    )  # fmt: skip
    printed, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, printed.decode()


async def test_status_and_top_show_the_cluster_in_the_terminal(cluster: LocalCluster) -> None:
    status = await whole(cluster)
    code, printed = await ghostserve("status", "--url", cluster.base_url)
    assert code == 0, printed
    assert {"rank 0", "rank 2", "spare", "store-0", "can lose 1 rank(s) now"} <= {
        wanted for wanted in ("rank 0", "rank 2", "spare", "store-0", "can lose 1 rank(s) now") if wanted in printed
    }
    code, printed = await ghostserve("status", "--json", "--url", cluster.base_url)
    assert code == 0, printed
    assert json.loads(printed)["epoch"] == status["epoch"]
    code, printed = await ghostserve("top", "--count", "1", "--interval", "0.1", "--url", cluster.base_url)
    assert code == 0, printed
    assert "time to first token" in printed
    code, printed = await ghostserve("status", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert printed.startswith("ghostserve: no gateway at http://127.0.0.1:9")


async def test_one_line_a_request_with_its_id_and_epoch_and_no_text_of_it(cluster: LocalCluster) -> None:
    await whole(cluster)
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        body = {"prompt": "the secret fox", "max_tokens": 2}
        async with session.post(cluster.base_url + "/v1/completions", json=body) as response:
            name = response.headers["X-Request-Id"]
    log = cluster.processes["gateway"].command.log
    end = time.monotonic() + SERVING_S
    while not (lines := [line for line in log.read_text().splitlines() if name in line]):
        assert time.monotonic() < end, "the request is not in the log"
        await asyncio.sleep(0.02)
    assert len(lines) == 1
    assert " INFO gateway services.gateway.account: request ended epoch=" in lines[0]
    assert f"request={name} path=/v1/completions outcome=" in lines[0]
    assert "secret" not in log.read_text()


async def test_the_readmes_request_works_as_it_stands(cluster: LocalCluster) -> None:
    status = await whole(cluster)
    command = re.search(r"^curl .*?\]}'$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert command is not None
    text = command[0].replace("http://127.0.0.1:8000", cluster.base_url).replace("\\\n", " ")
    _, url, _, header, _, body = shlex.split(text.replace("SmolLM2-135M-Instruct", status["served_name"]))
    async with (
        aiohttp.ClientSession(raise_for_status=True) as session,
        session.post(url, data=body, headers=dict([header.split(": ")])) as response,
    ):
        assert (await response.text()).endswith("data: [DONE]\n\n")
