"""How costs grow, drawn: a step of the coordinator by streams, context and pages; one long sequence by its length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, NullFormatter

PHASES = {
    "detect_s": "#a0aec0",
    "regroup_s": "#d69e2e",
    "weights_s": "#805ad5",
    "restore_s": "#2b6cb0",
    "recompute_s": "#38a169",
}


def plot_scale(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: median and p99 of a step by its streams, by their context, and by the pages cached beside."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4), sharey=True)
    most, usual = max(row["streams"] for row in rows), _commonest([row["context"] for row in rows])
    for axes, by, label in zip(
        panels,
        ("streams", "context", "cached"),
        ("streams that decode", f"tokens of context of {most:,} streams", "pages cached beside"),
        strict=True,
    ):
        fixed = {"streams": most, "context": usual, "cached": 0}
        del fixed[by]
        chosen = sorted(
            (row for row in rows if all(row[name] == value for name, value in fixed.items() if name != "cached")
             and (by == "cached" or not row["cached"])),
            key=lambda row: row[by],
        )  # fmt: skip
        for name, colour in (("median_ms", "#2b6cb0"), ("p99_ms", "#a0aec0")):
            axes.plot([row[by] for row in chosen], [row[name] for row in chosen], marker="o", color=colour,
                      label=name.removesuffix("_ms"))  # fmt: skip
        axes.set(ylim=0, xlim=0, xlabel=label, ylabel="ms of CPU time a step")
    panels[0].legend(frameon=False)
    _write(figure, panels, "A step of the coordinator", path)


def plot_long(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: prefill by length, the stall by phase, and the longest gap of a stream beside."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4))
    prefill, stall, gap = panels
    for number, window in enumerate(sorted({row["window"] for row in rows}, reverse=True)):
        chosen = sorted((row for row in rows if row["window"] == window), key=lambda row: row["tokens"])
        lengths = [row["tokens"] for row in chosen]
        name, style = (f"a window of {window:,}", "-") if window else ("full attention", "--")
        prefill.plot(lengths, [row["prefill_s"] for row in chosen], style, marker="o", color="#2b6cb0", label=name)
        for when, colour in (("alone", "#a0aec0"), ("prefill", "#d69e2e"), ("loss", "#2b6cb0")):
            longest = [row["beside"][when]["longest_s"] for row in chosen]
            gap.plot(lengths, longest, style, marker="o", color=colour, label=None if number else when)
        if not number:
            parts = [[row["phases"][phase] for row in chosen] for phase in PHASES]
            stall.stackplot(lengths, *parts, colors=PHASES.values(),
                            labels=[phase.removesuffix("_s") for phase in PHASES])  # fmt: skip
            stall.plot(lengths, [row["stall_s"] for row in chosen], marker="o", color="black", label="stall")
            stall.set(title=name)
    prefill.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="prefill, s")
    stall.set(ylim=0, xlabel="tokens of the prompt", ylabel="stall of its stream, s")
    gap.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="longest gap of a stream beside, s")
    prefill.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in panels:
        axes.legend(frameon=False)
    _write(figure, panels, "One long sequence, TP = 2, a rank killed in decode", path)


def _commonest(values: Sequence[int]) -> int:
    return max(set(values), key=values.count)


def _write(figure: Any, panels: Any, title: str, path: Path) -> None:
    for axes in panels:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
