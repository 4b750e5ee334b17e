"""The bench's pictures: the stall by context, the response by failures, a checkpoint by mode."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from tests.bench.checkpoint import Row as CheckpointRow
from tests.bench.recovery import Row as RecoveryRow
from tests.bench.serving import Row as ServingRow

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "none": "#a0aec0",
    "replicate": "#d69e2e",
    "gather": "#805ad5",
    "parity": "#2b6cb0",
    "parity m=2": "#63b3ed",
    "parity tail=on": "#38a169",
}


def plot(
    recovery: Sequence[RecoveryRow], serving: Sequence[ServingRow], checkpoint: Sequence[CheckpointRow], path: Path
) -> None:
    """Write a PNG with three panels."""
    figure, (stall, response, chunk) = plt.subplots(1, 3, figsize=(15, 4.4))
    single = [row for row in recovery if row.streams == 1 and row.lost == 1]
    for mode in dict.fromkeys(row.mode for row in single):
        points = sorted((row.context, row.stall_s) for row in single if row.mode == mode)
        stall.plot(*zip(*points, strict=True), marker="o", color=COLOURS[mode], label=mode)
    stall.set(yscale="log", xlabel="tokens of context", ylabel="stall of the stream, s", title="One rank killed")
    for mode in dict.fromkeys(row.mode for row in serving):
        shares = [(row.share * 100, row.latency["p50"]) for row in serving if row.mode == mode]
        response.plot(*zip(*shares, strict=True), marker="o", color=COLOURS[mode], label=mode)
    response.set(
        ylim=0, xlabel="% of requests with a failure", ylabel="median response, s", title="Serving while ranks fail"
    )
    shaped = [row for row in checkpoint if row.link_gbit]
    for index, row in enumerate(shaped):
        name = "parity m=2" if row.mode == "parity" and row.m == 2 else row.mode
        chunk.bar(index, row.chunk_s * 1e3, color=COLOURS[name])
    chunk.set_xticks(range(len(shaped)), [f"{row.mode}\nk={row.k}, m={row.m}" for row in shaped], fontsize=7)
    rate = f"{shaped[0].link_gbit:g} Gb/s" if shaped else "no shaped link"
    chunk.set(ylabel="ms", title=f"Checkpoint of 2,048 tokens, stores behind {rate}")
    for axes in (stall, response) if serving else (stall,):
        axes.legend(frameon=False)
    for axes in (stall, response, chunk):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
