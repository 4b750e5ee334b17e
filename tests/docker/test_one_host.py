"""The compose file of one host comes up with a token alone, serves a chat, and loses a worker without a trace."""

import asyncio
import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from openai import AsyncOpenAI

from tests.docker.client import TOKENS, stream_all
from tests.docker.conftest import ENGINE, IMAGE
from tests.docker.hosts import DOCKER, SETTINGS, TOKEN, compose, write_env

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]

SERVING_S = 90.0


Compose = Callable[..., str]


@pytest.fixture
def one(models: Path, tmp_path: Path) -> Iterator[Compose]:
    """All that docker/compose.yml starts, as a function that runs docker compose on it."""
    file = Path(shutil.copy(DOCKER / "compose.yml", tmp_path))
    secrets = {"GHOST_TOKEN": TOKEN, "GHOST_API_KEYS": TOKEN, "GHOST_OPERATOR_TOKEN": TOKEN}
    settings = SETTINGS | secrets | {"GHOST_IMAGE": IMAGE, "GHOST_MODELS": str(models)}
    settings["GHOST_PUBLISH"] = "127.0.0.1:"  # a free port
    write_env(tmp_path, settings)
    run = functools.partial(compose, ENGINE, file, "one")
    run("up", "--detach", "--no-build")
    try:
        yield run
    finally:
        run("down", "--volumes")


async def serving(one: Compose, url: str) -> None:
    """Wait until the gateway says that all is well."""
    end = time.monotonic() + SERVING_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5.0)) as session:
        while True:
            try:
                async with session.get(url + "/health") as response:
                    said = await response.text()
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError) as error:
                said = str(error)
            assert time.monotonic() < end, f"{said}\n{one('logs', '--tail', '15')}"
            await asyncio.sleep(0.1)


async def test_one_host_serves_a_chat_and_survives_the_loss_of_a_worker(one: Compose) -> None:
    url = "http://" + one("port", "gateway", "8000").strip()
    await serving(one, url)
    async with AsyncOpenAI(base_url=url + "/v1", api_key=TOKEN, max_retries=0, timeout=60.0) as client:
        chat = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=8
        )
        assert chat.usage is not None
        assert chat.usage.completion_tokens > 0
    calm = await stream_all([url], TOKEN, "tiny", "calm")

    async def kill_rank_1() -> None:
        """SIGKILL of a process in the workers' container, by its place in the status."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(url + "/v1/fault_tolerance/status") as response,
        ):
            workers = (await response.json())["workers"]
        pid = next(worker["pid"] for worker in workers if worker["rank"] == 1)
        kill = ["python3", "-c", f"import os; os.kill({pid}, 9)"]
        await asyncio.to_thread(one, "exec", "-T", "worker", *kill)

    hit = await stream_all([url], TOKEN, "tiny", "hit", kill_rank_1)
    print(f"\none host, a worker killed: longest stall {max(each.stall_s for each in hit):.2f} s")
    assert [len(each.tokens) for each in hit] == [TOKENS] * len(hit)
    assert [each.tokens for each in hit] == [each.tokens for each in calm]
    assert [each.digests for each in hit] == [each.digests for each in calm]
