"""The erasure code's speed beside its peers, in one run: `python -m tests.bench.kernels [--quick] [--out FOLDER]`.

CPU figures are measured, contenders side by side in many rounds, on one core: GB/s of the k source shards, and the
ratio to the peer in the same round; medians, as the machine is shared.
Peers: ISA-L called bare (its C function, pointers prepared beforehand), numpy's XOR, and a copy of as many bytes.
GPU figures are computed from the disassembly (kernels_roofline.py), and measured besides where there is a GPU.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from kernels import isal
from kernels.codec import DecodePlan, IsalCodec
from tests.bench.kernels_plot import plot
from tests.bench.kernels_roofline import rooflines
from tests.bench.kernels_sass import disassembler

PAGE, LARGE = 120 << 10, 8 << 20
_BEYOND_CACHES = 96 << 20  # bytes of stripes gone through, so that small pages come from memory as they do in use
Work = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """One contender beside one peer. memory: whether shards are in the CPU's cache or come from memory."""

    backend: str
    op: str
    k: int
    m: int
    shard_bytes: int
    gbps: float
    peer: str
    peer_gbps: float
    ratio: float
    memory: str = "memory"
    measured: bool = True
    target: float | None = None  # least ratio asked for by issue 3
    detail: dict[str, Any] | None = None


class Stripes:
    """Stripes [count, k + m, shard_bytes] and the contenders that encode or reconstruct them all."""

    def __init__(self, k: int, m: int, shard_bytes: int, count: int):
        self.codec = IsalCodec(k, m, threads=1)
        self.bytes = np.random.default_rng(1).integers(0, 256, (count, k + m, shard_bytes), dtype=np.uint8)
        self.count = count
        self._copy = np.zeros((count, k, shard_bytes), dtype=np.uint8)
        self.addresses = np.array([[s.ctypes.data for s in stripe] for stripe in self.bytes], dtype=np.uint64)
        for stripe in self.bytes:
            self.codec.encode(list(stripe[:k]), list(stripe[k:]))

    def contenders(self, op: str) -> dict[str, Work]:
        """op: encode, or reconstruct N for N lost data shards."""
        codec, k = self.codec, self.codec.k
        if op == "encode":
            tables, sources, targets = codec._encode, range(k), range(k, k + codec.m)
            plan = None
        else:
            lost = range(int(op.split()[1]))
            plan = codec.plan(set(range(k + codec.m)) - set(lost), lost)
            tables, sources, targets = codec._decode(plan), plan.sources, plan.targets
        stripes = [([stripe[s] for s in sources], [stripe[t] for t in targets]) for stripe in self.bytes]
        addresses = np.ascontiguousarray(self.addresses[:, [*sources, *targets]])
        found = {
            "isal": lambda: self._each(plan, stripes),
            "isal, batch": lambda: self._batch(plan, addresses),
            "isal bare": bare(tables, stripes, self.bytes.shape[2]),
            "memcpy": lambda: self._memcpy(stripes),
        }
        if len(targets) == 1 and codec.m == 1:
            found["numpy xor"] = lambda: [xor(*stripe) for stripe in stripes]
        return found  # type: ignore[return-value]

    def _memcpy(self, stripes: Sequence[Any]) -> None:
        for row, (sources, _) in enumerate(stripes):
            for i, source in enumerate(sources):
                np.copyto(self._copy[row, i], source)

    def _each(self, plan: DecodePlan | None, stripes: Sequence[Any]) -> None:
        for sources, targets in stripes:
            if plan is None:
                self.codec.encode(sources, targets)
            else:
                self.codec.reconstruct(plan, sources, targets)

    def _batch(self, plan: DecodePlan | None, addresses: Any) -> None:
        if plan is None:
            self.codec.encode_at(addresses, self.bytes.shape[2])
        else:
            self.codec.reconstruct_at(plan, addresses, self.bytes.shape[2])


def bare(tables: isal.Tables, stripes: Sequence[Any], length: int) -> Work:
    """ISA-L's own function on pointers made beforehand."""
    function, k, rows, coefficients = tables._encode, tables.columns, tables.rows, tables._tables
    pointers = []
    for sources, targets in stripes:
        shards = isal._ffi.new(tables._shards, [isal._read(shard) for shard in (*sources, *targets)])
        pointers.append((shards, shards + k))

    def work() -> None:
        for sources, targets in pointers:
            function(length, k, rows, coefficients, sources, targets)

    return work


def xor(sources: Sequence[Any], targets: Sequence[Any]) -> None:
    np.bitwise_xor(sources[0], sources[-1], out=targets[0])
    for source in sources[1:-1]:
        np.bitwise_xor(targets[0], source, out=targets[0])


def race(contenders: dict[str, Work], seconds: float) -> dict[str, npt.NDArray[np.float64]]:
    """Return the seconds of each in every round, until the time is up. Their order differs: caches favour the next."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    until, order = time.perf_counter() + seconds, np.random.default_rng(2)
    while time.perf_counter() < until or len(took[next(iter(took))]) < 5:
        for name in order.permutation(list(contenders)):
            began = time.perf_counter()
            contenders[name]()
            took[name].append(time.perf_counter() - began)
    return {name: np.array(rounds) for name, rounds in took.items()}


def measure(k: int, m: int, shard_bytes: int, memory: str, ops: Sequence[str], seconds: float) -> list[Row]:
    stripe_bytes = (k + m) * shard_bytes
    count = max(1, _BEYOND_CACHES // stripe_bytes) if memory == "memory" else 1
    stripes = Stripes(k, m, shard_bytes, count)
    races = {f"{op}/{name}": work for op in ops for name, work in stripes.contenders(op).items()}
    if memory == "cache":  # each is too short to be timed alone
        races = {name: (lambda work=work: [work() for _ in range(50)]) for name, work in races.items()}  # type: ignore[misc]
        count = 50
    took = race(races, seconds * len(ops))
    speed = {name: count * k * shard_bytes / float(np.median(rounds)) / 1e9 for name, rounds in took.items()}
    rows = []

    def row(name: str, peer: str, target: float | None = None) -> None:
        op, backend = name.split("/")
        label = peer.split("/")[1] if peer.startswith(op) else "isal, " + peer.split("/")[0]
        ratio = round(float(np.median(took[peer] / took[name])), 3)
        gbps, peer_gbps = round(speed[name], 2), round(speed[peer], 2)
        rows.append(Row(backend, op, k, m, shard_bytes, gbps, label, peer_gbps, ratio, memory, target=target))

    is_small, is_promised = shard_bytes == PAGE, k == 8 and m <= 2
    for op in ops:
        promised = is_promised and op == "encode" and (memory == "memory")
        row(f"{op}/isal", f"{op}/isal bare", (0.8 if is_small else 0.95) if promised else None)
        if is_small and memory == "memory":
            row(f"{op}/isal, batch", f"{op}/isal bare")
        for peer in ("numpy xor", "memcpy"):
            if f"{op}/{peer}" in races:
                row(f"{op}/isal", f"{op}/{peer}")
    if m == 1 and "reconstruct 1" in ops:
        row("reconstruct 1/isal", "encode/isal", 0.9 if k == 8 else None)
    return rows


def on_cpu(seconds: float, quick: bool) -> list[Row]:
    rows = []
    codes = ((8, 1), (8, 2)) if quick else ((2, 1), (3, 1), (3, 2), (4, 2), (8, 1), (8, 2), (8, 4), (16, 2))
    for k, m in codes:
        ops = ["encode", *(f"reconstruct {lost}" for lost in range(1, min(m, 2) + 1))]
        for shard_bytes, memory in ((LARGE, "memory"), (PAGE, "memory"), (PAGE, "cache")):
            rows += measure(k, m, shard_bytes, memory, ops, seconds)
    return rows


def computed() -> list[Row]:
    """The CUDA kernel by its disassembly, beside the least bytes at the full bandwidth."""
    rows = []
    for op, k, m, roofline in rooflines():
        kernel, speed, best = roofline.kernel, roofline.source_bytes_per_second / 1e9, roofline.best / 1e9
        detail = {
            "device": roofline.device.name,
            "limit": roofline.limit,
            "moved_over_least": kernel.moved / kernel.body_bytes,
            "instructions_per_byte": round(len(kernel.body) / kernel.body_bytes, 2),
            "registers": kernel.registers,
            "spilled_bytes": kernel.spilled,
            "resident_threads": kernel.threads,
            "bytes_in_flight": kernel.bytes_in_flight,
            "instructions": dict(kernel.count("").most_common(12)),
            "microseconds_per_page_stripe": round(k * PAGE / speed / 1e3, 3),
        }
        peer = f"{roofline.device.name}, least bytes at full bandwidth"
        ratio = round(speed / best, 3)
        rows.append(Row("cuda", op, k, m, PAGE, round(speed), peer, round(best), ratio, measured=False, detail=detail))
    return rows


def on_gpu() -> list[Row]:
    """Where there is a GPU: against a copy of as many bytes."""
    from kernels.codec import make_codec
    from kernels.errors import CodecError

    rows = []
    try:
        import cupy

        make_codec(1, 1, "cuda")
    except (ImportError, CodecError):
        return []
    from tests.bench.gpu_time import took

    for k, m in ((8, 1), (8, 2), (8, 4)):
        for shard_bytes in (PAGE, LARGE):
            codec, count = make_codec(k, m, "cuda"), (1 << 30) // (shard_bytes * (k + m))
            pool = cupy.zeros((count, k + m, shard_bytes), dtype=cupy.uint8)
            half = pool.ravel()[: pool.size // 2], pool.ravel()[pool.size // 2 :][: pool.size // 2]
            shards = np.arange(count * (k + m), dtype=np.uint64).reshape(count, k + m)
            addresses = np.uint64(pool.data.ptr) + shards * np.uint64(shard_bytes)
            peer = took(lambda: cupy.copyto(*half)).gpu  # noqa: B023
            sums = cupy.empty((count, k + m), dtype=cupy.uint64)
            for op, address in (("encode", 0), ("encode, checksums", sums.data.ptr)):
                ours = took(lambda: codec.encode_at(addresses, shard_bytes, sums=address))  # noqa: B023
                gbps, copies = (count * k * shard_bytes / seconds / 1e9 for seconds in (ours.gpu, peer))
                row = Row("cuda", op, k, m, shard_bytes, gbps, "copy of as many bytes", copies, gbps / copies)
                rows.append(replace(row, target=0.8, detail={"host_us": 1e6 * ours.host}))
    return rows


def show(rows: Sequence[Row]) -> None:
    table = Table(title="Erasure code: GB/s of the k source shards")
    for column in ("backend", "op", "k+m", "shard", "from", "GB/s", "peer", "GB/s", "ratio", "wanted", ""):
        table.add_column(column, justify="right" if column in ("GB/s", "ratio", "wanted") else "left")
    for row in rows:
        if row.backend != "cuda" and (row.k != 8 or row.m > 2):
            continue  # those are in the file
        wanted = f"{row.target}" if row.target else ""
        detail = row.detail or {}
        note = f"computed; {detail['limit']}, {detail['instructions_per_byte']} instr/B" if not row.measured else ""
        if "host_us" in detail:
            note = f"asked for in {detail['host_us']:.0f} us"
        shard = f"{row.shard_bytes >> 10} KiB" if row.shard_bytes < 1 << 20 else f"{row.shard_bytes >> 20} MiB"
        cells = (row.backend, row.op, f"{row.k}+{row.m}", shard, row.memory if row.measured else "", f"{row.gbps:.1f}")
        style = "red" if row.target and row.ratio < row.target else None
        table.add_row(*cells, row.peer, f"{row.peer_gbps:.1f}", f"{row.ratio:.2f}", wanted, note, style=style)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only 8+1 and 8+2, half a second each")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for kernels.json and .png")
    options = parser.parse_args()
    rows = on_cpu(0.5 if options.quick else 1.5, options.quick)
    rows += computed() if disassembler() else []
    rows += on_gpu()
    show(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    machine["cpu"] = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        machine["cpu"],
    )
    lines = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    head = json.dumps({"machine": machine, "library": Path(isal.library_path()).name})
    (options.out / "kernels.json").write_text(f'{head[:-1]}, "rows": [\n  {lines}\n]}}\n')
    plot(rows, options.out / "kernels.png")


if __name__ == "__main__":
    main()
