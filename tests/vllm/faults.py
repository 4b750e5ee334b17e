"""A worker that breaks when a test says so: by an order in a folder, or by a token in a prompt.

Named to vLLM by --worker-cls instead of GhostCpuWorker, so that nothing of this is in what is served.
"""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from services.vllm.pages import BlockPages
from services.vllm.worker import GhostCpuWorker
from services.worker.agent import app as agent
from services.worker.memory import Ids, Rows
from services.worker.shadow import copies
from tests.vllm.orders import CRASH, FOLDER, ON_ALL, ON_ONE, ONCE, SLOW_S


class FaultyWorker(GhostCpuWorker):
    """As GhostCpuWorker, but for its faults."""

    def execute_model(self, scheduler_output: Any) -> Any:
        self._hang_if_told()
        if scheduler_output.total_num_scheduled_tokens > 1 and _ordered("slow"):
            time.sleep(SLOW_S)
        self._spoil(scheduler_output)
        return super().execute_model(scheduler_output)

    def pages(self) -> BlockPages:
        pages = super().pages()
        pages.__class__ = ForgetfulPages
        return pages

    def _hang_if_told(self) -> None:
        order = Path(os.environ[FOLDER], f"hang-{self.rank}")
        if order.exists():
            order.unlink()
            threading.Event().wait()

    def _spoil(self, scheduler_output: Any) -> None:
        spoilt: dict[str, int] = self.__dict__.setdefault("spoilt", {})
        known = getattr(scheduler_output, "ghost_known", ())  # not in the steps of the warm-up
        news = [*scheduler_output.scheduled_new_reqs, *(each.request for each in known)]
        for new in news:
            for token in (ON_ALL, ON_ONE, CRASH, ONCE):
                if token in (new.prompt_token_ids or ()):
                    spoilt[new.req_id] = token
        found = {spoilt[each] for each in scheduler_output.num_scheduled_tokens if each in spoilt}
        if ONCE in found and "once" not in self.__dict__:
            self.__dict__["once"] = True
            raise ValueError("a spoilt request, this once")
        if ON_ALL in found:
            raise ValueError("a spoilt request")
        if ON_ONE in found and self.rank == 1:
            raise torch.OutOfMemoryError("a request that is too large")
        if CRASH in found and self.rank == 2:
            os._exit(11)


class ForgetfulPages(BlockPages):
    """Where told so, what was decoded, or copied, is not written."""

    def wrote(self, pages: Ids, content: Rows, /) -> None:
        if not _ordered("forget"):
            super().wrote(pages, content)


def _ordered(order: str) -> bool:
    return Path(os.environ[FOLDER], order).exists()


async def _held_copy(*asked: Any) -> Any:
    """Copy pages once nothing holds them. The loop goes on: this worker's heart beats."""
    while _ordered("hold"):
        await asyncio.sleep(0.01)
    return await copies.copy_pages(*asked)


agent.copy_pages = _held_copy
