"""The compose file of one host comes up with a token alone, serves a chat, and loses a worker without a trace."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from openai import AsyncOpenAI

from tests.docker.client import TOKENS, stream_all
from tests.docker.conftest import ENGINE, IMAGE
from tests.docker.engine import docker
from tests.docker.hosts import SETTINGS, TOKEN, compose, tail

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]

FILE, PROJECT = "compose.yml", "one"
SERVING_S = 90.0


@pytest.fixture
def url(models: Path, tmp_path: Path) -> Iterator[str]:
    """The gateway's URL, of all that docker/compose.yml starts."""
    env_file = tmp_path / "one.env"
    settings = SETTINGS | {"GHOST_TOKEN": TOKEN, "GHOST_IMAGE": IMAGE, "GHOST_MODELS": str(models)}
    settings["GHOST_PUBLISH"] = "127.0.0.1:"  # a free port
    env_file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    compose(ENGINE, FILE, PROJECT, env_file, "up", "--detach", "--no-build")
    try:
        yield "http://" + docker(ENGINE, "port", f"{PROJECT}_gateway_1", "8000").split()[0]
    finally:
        compose(ENGINE, FILE, PROJECT, env_file, "down", "--volumes")


async def serving(url: str) -> None:
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
            assert time.monotonic() < end, f"{said}\n{tail(ENGINE, f'{PROJECT}_worker_1')}"
            await asyncio.sleep(0.1)


async def test_one_host_serves_a_chat_and_survives_the_loss_of_a_worker(url: str) -> None:
    await serving(url)
    async with AsyncOpenAI(base_url=url + "/v1", api_key=TOKEN, max_retries=0, timeout=60.0) as client:
        chat = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=8
        )
        assert chat.usage is not None
        assert chat.usage.completion_tokens > 0
    calm = await stream_all(url, TOKEN, "tiny", "calm")

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
        await asyncio.to_thread(docker, ENGINE, "exec", f"{PROJECT}_worker_1", *kill)

    hit = await stream_all(url, TOKEN, "tiny", "hit", kill_rank_1)
    print(f"\none host, a worker killed: longest stall {max(each.stall_s for each in hit):.2f} s")
    assert [len(each.tokens) for each in hit] == [TOKENS] * len(hit)
    assert [each.tokens for each in hit] == [each.tokens for each in calm]
    assert [each.digests for each in hit] == [each.digests for each in calm]
