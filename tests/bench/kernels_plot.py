"""kernels.png: measured on the CPU to the left, computed for GPUs to the right."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.kernels import Row

_COLOURS = {"isal": "#2b6cb0", "isal bare": "#a0aec0", "numpy xor": "#d69e2e", "memcpy": "#cbd5e0"}


def plot(rows: "Sequence[Row]", path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=[3, 2])
    ours = [r for r in rows if r.backend == "isal" and r.k == 8 and r.m <= 2 and r.memory == "memory"]
    groups = list(dict.fromkeys((r.op, r.m, r.shard_bytes) for r in ours))
    for place, group in enumerate(groups):
        here = [r for r in ours if (r.op, r.m, r.shard_bytes) == group]
        bars = {"isal": here[0].gbps} | {r.peer: r.peer_gbps for r in here if r.peer in _COLOURS}
        for i, (name, gbps) in enumerate(bars.items()):
            left.bar(place + (i - 1.5) * 0.2, gbps, 0.19, color=_COLOURS[name], label=name if not place else None)
    names = [
        f"{op.replace(' ', chr(10))}\n8+{m}\n{f'{size >> 20} MiB' if size >> 20 else f'{size >> 10} KiB'}"
        for op, m, size in groups
    ]
    left.set_xticks(range(len(groups)), names, fontsize=7)
    left.set_ylabel("GB/s of the 8 source shards")
    left.set_title("CPU, one core, shards from memory: measured", fontsize=10)
    left.legend(fontsize=8, frameon=False)

    gpu = [r for r in rows if r.backend == "cuda" and not r.measured and r.detail]
    cases = list(dict.fromkeys((r.op, r.k, r.m) for r in gpu))
    for i, device in enumerate(dict.fromkeys(r.detail["device"] for r in gpu if r.detail)):
        here = [r for r in gpu if r.detail and r.detail["device"] == device]
        places = [cases.index((r.op, r.k, r.m)) + (i - 0.5) * 0.4 for r in here]
        colour = ("#2f855a", "#276749")[i % 2]
        right.barh(places, [r.peer_gbps / 1e3 for r in here], 0.36, fill=False, edgecolor="#a0aec0")
        right.barh(places, [r.gbps / 1e3 for r in here], 0.36, color=colour, label=str(device))
    right.set_yticks(range(len(cases)), [f"{op} {k}+{m}" for op, k, m in cases], fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("TB/s of the source shards; outlines: least bytes at full bandwidth")
    right.set_title("GPU: computed from the disassembly, not measured", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
