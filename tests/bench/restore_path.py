"""What the worker's own way of restoring would take on GPUs: COMPUTED, from a dry run of it on fake ones.

python -m tests.bench.restore_path

The dry run is the worker's shadow, coder and NCCL communicator on a device that counts launches, copies, collectives
and waits (tests/worker/fake_cuda.py), of eight ranks of which one has lost its pages. Two windows of different size
give what a window takes and what a page adds. Python's own time a page is measured here, on this machine's processor:
all that the worker that decodes runs for it, from the plan's frame on, but for launches and bytes.
The rest is bytes over the rates of `projection`; beside it stands what that has as the least time.
"""

import asyncio
import ctypes
import gc
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._C import _distributed_c10d as c10d

from kernels.cuda import CudaCodec
from kernels.launch import Launch, Program
from services.coordinator.protection.restoration import PLAN_STRIPES
from services.worker.communicator.torch_dist import NcclCommunicator
from services.worker.device import CudaDevice, Device, HostDevice
from services.worker.engine.kv_pool import KVPool
from services.worker.shadow.coder import CudaCoder
from services.worker.shadow.exchange import Exchange
from services.worker.shadow.restore import Restorer
from shared import wire
from shared.messages import ParityShard, RestoreDone, RestorePlan, StripeRestore
from shared.transport import frames
from shared.transport.base import DEFAULT_LIMITS, GetShards, Outcome
from shared.transport.frames import Numbered, Reply
from shared.types import round_pages
from tests.bench.projection import Host, Model, recovery
from tests.worker import test_stream_order as order

TOKENS, PAGE_TOKENS = 1_048_576, 16
# Measured on an H100 in a virtual machine (docs/gpu.md).
LAUNCH_S = 25e-6  # of an operation of torch, by the host
MEMORY = 2.8e12  # bytes a second that the kernel moves, reads and writes together
# Assumed: that takes several GPUs.
COLLECTIVE_S = 40e-6  # NCCL's latency of a small all-to-all of eight ranks over NVLink
WAIT_S = 20e-6  # until a thread that waits for a stream goes on
PAGES = 8192
K = Host().devices


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


class _Nccl(NcclCommunicator):
    """One rank among eight, whose NCCL does nothing."""

    def __init__(self) -> None:
        super().__init__("nowhere:0", 0, K, 10.0)

    def _reach(self, address: str) -> Any:
        return c10d.HashStore()

    def _meet(self, store: object, cancelled: object) -> None: ...

    def _own_device(self) -> Device:
        return HostDevice()

    def _connect(self, store: object, timeout: object) -> Any:
        done = SimpleNamespace(wait=lambda: None, is_completed=lambda: True)
        return SimpleNamespace(alltoall_base=lambda *_: done, abort=lambda: None)


class _Pool(KVPool):
    """Pages of 64 bytes in tensors, as on a GPU: so little that no time is theirs."""

    def __init__(self, pages: int):
        super().__init__(pages=pages, layers=1, page_tokens=1, kv_heads=1, head_dim=8, dtype=torch.float32)
        self._host = None


class _Launches:
    """Runs nothing, so that all checksums are 0. What a launch takes is assumed."""

    device = 0

    def prepare(self, program: Program) -> None: ...

    def run(self, program: Program, launches: Iterable[Launch], stream: int) -> None:
        for _ in launches:
            pass

    def clear(self, address: int, length: int, stream: int) -> None:
        ctypes.memset(address, 0, length)


class _Stores:
    """Has all shards. The header frames of a request and its reply are made and read, as on a connection."""

    async def get(self, address: str, request: GetShards, into: Sequence[memoryview]) -> tuple[Outcome, ...]:
        frames.encode(Numbered(1, request))
        reply = frames.decode(frames.encode(Reply(1, (None,) * len(into)))[frames.PREFIX.size :], DEFAULT_LIMITS)
        assert isinstance(reply, Reply)
        return reply.outcomes


async def python_page_s(window: int) -> float:
    """Seconds of the processor that a worker's own code takes for a page that it decodes, launches and bytes apart.

    From the plans' frames to the reports' frames, in both of its threads, which take turns; windows of so many pages.
    """
    pool, device = _Pool(PAGES), HostDevice()
    device.round_bytes = window * pool.page_bytes
    coder = CudaCoder(CudaCodec(K, 1, _Launches()), device)  # type: ignore[arg-type]
    stores, loop, told = _Stores(), asyncio.get_running_loop(), list[bytes]()
    exchange = Exchange(_Nccl(), pool, device.round_bytes)
    shard = (ParityShard(K, "tcp://store:1", 0),)
    stripes = [StripeRestore(at, at.to_bytes(16, "big"), (0,), shard, (0,) * K) for at in range(PAGES)]
    plans = [
        wire.encode(RestorePlan.of(1, number, stripes[start : start + PLAN_STRIPES]))
        for number, start in enumerate(range(0, PAGES, PLAN_STRIPES))
    ]

    def report(done: RestoreDone) -> None:
        assert not done.failed, done.reason
        told.append(wire.encode(done))

    best = 1e9
    gc.freeze()  # as a worker does when all is loaded
    for _ in range(5):
        restorer = Restorer("g", coder, stores, loop, device)  # type: ignore[arg-type]
        began = time.process_time()
        for frame in plans:
            plan = wire.decode(frame)
            assert isinstance(plan, RestorePlan)
            restorer.prefetch(plan, 0, pool.page_bytes)
            await asyncio.to_thread(restorer.restore, plan, exchange, report)
        best = min(best, time.process_time() - began)
    exchange.end()
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


def window_pages() -> tuple[int, int]:
    """Bytes of a page of the model, and how many make a window on a GPU."""
    page = PAGE_TOKENS * Model().kv_bytes_token // Host().devices
    return page, round_pages(page, CudaDevice.round_bytes)


def compute(small: Counted, large: Counted, python_s: float) -> Path:
    """The whole context, window by window."""
    model, host = Model(), Host()
    k, (page, window), total = host.devices, window_pages(), TOKENS // PAGE_TOKENS
    windows, size = -(-total // window), window * page
    exchange, copy_in, decode = (k - 1) * size / host.nvlink, size / host.pcie, (k + 1) * size / MEMORY

    def calls(of: str) -> float:
        grows = (large.counts[of] - small.counts[of]) / (large.pages - small.pages)
        return small.counts[of] + grows * (window - small.pages)

    host_s = (calls("launches") + calls("copies in") + calls("copies out")) * LAUNCH_S
    host_s += calls("collectives") * COLLECTIVE_S + calls("waits") * WAIT_S
    device_s = max(exchange, copy_in) + decode
    least = recovery(model, host, TOKENS).parity_s
    return Path(windows, window, windows * device_s, windows * host_s, total * python_s, least)


def main() -> None:
    """Run, compute, print."""
    small, large = asyncio.run(dry_run(2)), asyncio.run(dry_run(order.PAGES))
    _, window = window_pages()
    page_s = asyncio.run(python_page_s(window))
    path = compute(small, large, page_s)
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
    console.print(f"Python: {1e6 * page_s:.1f} us a page, measured here in windows of {window} pages")


if __name__ == "__main__":
    main()
