"""What the bench of vLLM came to: its tables, its goals, and its section of results.md. Pure: no clock, no machine."""

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.bench.goals import Goal
from tests.bench.goals import table as goals_table
from tests.bench.section import markdown

PROTECTED, UNPROTECTED, STOCK = "protected", "no protection", "stock vLLM"
CONTEXT = 4096
SECTION = re.compile(r"\n?<!-- vllm -->\n.*?<!-- /vllm -->\n", re.DOTALL)


@dataclass(slots=True)
class Kill:
    """One rank killed in decode. `phases`: of the coordinator's record; empty where none was written."""

    mode: str
    context: int
    stall_s: float
    same: bool
    """Whether the tokens are those of a run without a fault."""
    phases: dict[str, float] = field(default_factory=dict)
    restored_pages: int = 0
    recomputed_tokens: int = 0


@dataclass(slots=True)
class Speed:
    """Tokens a second with no fault, one figure a repeat. `what`: decode or prefill."""

    what: str
    streams: int
    mode: str
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


@dataclass(slots=True)
class Memory:
    """In bytes. The processes' are proportional set sizes: what is shared is divided by those that share it."""

    kv_protected: int
    parity_stored: int
    worker: int
    spare: int
    """Before it is promoted."""


@dataclass(slots=True)
class Figures:
    """All of a run."""

    machine: dict[str, Any]
    quick: bool
    vllm: str
    speeds: list[Speed] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    memory: Memory | None = None

    def stall(self, mode: str) -> Kill | None:
        """The kill with the median stall; None where none was made."""
        kills = sorted((each for each in self.kills if each.mode == mode), key=lambda each: each.stall_s)
        return kills[len(kills) // 2] if kills else None

    def ratio(self, what: str, streams: int, of: str, against: str) -> float | None:
        """Medians of rates, where both were taken."""
        rates = {each.mode: each.rate for each in self.speeds if (each.what, each.streams) == (what, streams)}
        return rates[of] / rates[against] if of in rates and against in rates else None


def load(path: Path) -> Figures:
    """What a run wrote."""
    told = json.loads(path.read_text())
    return Figures(
        told["machine"], told["quick"], told["vllm"], [Speed(**each) for each in told["speeds"]],
        [Kill(**each) for each in told["kills"]], Memory(**told["memory"]) if told["memory"] else None,
    )  # fmt: skip


def goals(figures: Figures) -> Iterator[Goal]:
    """What was promised, of what was measured."""
    ours, recomputed, stock = (figures.stall(mode) for mode in (PROTECTED, UNPROTECTED, STOCK))
    if ours is not None:
        yield Goal("stall at 4,096 tokens, s", ours.stall_s, 1.0, False)
        if recomputed is not None:
            yield Goal("stall, times shorter than recomputing", recomputed.stall_s / ours.stall_s, 8, True)
        if stock is not None:
            yield Goal("stall, times shorter than restarting stock vLLM", stock.stall_s / ours.stall_s, 80, True)
    for each in figures.speeds:
        name = f"{each.what}, {each.streams} stream(s)"
        if each.mode == PROTECTED:
            if (ratio := figures.ratio(each.what, each.streams, PROTECTED, UNPROTECTED)) is not None:
                yield Goal(f"{name}: of no protection", ratio, 0.97, True)
            if (ratio := figures.ratio(each.what, each.streams, PROTECTED, STOCK)) is not None:
                yield Goal(f"{name}: of stock vLLM, TP = 3", ratio, 1.5, True)
    if (memory := figures.memory) is not None and memory.kv_protected:
        yield Goal(
            "host memory for parity, of m/k of the KV", memory.parity_stored * 3 / memory.kv_protected, 1.05, False
        )


def tables(figures: Figures) -> Sequence[Table]:
    """For a person."""
    return (_kills(figures), _speeds(figures), _memory(figures), goals_table(list(goals(figures))))


def _kills(figures: Figures) -> Table:
    shown = Table(
        title="A rank of three gets SIGKILL in decode at 4,096 tokens: what the client's stream sees (medians)"
    )
    for column in ("", "stall, s", "detect", "regroup", "weights", "restore", "recompute", "same tokens"):
        shown.add_column(column, justify="right" if column else "left")
    for mode in (PROTECTED, UNPROTECTED, STOCK):
        kill = figures.stall(mode)
        if kill is not None:
            phases = [f"{kill.phases[name]:.3f}" if name in kill.phases else "" for name in PHASES]
            same = "restarted by hand" if mode == STOCK else "yes" if kill.same else "NO"
            shown.add_row(mode, f"{kill.stall_s:.2f}", *phases, same)
    return shown


PHASES = ("detect_s", "regroup_s", "weights_s", "restore_s", "recompute_s")


def _speeds(figures: Figures) -> Table:
    shown = Table(title="No fault, TP = 3: tokens/s (of no protection; of stock vLLM)")
    for column in ("", PROTECTED, UNPROTECTED, STOCK):
        shown.add_column(column, justify="right" if column else "left")
    for what, streams in dict.fromkeys((each.what, each.streams) for each in figures.speeds):
        cells = []
        for mode in (PROTECTED, UNPROTECTED, STOCK):
            found = [each for each in figures.speeds if (each.what, each.streams, each.mode) == (what, streams, mode)]
            ratios = [figures.ratio(what, streams, mode, other) for other in (UNPROTECTED, STOCK) if other != mode]
            told = "; ".join(f"{ratio:.2f}" for ratio in ratios if ratio is not None)
            cells.append(f"{found[0].rate:.1f}" + (f" ({told})" if mode == PROTECTED and told else "") if found else "")
        name = "prefill of 2,000 tokens" if what == "prefill" else f"decode, {streams} stream(s)"
        shown.add_row(name, *cells)
    return shown


def _memory(figures: Figures) -> Table:
    shown = Table(title="Memory, MiB")
    for column in ("what", "MiB"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    if (memory := figures.memory) is not None:
        for what, size in (
            ("KV protected, all ranks", memory.kv_protected),
            ("parity stored for it", memory.parity_stored),
            ("a worker (its part of what is shared too)", memory.worker),
            ("a warm spare, before it is promoted", memory.spare),
        ):
            shown.add_row(what, f"{size / 2**20:.0f}")
    return shown


def section(figures: Figures) -> str:
    """The section of results.md, between its marks."""
    where = figures.machine
    head = (
        f"## vLLM {figures.vllm} with its ranks protected, `make bench-vllm{' QUICK=1' if figures.quick else ''}`\n\n"
        f"SmolLM2-135M in float32, TP = 3, blocks of 32 tokens, on {where['processor']}, {where['cores']} cores, "
        f"{where['memory_gib']} GiB; load average {where['load_before']:.1f} when it began"
        + (
            ": the machine was busy with other work, so these are no clean figures."
            if where["load_before"] > 1
            else "."
        )
    )
    return "\n".join(["<!-- vllm -->", head, "", *map(markdown, tables(figures)), "<!-- /vllm -->", ""])


def written(results: str, new: str) -> str:
    """results.md with the section made anew."""
    return SECTION.sub("", results).rstrip("\n") + "\n\n" + new


def kept(results: str) -> str:
    """The section that is there, or nothing."""
    found = SECTION.search(results)
    return found[0] if found is not None else ""


# -- for people who have not asked yet ------------------------------------------------------------------------------

README = re.compile(r"(?<=<!-- vllm -->\n).*?(?=<!-- /vllm -->)", re.DOTALL)


def in_short(figures: Figures) -> str:
    """README's block: one table, and the timeline of one kill."""
    kills = {mode: figures.stall(mode) for mode in (PROTECTED, UNPROTECTED, STOCK)}
    where = figures.machine
    rows = [
        ["a rank of three gets SIGKILL at 4,096 tokens: the client waits",
         *(f"{'**' if mode == PROTECTED else ''}{kill.stall_s:.2f} s{'**' if mode == PROTECTED else ''}" if kill else ""
           for mode, kill in kills.items())],
        ["its stream", "goes on, same tokens" if (own := kills[PROTECTED]) and own.same else "",
         "goes on, all of it recomputed", "breaks off; restarted by hand"],
    ]  # fmt: skip
    for what, streams in dict.fromkeys((each.what, each.streams) for each in figures.speeds):
        rates = {each.mode: each.rate for each in figures.speeds if (each.what, each.streams) == (what, streams)}
        name = "prefill of 2,000 tokens" if what == "prefill" else f"decode, {streams} stream(s)"
        rows.append([f"no fault, {name}: tokens/s", *(f"{rates[mode]:.0f}" if mode in rates else "" for mode in kills)])
    if (memory := figures.memory) is not None and memory.kv_protected:
        rows.append(
            ["host memory for parity, of the KV", f"{memory.parity_stored / memory.kv_protected:.0%}", "0", "0"]
        )
        share = memory.spare / memory.worker
        rows.append(["memory of a warm spare, of a worker's", f"{share:.1f} times", f"{share:.1f} times", ""])
    lines = [["SmolLM2-135M, float32, TP = 3", *kills], ["---"] * 4, *rows]
    busy = f", with other work on it (load {where['load_before']:.0f})" if where["load_before"] > 1 else ""
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + f"\n\nvLLM {figures.vllm}'s CPU build on {where['processor']}, {where['cores']} cores{busy}; "
        + f"`make bench-vllm{' QUICK=1' if figures.quick else ''}`, {'one run each' if figures.quick else 'medians'}.\n"
        + (_timeline(own) if own is not None and own.phases else "")
    )


STEPS = {
    "detect_s": "the coordinator knows",
    "regroup_s": "fenced; the spare is rank 1, all are connected again",
    "weights_s": "it has its weights",
    "restore_s": "{restored_pages} blocks are decoded from the survivors' and parity",
    "recompute_s": "{recomputed_tokens} tokens that no block held yet are computed again",
}


def _timeline(kill: Kill) -> str:
    """Seconds since the kill, one line a phase that took any time, from the coordinator's record."""
    lines, at = ["", "```text", "  0.000 s  rank 1 gets SIGKILL, while it decodes"], 0.0
    counts = {"restored_pages": kill.restored_pages, "recomputed_tokens": kill.recomputed_tokens}
    for name, what in STEPS.items():
        seconds = kill.phases.get(name, 0.0)
        at += seconds
        if seconds:
            lines.append(f"{at:7.3f} s  {what.format(**counts)}")
    return "\n".join([*lines, f"{kill.stall_s:7.3f} s  the longest that the client waited for a token", "```", ""])
