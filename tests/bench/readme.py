"""README's measured figures, as they are in bench/results: Markdown between two marks. Pure: no clock, no machine."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.outcome import Outcome, in_words
from tests.bench.recovery import TAILS

BLOCK = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.DOTALL)
MODES = ("parity", "replicate", "none")


def load(folder: Path) -> dict[str, Any]:
    """What `make bench` wrote, with the figures of vLLM, which are taken apart from it."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    results["vllm"] = json.loads((folder / "vllm.json").read_text())
    results["vllm_failure"] = json.loads((folder / "vllm_failure.json").read_text())
    return results


def measured(results: dict[str, Any]) -> str:
    """The block: where it was measured, recovery, the engine beside others, a failure beside vLLM's."""
    recovery = "\n".join(_phases(results))
    parts = [_machine(results["machine"]), _by_mode(results), recovery, _engine(results), _failure(results),
             _stripes(results["stripes"])]  # fmt: skip
    if results.get("load_generator"):
        parts.append(_cross_check(results["load_generator"]))
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, ["---"] * len(head), *rows))


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"Measured on a virtual machine with {machine['cores']} cores ({machine['processor']}), "
        f"{machine['memory_gib']} GiB and no GPU, SmolLM2-135M in\nbfloat16, TP = 3: three processes share "
        f"{machine['cores']} cores. The machine is noisy; ratios are of neighbouring runs, medians.\n"
        "`make bench` writes these figures, and all others, to [bench/results](bench/results/results.md)."
    )


def _by_mode(results: dict[str, Any]) -> str:
    rows = []
    stalls = {
        (row["context"], row["mode"]): row for row in results["recovery"] if (row["streams"], row["lost"]) == (1, 1)
    }
    for context in sorted({context for context, _ in stalls if context >= 1000}):
        cells = [f"{stalls[context, mode]['stall_s']:.2f} s" for mode in MODES]
        rows.append([f"{context:,} tokens of context", f"**{cells[0]}**", *cells[1:]])
    chunks = {
        row["mode"]: row
        for row in results["checkpoint"]
        if row["k"] == 4 and row["link_gbit"] and (row["mode"] != "parity" or row["m"] == 1)
    }
    stored = [f"{chunks[mode]['store_bytes'] / chunks[mode]['kv_bytes']:.0%}" for mode in MODES[:2]]
    rows.append(["host memory, of the KV protected (four ranks)", *stored, "0"])
    link = f"{chunks['parity']['link_gbit']:g} Gb/s"
    times = [f"{chunks[mode]['chunk_s'] * 1e3:.0f} ms" for mode in MODES[:2]]
    rows.append([f"checkpoint of 2,048 tokens, four ranks, stores behind {link}", f"**{times[0]}**", times[1], ""])
    cost = {(row["what"], row["streams"], row["mode"]): row["ratio"] for row in results["protection"]}
    both = [  # a quick run has measured what is judged only
        f"{cost['prefill', 1, mode]:.2f}; {cost['decode', 4, mode]:.2f}" if ("prefill", 1, mode) in cost else ""
        for mode in MODES[:2]
    ]
    rows.append(["throughput of `none`: prefill; decode, 4 streams", *both, ""])
    if "serving" in results:  # a quick run has none
        rows.append(_serving(results["serving"]))
    head = ["a rank gets SIGKILL in decode: stall that the client sees", "`parity`", "`replicate`: raw copies",
            "`none`: recompute"]  # fmt: skip
    return _table(head, rows)


def _serving(rows: list[dict[str, Any]]) -> list[str]:
    """Response at the highest share of failures."""
    share = max(row["share"] for row in rows)
    at = {row["mode"]: row for row in rows if row["share"] == share}
    load = next(iter(at.values()))
    cells = [
        f"{at[mode]['latency']['p50']:.1f}, {at[mode]['latency']['p90']:.1f} s" if mode in at else "" for mode in MODES
    ]
    what = (
        f"load {load['rate'] / load['capacity']:.0%}, a failure for {share:.0%} of requests: response, median and 90%"
    )
    return [what, f"**{cells[0]}**", *cells[1:]]


def _phases(results: dict[str, Any]) -> Iterator[str]:
    """What a stall at 4,096 tokens divides into; with tails protected; and of a planned move, where they were taken."""
    at = {
        row["mode"]: row for row in results["recovery"] if (row["context"], row["streams"], row["lost"]) == (4096, 1, 1)
    }
    row = at["parity"]
    phases = row["phases"]
    yield (
        f"At 4,096 tokens the stall is {phases['detect_s']:.3f} s until the loss is known, "
        f"{phases['regroup_s'] + phases['weights_s']:.3f} s to fence and regroup, {phases['restore_s']:.3f} s "
        f"to decode\n{row['restored_pages']} pages, and {phases['recompute_s']:.3f} s to recompute the "
        f"{row['recomputed_tokens']} tokens of the unsealed tail."
    )
    cost = {
        (each["streams"], each["mode"]): each["ratio"] for each in results["protection"] if each["what"] == "decode"
    }
    if TAILS in at and (4, TAILS) in cost:
        yield (
            f"With `--protect-tail` the stall there is {at[TAILS]['stall_s']:.2f} s, of which "
            f"{at[TAILS]['phases']['recompute_s']:.3f} s are recomputing, and decode\nat 1, 4 and 8 streams has "
            + ", ".join(f"{cost[streams, TAILS]:.2f}" for streams in (1, 4, 8))
            + " of the throughput of `none` (`parity` without it: "
            + ", ".join(f"{cost[streams, 'parity']:.2f}" for streams in (1, 4, 8))
            + ")."
        )
    for move in results.get("moves", ()):
        yield (
            f"A planned move (`ghostserve drain rank:1`) at {move['context']:,} tokens holds the stream for "
            f"{move['held_s'] * 1e3:.0f} ms: its longest gap is {move['longest_gap_s'] * 1e3:.0f} ms,\n"
            f"without a move {move['longest_gap_without_s'] * 1e3:.0f} ms."
        )


def _engine(results: dict[str, Any]) -> str:
    rows = []
    for case in results["engine"]:
        speed, ratio = case["tokens_per_s"], case["ratio"]
        vllm = results["vllm"].get(case["name"])
        ours = [f"{speed[name]:.0f} ({ratio[name]:.2f})" for name in ("TP=3", "TP=1")]
        rows.append([case["name"], f"{speed['generate']:.0f}", f"{vllm:.0f}" if vllm else "", *ours])
    return _table(["tokens/s (of `generate()`, in turns)", "transformers `generate()`", "vLLM 0.32, CPU", "TP = 3",
                   "TP = 1"], rows)  # fmt: skip


def _failure(results: dict[str, Any]) -> str:
    """One worker of three killed: vLLM's outcome beside ours."""
    head, *rows = in_words([Outcome(**each) for each in results["vllm_failure"]["outcomes"]])
    return (
        _table(head, rows)
        + "\n\nvLLM's figures are taken in an environment of its own, by\n"
        + "[vllm_peer.py](tests/bench/vllm_peer.py) and [vllm_failure.py](tests/bench/vllm_failure.py)."
    )


def _stripes(kept: dict[str, Any]) -> str:
    """What a parity store and Redis need to keep many stripes."""
    times = f"{kept['put_s_per_1000'] * 1e3:.0f} ms; {kept['release_s_per_1000'] * 1e3:.0f} ms"
    bytes_each = [f"{kept[name]:.0f} B" for name in ("store_bytes_per_stripe", "redis_bytes_per_stripe")]
    rows = [
        ["memory a stripe, beside its bytes", *bytes_each],
        ["put, indexed and acknowledged; released: each 1,000", times, ""],
        [
            "left in use after all are released",
            f"{kept['arena_bytes_in_use_left']} B",
            f"{kept['redis_keys_left']} keys",
        ],
    ]
    return _table([f"{kept['stripes']:,} stripes, one parity shard each", "parity store", "Redis"], rows)


def _cross_check(rows: list[dict[str, Any]]) -> str:
    by_client = {row["client"]: row for row in rows}
    told = [
        f"{row['first_token_s'] * 1e3:.0f} ms to the first token, {row['between_tokens_s'] * 1e3:.1f} ms between "
        f"tokens and {row['tokens_s']:.1f} tokens/s"
        for row in (by_client["guidellm"], by_client["ours"])
    ]
    return f"Another load generator, guidellm, on the same load: {told[0]};\nthe bench's own client: {told[1]}."


def written(readme: str, results: dict[str, Any]) -> str:
    """README with the block made anew."""
    return BLOCK.sub(lambda _: measured(results), readme)
