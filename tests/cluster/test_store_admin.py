"""The store's admin endpoint against its own OpenAPI document, and `ghostserve store` against a real store."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.transport.client import BulkClient
from tests.cluster.store_harness import DEADLINE_S, StoreCoordinator, StoreProcess, keys, store_process, stripes

TOKEN = "a token of the cluster"


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[StoreProcess]:
    group = f"group-{os.urandom(4).hex()}"
    async with (
        StoreCoordinator(group, token=TOKEN) as coordinator,
        store_process(coordinator.url, redis_url, "--token", TOKEN, "--capacity-mb", "64") as store,
    ):
        info = await coordinator.next_store()
        async with await BulkClient.connect(info.bulk_address, token=TOKEN, timeout=DEADLINE_S) as client:
            put, payloads = stripes(group, 5)
            assert await client.put(put, payloads, timeout=DEADLINE_S) == (None,) * 5
        store.some_key = keys(put)[0].hex()
        yield store


async def ghostserve(*arguments: str, token: str = TOKEN) -> tuple[int | None, str, str]:
    """Exit code, output and errors of a command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", *arguments),
        env=os.environ | {"GHOST_TOKEN": token, "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE_S):
        output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_the_endpoint_is_as_its_openapi_document_says(store: StoreProcess, tmp_path: Path) -> None:
    """Schemathesis calls every operation with valid and invalid input, and compares answers with the document."""
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).parent / "schemathesis", "run", store.admin_url + "/openapi.json"),
        *("--header", f"Authorization: Bearer {TOKEN}", "--exclude-path", "/admin/drain"),
        *("--max-examples", "15", "--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert (await store.admin("GET", "/live"))[0] == 200


async def test_the_command_line_shows_scrubs_and_drains(store: StoreProcess) -> None:
    at = ("--url", store.admin_url)
    code, output, _ = await ghostserve("store", "status", *at, "--json")
    assert (code, json.loads(output)["stripes"]) == (0, 5)
    code, output, _ = await ghostserve("store", "stripes", *at, "--limit", "3")
    assert (code, output.count("3+1")) == (0, 3)
    code, output, _ = await ghostserve("store", "stripes", *at, "--key", store.some_key)
    assert (code, output.count(store.some_key)) == (0, 1)
    code, output, _ = await ghostserve("store", "scrub", *at, "--json")
    assert code == 0
    assert json.loads(output)["checked"] == 5
    code, output, _ = await ghostserve("store", "drain", *at, "--json")
    assert (code, json.loads(output)) == (0, {"draining": True, "shards": 5})
    assert (await store.admin("GET", "/admin/status", token=TOKEN))[1]["draining"] is True


async def test_what_goes_wrong_is_said_in_a_line_and_the_exit_code(store: StoreProcess) -> None:
    code, _, errors = await ghostserve("store", "status", "--url", store.admin_url, token="wrong")
    assert (code, errors.count("\n")) == (1, 1)
    assert "401" in errors
    _, metrics = await store.admin("GET", "/metrics", token=TOKEN)
    assert 'ghostserve:store_refused_requests_total{code="401"} 1.0' in metrics
    code, _, errors = await ghostserve("store", "stripes", "--url", store.admin_url, "--key", "xyz")
    assert code == 1
    assert "page_key must be" in errors
    code, _, errors = await ghostserve("store", "status", "--url", "http://127.0.0.1:1")
    assert code == 1
    assert "no parity store at" in errors
