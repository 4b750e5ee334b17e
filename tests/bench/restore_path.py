"""What the worker's own way of restoring would take on GPUs: COMPUTED, from a dry run of it on fake ones.

python -m tests.bench.restore_path

The dry run is the worker's shadow, coder and NCCL communicator on a device that counts launches, copies, collectives
and waits (tests/worker/fake_cuda.py), of eight ranks of which one has lost its pages. Two windows of different size
give what a window takes and what a page adds. Python's own time a page is measured here, on this machine's processor.
The rest is bytes over the rates of `projection`; beside it stands what that has as the least time.
"""

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kernels.codec import make_codec
from services.worker.device import CudaDevice, HostDevice
from services.worker.shadow.coder import HostCoder
from services.worker.shadow.exchange import Exchange
from services.worker.shadow.parity_reader import Stored
from services.worker.shadow.restore import Restorer
from shared.messages import ParityShard, RestorePlan, StripeRestore
from shared.types import round_pages
from tests.bench.projection import Host, Model, recovery
from tests.worker import test_stream_order as order

TOKENS, PAGE_TOKENS = 1_048_576, 16
# Assumed, not measured: there is no GPU here.
LAUNCH_S = 7e-6  # of an operation of torch, by the host
COLLECTIVE_S = 40e-6  # NCCL's latency of a small all-to-all of eight ranks over NVLink
WAIT_S = 20e-6  # until a thread that waits for a stream goes on
MEMORY = 2.5e12  # bytes a second that a copy in the memory of an H100 moves, reads and writes together
PAGES = 1000


@dataclass(frozen=True, slots=True)
class Counted:
    """What the rank that decodes asks of its device for one window of so many pages."""

    pages: int
    counts: Counter[str]


async def dry_run(pages: int) -> Counted:
    """Protect and restore some pages on eight fake GPUs, as one window."""
    order.K, order.M = 8, 1
    ranks = order.Ranks()
    try:
        places, keys = [*range(pages)], [bytes([place]) * 16 for place in range(pages)]
        content = torch.zeros(pages * 4 * order.PAGE_TOKENS, 2, 8)
        for rank in ranks.ranks:
            await ranks.run(rank, partial(rank.step, 1, places, content))
        await ranks.protect(places, keys, 1)
        ranks.world.by_thread.clear()
        await ranks.restore(places, keys)
        thread = ranks.world.line(ranks.ranks[order.LOST].shadow._thread)
        return Counted(pages, ranks.world.by_thread[thread])
    finally:
        await asyncio.to_thread(ranks.close)


@dataclass
class _Alone:
    """A communicator of one rank among eight, which receives nothing: for Python's own time."""

    rank: int = 0
    size: int = 8

    def all_to_all(self, *_: Any) -> None: ...
    def check(self) -> None: ...


@dataclass
class _Pages:
    page_bytes: int = 64
    memory: Any = field(default_factory=lambda: np.zeros((8 * PAGES, 64), dtype=np.uint8))

    def page(self, page_id: int) -> Any:
        return self.memory[page_id]

    def wrote(self, page_id: int, content: Any) -> None: ...
    def empty(self, count: int) -> Any:
        return np.empty((count, 64), dtype=np.uint8)


class _Nothing(HostCoder):
    """Decodes nothing."""

    def decode(self, plan: Any, sources: Any, targets: Any) -> list[int]:
        return [0] * len(targets)


def python_page_s() -> float:
    """Seconds that the restorer's own code takes for a page, beside what it asks of the device."""
    coder, pool, parity = _Nothing(make_codec(8, 1)), _Pages(), (ParityShard(8, "", 0),)
    stripes = tuple(StripeRestore(at, at.to_bytes(16, "big"), (0,), parity, (0,) * 8) for at in range(PAGES))
    row = np.zeros(64, dtype=np.uint8)
    best = 1e9
    for _ in range(5):
        restorer: Any = Restorer("g", coder, None, None, HostDevice())  # type: ignore[arg-type]
        read = {stripe.key: Stored(deque(), 1, {8: row}) for stripe in stripes}
        restorer._parity.take = lambda _, read=read: read
        exchange = Exchange(_Alone(), pool, PAGES * 64)  # type: ignore[arg-type]
        began = time.perf_counter()
        restorer.restore(RestorePlan.of(1, 1, stripes), exchange, lambda _: None)
        best = min(best, time.perf_counter() - began)
    return best / PAGES


@dataclass(frozen=True, slots=True)
class Path:
    """One lost rank's restoration."""

    windows: int
    pages: int  # of a window
    device_s: float
    calls_s: float
    python_s: float
    least_s: float

    @property
    def seconds(self) -> float:
        """If all that the host does for a window is hidden behind what the device does for it: the slower counts."""
        return max(self.device_s, self.calls_s + self.python_s)

    @property
    def worst_s(self) -> float:
        """If nothing the host does were hidden behind the device."""
        return self.device_s + self.calls_s + self.python_s


def compute(small: Counted, large: Counted, python_s: float) -> Path:
    """The whole context, window by window."""
    model, host = Model(), Host()
    k, page = host.devices, PAGE_TOKENS * model.kv_bytes_token // host.devices
    window, total = round_pages(page, CudaDevice.round_bytes), TOKENS // PAGE_TOKENS
    windows, size = -(-total // window), window * page
    exchange, copy_in = (k - 1) * size / host.nvlink, size / host.pcie
    decode, apart = (k + 1) * size / MEMORY, 2 * (k - 1) * size / MEMORY  # what NCCL brought is put apart by source

    def calls(of: str) -> float:
        grows = (large.counts[of] - small.counts[of]) / (large.pages - small.pages)
        return small.counts[of] + grows * (window - small.pages)

    host_s = (calls("launches") + calls("copies in") + calls("copies out")) * LAUNCH_S
    host_s += calls("collectives") * COLLECTIVE_S + calls("waits") * WAIT_S
    device_s = max(exchange, copy_in) + decode + apart
    least = recovery(model, host, TOKENS).parity_s
    return Path(windows, window, windows * device_s, windows * host_s, total * python_s, least)


def main() -> None:
    """Run, compute, print."""
    small, large = asyncio.run(dry_run(2)), asyncio.run(dry_run(order.PAGES))
    path = compute(small, large, python_page_s())
    counted = Table(title="COUNTED in the dry run: what the rank that decodes asks of its device for one window")
    for column in ("pages", "launches", "copies in", "copies out", "collectives", "waits"):
        counted.add_column(column, justify="right")
    for each in (small, large):
        counted.add_row(str(each.pages), *(str(each.counts[str(column.header)]) for column in counted.columns[1:]))
    told = Table(title=f"COMPUTED: {TOKENS:,} tokens of Llama-3-70B, one of eight ranks lost, seconds")
    for column in (
        "windows",
        "pages each",
        "device",
        "calls",
        "Python",
        "path",
        "path, nothing hidden",
        "least",
        "ratio",
    ):
        told.add_column(column, justify="right")
    seconds = (path.device_s, path.calls_s, path.python_s, path.seconds, path.worst_s, path.least_s)
    ratio = f"{path.seconds / path.least_s:.2f} to {path.worst_s / path.least_s:.2f}"
    told.add_row(str(path.windows), str(path.pages), *(f"{each:.2f}" for each in seconds), ratio)
    console = Console(width=120)
    console.print(counted)
    console.print(told)


if __name__ == "__main__":
    main()
