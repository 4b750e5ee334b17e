"""Writes docs/img: the status page of a real cluster that is whole, that recovers, and that is degraded.

`python -m tests.screenshots`, with Debian's Chromium.
"""

import asyncio
import os
import re
import shutil
import signal
from pathlib import Path

from playwright.async_api import Page, async_playwright, expect

from services.cli.local import LocalCluster, ServeSettings
from services.cli.serve import fetch_model

FOLDER = Path(__file__).parents[1] / "docs" / "img"
SERVING_S = 300.0
STATE_MS = 60_000


async def main() -> None:
    """Take the three pictures."""
    FOLDER.mkdir(exist_ok=True)
    model = fetch_model("default")
    async with (
        LocalCluster(ServeSettings(port=0, allow_faults=True), model, print) as cluster,
        async_playwright() as playwright,
    ):
        await cluster.wait_serving(SERVING_S)
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"))
        context = await browser.new_context(viewport={"width": 1120, "height": 800}, device_scale_factor=1)
        page = await context.new_page()
        expect.set_options(timeout=STATE_MS)
        await page.goto(cluster.base_url)
        await take(page, cluster)
        await browser.close()


async def take(page: Page, cluster: LocalCluster) -> None:
    """One conversation through all three states."""
    supervisor = cluster.processes["workers"].pid
    state = page.locator("#state-text")
    await expect(state).to_have_text("Serving")
    await ask(page, "Why is the sky blue?", 160)
    await page.get_by_role("button", name="Kill rank 1").click()
    await expect(page.locator("#timeline > li").first).to_be_visible()
    await expect(page.locator(".turn.streaming")).to_have_count(0)
    await expect(state).to_have_text("Serving")
    await ask(page, "And why is it red in the evening?", 400)
    await page.screenshot(path=FOLDER / "healthy.png", full_page=True)
    os.kill(supervisor, signal.SIGSTOP)  # nobody is restarted
    try:
        for rank in (2, 0):
            await page.get_by_role("button", name=f"Kill rank {rank}").click()
            await expect(page.locator(f"#ranks li[data-key='{rank}']")).not_to_contain_text("serving")
        await expect(page.locator("#ranks .vacant")).to_have_count(1)
        await expect(page.locator("#under-way-text")).to_contain_text(re.compile(r"[1-9]\.\d+ s"))
        await page.screenshot(path=FOLDER / "recovering.png", full_page=True)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    await expect(state).to_have_text("Serving")
    await expect(page.locator(".turn.streaming")).to_have_count(0, timeout=3 * STATE_MS)
    os.kill(cluster.processes["store-0"].pid, signal.SIGKILL)
    await expect(state).to_contain_text("no parity store")
    await ask(page, "Thank you.", 48)
    await page.screenshot(path=FOLDER / "degraded.png", full_page=True)


async def ask(page: Page, text: str, tokens: int) -> None:
    """Ask, and wait for the answer's first words."""
    turns = await page.locator(".turn.assistant").count()
    await page.get_by_label("Tokens", exact=True).fill(str(tokens))
    await page.get_by_label("Message").fill(text)
    await page.keyboard.press("Enter")
    await expect(page.locator(".turn.assistant .text").nth(turns)).to_have_text(re.compile(".{40}", re.DOTALL))


if __name__ == "__main__":
    asyncio.run(main())
