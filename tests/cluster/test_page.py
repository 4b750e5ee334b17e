"""The status page in a real browser: Debian's Chromium, headless. Without it these tests are skipped, and say so."""

import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import axe_core_python
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Route, async_playwright, expect
from pydantic import SecretStr

from services.cli.local import LocalCluster
from shared.types import ClusterStatus, RecoveryRecord, StoreInfo, WorkerStatus
from tests.cluster.conftest import whole
from tests.cluster.fake_coordinator import FakeCoordinator, a_status
from tests.cluster.test_gateway import a_gateway
from tests.tiny_tokenizer import make_tokenizer_dir

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
DEADLINE_MS = 30_000

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(not CHROMIUM, reason="NO CHROMIUM: THE STATUS PAGE IS NOT TESTED (apt-get install chromium)"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """A browser with an empty profile."""
    expect.set_options(timeout=DEADLINE_MS)
    async with async_playwright() as playwright:
        yield (running := await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS)))
        await running.close()


@asynccontextmanager
async def a_page(browser: Browser, **settings: Any) -> AsyncIterator[Page]:
    """A page with nothing remembered. No script of it may fail, and nothing may be loaded from elsewhere."""
    async with await browser.new_context(**settings) as context:
        page = await context.new_page()
        page.set_default_timeout(DEADLINE_MS)
        problems: list[str] = []
        hosts: set[str] = set()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda told: problems.append(told.text) if "Content Security" in told.text else None)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
        yield page
        assert problems == []
        assert hosts == {"127.0.0.1"}


async def accessible(page: Page) -> None:
    """Raise AssertionError if axe-core finds anything serious."""
    await page.evaluate(AXE)
    found = await page.evaluate("axe.run()")
    serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious] == []


async def test_a_rank_killed_from_the_page_while_its_chat_streams_changes_no_letter(
    cluster: LocalCluster, browser: Browser
) -> None:
    status = await whole(cluster)
    fixed = {"seed": 11, "temperature": 1.0, "ignore_eos": True}
    body: dict[str, Any] = {}

    async def fix_the_dice(route: Route) -> None:
        body.update(json.loads(route.request.post_data or "{}") | fixed)
        await route.continue_(post_data=json.dumps(body))

    async with a_page(browser) as page:
        await page.route("**/v1/chat/completions", fix_the_dice)
        await page.goto(cluster.base_url)
        await expect(page.locator("#state")).to_have_attribute("data-level", "good")
        await page.get_by_label("Tokens", exact=True).fill("400")
        await page.get_by_label("Message").fill("the quick brown fox")
        await page.keyboard.press("Enter")
        answer = page.locator(".turn.assistant")
        await expect(answer.locator(".text")).to_have_text(re.compile(".{100}", re.DOTALL))
        newest = max((each["started"] for each in status["recoveries"]), default=0)
        await page.get_by_role("button", name="Kill rank 1").click()
        await expect(page.locator(f"#timeline > li:first-child:not([data-key='{newest}'])")).to_be_visible()
        assert await answer.get_attribute("data-outcome") is None, "the chat ended before the rank was lost"
        await expect(page.locator("#timeline > li").first).to_contain_text("Rank 1 lost")
        await expect(answer).to_have_attribute("data-outcome", "done", timeout=120_000)
        shown = await answer.locator(".text").text_content()
    before = {worker["name"] for worker in status["workers"] if worker["rank"] == 1}
    assert before.isdisjoint(worker["name"] for worker in (await whole(cluster))["workers"])
    async with aiohttp.ClientSession() as session:
        url = cluster.base_url + "/v1/chat/completions"
        async with session.post(url, json=body | {"stream": False}) as response:
            assert (await response.json())["choices"][0]["message"]["content"] == shown


@pytest.fixture(scope="module")
def status(tmp_path_factory: pytest.TempPathFactory) -> ClusterStatus:
    """A group of three with a spare and a store that has recovered once."""
    model = make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))
    places: tuple[int | None, ...] = (0, 1, 2, None)
    return replace(
        a_status(str(model), 400, (2,)),
        workers=tuple(
            WorkerStatus(f"worker-{place}", "host", 100 + place, "cpu", rank, "spare" if rank is None else "member")
            for place, rank in enumerate(places)
        ),
        stores=(StoreInfo("store-0", "life", "tcp://127.0.0.1:1", "http://127.0.0.1:2", 1 << 30),),
        recoveries=(RecoveryRecord(1, "rank 1: gone", (1,), 9.0, 0.01, 0.01, 0.1, 0.2, 9.3, 20, 5, 1 << 20, 1, 0.1),),
        now=10.0,
        stripes_protected=50,
        pages_held=50,
    )


async def test_the_page_says_in_words_how_things_are(status: ClusterStatus, browser: Browser) -> None:
    async with FakeCoordinator(status) as coordinator, a_gateway(coordinator) as gateway, a_page(browser) as page:
        await gateway.until_health(200)
        await page.goto(gateway.url)
        await expect(page.locator("#state-text")).to_have_text("Serving")
        await expect(page.locator("#can-lose")).to_have_text("Can lose 1 rank now")
        await expect(page.get_by_role("button", name="Kill rank 1")).to_be_hidden()
        await coordinator.push_status(
            state="forming", detail="waiting for 1 more worker(s); 0 loading", can_lose=0, recovering_since=9.5,
            workers=(status.workers[0], status.workers[2]),
        )  # fmt: skip
        await expect(page.get_by_role("status")).to_contain_text("Recovering: waiting for 1 more worker")
        await expect(page.locator("#ranks li").nth(1)).to_contain_text("lost, vacant")
        await expect(page.locator("#under-way")).to_be_visible()
        await accessible(page)
        await coordinator.push_status(
            state="serving", workers=status.workers, recovering_since=None, stores=(), stripes_unprotected=9,
            unprotected_reason="no parity store is connected",
        )  # fmt: skip
        await expect(page.locator("#state-text")).to_have_text("Serving, unprotected: no parity store")
        await expect(page.locator("#can-lose")).to_have_text("Can lose no rank now")
        await accessible(page)
        await coordinator.stop()
        await expect(page.locator("#state-text")).to_contain_text("No coordinator")
        await coordinator.start()
        await expect(page.locator("#state-text")).to_have_text("Serving, unprotected: no parity store")


async def test_the_page_of_a_hosted_engine_names_it_and_offers_no_chat(status: ClusterStatus, browser: Browser) -> None:
    hosted = replace(status, engine="vLLM 0.32.0")
    async with FakeCoordinator(hosted) as coordinator, a_gateway(coordinator) as gateway, a_page(browser) as page:
        await gateway.until_health(200)
        await page.goto(gateway.url)
        await expect(page.locator("#model")).to_contain_text("vLLM 0.32.0")
        await expect(page.get_by_label("Message")).to_be_hidden()
        await accessible(page)


async def test_a_key_is_asked_for_and_kept_in_this_tab_only(status: ClusterStatus, browser: Browser) -> None:
    async with (
        FakeCoordinator(status) as coordinator,
        a_gateway(coordinator, api_keys=SecretStr("k"), operator_token=SecretStr("secret-1")) as gateway,
        a_page(browser) as page,
    ):
        await page.goto(gateway.url)
        for key in ("k", "secret-1"):
            await expect(page.get_by_label("Operators' token")).to_be_focused()
            await page.keyboard.type(key)
            await page.keyboard.press("Enter")
            if key == "k":
                await expect(page.locator("#key-problem")).to_have_text("This token is not accepted.")
                await accessible(page)
        await expect(page.locator("#state-text")).to_have_text("Serving")
        await page.reload()
        await expect(page.locator("#state-text")).to_have_text("Serving")
        assert await page.evaluate("localStorage.length + document.cookie.length") == 0


@pytest.mark.parametrize(("scheme", "width"), [("light", 1180), ("dark", 1180), ("light", 360)])
async def test_everyone_can_use_the_page(status: ClusterStatus, browser: Browser, scheme: str, width: int) -> None:
    async with (
        FakeCoordinator(status) as coordinator,
        a_gateway(coordinator, allow_faults=True) as gateway,
        a_page(browser, color_scheme=scheme, viewport={"width": width, "height": 800}) as page,
    ):
        await gateway.until_health(200)
        await page.goto(gateway.url)
        await expect(page.locator("#timeline > li")).to_have_count(1)
        await accessible(page)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        reached = []
        for _ in range(12):
            await page.keyboard.press("Tab")
            reached.append(await page.evaluate("(here => here.textContent.trim() || here.id)(document.activeElement)"))
        assert [each for each in reached if each.startswith("Kill")] == ["Kill rank 0", "Kill rank 1", "Kill rank 2"]
        assert {"prompt", "max-tokens", "Send"} <= set(reached)


async def test_faults_are_there_only_where_they_are_allowed(status: ClusterStatus) -> None:
    async with FakeCoordinator(status) as coordinator, a_gateway(coordinator) as gateway:
        answered, _, _ = await gateway.post("/v1/fault_tolerance/faults", {"fault": "kill", "worker": "worker-1"})
        assert answered == 404
    async with FakeCoordinator(status) as coordinator, a_gateway(coordinator, allow_faults=True) as gateway:
        await gateway.until_health(200)
        for body, expected in (
            ({"fault": "kill", "worker": "nobody"}, 404),
            ({"fault": "melt", "worker": "worker-1"}, 400),
            ({"fault": "kill"}, 400),
        ):
            answered, _, _ = await gateway.post("/v1/fault_tolerance/faults", body)
            assert answered == expected, body


async def test_the_page_may_load_nothing_from_elsewhere(status: ClusterStatus) -> None:
    async with FakeCoordinator(status) as coordinator, a_gateway(coordinator) as gateway:
        async with gateway.http.get(gateway.url + "/") as response:
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            text = await response.text()
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text
        for name in ("app.js", "style.css", "icon.svg"):
            async with gateway.http.get(f"{gateway.url}/page/{name}") as response:
                assert response.status == 200
        async with gateway.http.get(gateway.url + "/page/%2e%2e/app.py") as response:
            assert response.status == 404
