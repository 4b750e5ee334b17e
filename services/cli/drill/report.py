"""The outcome of a drill: two runs compared, the recovery by phase, and what was seen to happen."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from services.cli.drill.options import Options
from services.cli.drill.streams import Stream
from services.cli.local import ServeSettings


@dataclass(slots=True)
class Report:
    """The outcome of a drill; its JSON has these keys."""

    identical: bool
    kv_identical: bool | None
    """None: the engine does not tell."""
    streams: int
    prompt_tokens: int
    max_tokens: int
    protection: str
    dtype: str
    fault: str
    target: list[str]
    then: list[str]
    when: str
    stall_s: float
    baseline_gap_s: float
    first_token_s: float
    baseline_first_token_s: float
    phases: dict[str, float]
    """Of the recovery; empty where no rank was lost."""
    restore: dict[str, float]
    """What restore_s went to, as far as the ranks waited for it; the rest is the way there and back."""
    ways: list[dict[str, Any]]
    """How each stream came back, and what both ways were expected to take."""
    restored_pages: int
    tail_tokens: int
    """Restored one by one."""
    recomputed_tokens: int
    kv_bytes_restored: int
    parity_bytes_stored: int
    seed: int
    broken: int
    """Streams that broke off; they are compared by what they brought when asked for again."""
    events: list[str]
    """What was seen of the cluster, by seconds since the fault."""


def make_report(
    settings: ServeSettings,
    options: Options,
    calm: Sequence[Stream],
    hit: Sequence[Stream],
    again: Sequence[Stream] | None,
    lost_at: float,
    record: dict[str, Any] | None,
    status: dict[str, Any],
    events: list[str],
) -> Report:
    """Compare the two runs. A stall in prefill is what the first token came later."""
    in_prefill = options.when == "prefill"
    whole = [one for one in hit if not one.error] if again is None else again
    pairs = list(zip(calm, again or hit, strict=True))
    late = [b.first_token_s - a.first_token_s for a, b in zip(calm, hit, strict=True) if b.times and in_prefill]
    stall = max([*late, *(gap for each in hit for gap in each.gaps)], default=0.0)
    return Report(
        identical=all(a.tokens == b.tokens and a.text == b.text for a, b in pairs),
        kv_identical=_same_kv(pairs),
        streams=len(hit),
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        protection=settings.protection,
        dtype=settings.dtype,
        fault=options.fault,
        target=list(options.targets),
        then=list(options.then),
        when=options.when,
        stall_s=stall,
        baseline_gap_s=statistics.median(gap for each in calm for gap in each.gaps),
        first_token_s=statistics.median(each.first_token_s for each in whole),
        baseline_first_token_s=statistics.median(each.first_token_s for each in calm),
        phases=_phases(record, hit, lost_at) if record else {},
        restore={name: record[name] for name in RESTORE} if record else {},
        ways=record["streams"] if record else [],
        restored_pages=record["restored_pages"] if record else 0,
        tail_tokens=record["tail_tokens"] if record else 0,
        recomputed_tokens=record["recomputed_tokens"] if record else 0,
        kv_bytes_restored=record["kv_bytes_restored"] if record else 0,
        parity_bytes_stored=status["parity_bytes_stored"],
        seed=options.seed,
        broken=sum(bool(each.error) for each in hit),
        events=events,
    )


def _same_kv(pairs: Sequence[tuple[Stream, Stream]]) -> bool | None:
    if not any(a.digests or b.digests for a, b in pairs):
        return None
    return all(a.digests == b.digests and len(a.digests) > 0 for a, b in pairs)


def _phases(record: dict[str, Any], hit: Sequence[Stream], lost_at: float) -> dict[str, float]:
    ended = float(record["ended"])
    resumed = min((t for each in hit for t in each.times if t > ended), default=ended)
    return {
        "detect_s": record["started"] - lost_at,
        "regroup_s": record["regroup_s"],
        "weights_s": record["weights_s"],
        "restore_s": record["restore_s"],
        "recompute_s": record["recompute_s"],
        "resume_s": resumed - ended,
    }


PHASES = {
    "detect_s": "loss to suspicion",
    "regroup_s": "fence, new epoch, communicators",
    "weights_s": "the spare fills its slice",
    "restore_s": "lost pages decoded from parity",
    "recompute_s": "what had no parity, as one prefill",
    "resume_s": "to the next token at the client",
}


RESTORE = ("fetch_s", "exchange_s", "decode_s")
WAYS_SHOWN = 8


def print_report(report: Report, console: Console) -> None:
    """The timeline and the verdict."""
    then = f", then kill of {', '.join(report.then)}" if report.then else ""
    title = f"{report.fault} of {', '.join(report.target)}{then} in {report.when}, protection {report.protection}"
    if report.phases:
        console.print(_table(report, title))
        split = ", ".join(f"{name.removesuffix('_s')} {seconds:.3f} s" for name, seconds in report.restore.items())
        console.print(f"of restore, the new rank waited for: {split}")
        for way in report.ways[:WAYS_SHOWN]:
            console.print(
                f"{way['way']}, back after {way['resumed_s']:.3f} s: {way['restored_pages']} pages restored, "
                f"{way['recomputed_tokens']} tokens recomputed (expected: {way['expected_restore_s']:.3f} s to restore "
                f"the pages, {way['expected_recompute_s']:.3f} s to recompute them)"
            )
    else:
        console.print(f"{title}: no rank was lost")
    for event in report.events:
        console.print(f"  {event}", style="dim", highlight=False)
    console.print(
        f"longest stall {report.stall_s:.3f} s; fault-free gap {report.baseline_gap_s:.3f} s; "
        f"{report.restored_pages} pages ({report.kv_bytes_restored / 1e6:.1f} MB) restored, "
        f"{report.tail_tokens} tokens of tails restored, {report.recomputed_tokens} tokens recomputed"
    )
    if report.broken:
        console.print(f"{report.broken} stream(s) broke off with their gateway and were asked for again")
    verdict = "[green]identical[/green]" if report.identical else "[red]DIFFERENT[/red]"
    kv = {True: "; KV identical", False: "; KV different", None: ""}[report.kv_identical]
    console.print(f"{report.streams} stream(s), {report.prompt_tokens} + {report.max_tokens} tokens: {verdict}{kv}")


def _table(report: Report, title: str) -> Table:
    table = Table(title=title)
    table.add_column("phase")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("since the loss", justify="right")
    at = 0.0
    for name, what in PHASES.items():
        at += report.phases[name]
        table.add_row(name.removesuffix("_s"), what, f"{report.phases[name]:.3f}", f"{at:.3f}")
    return table
