"""Our load generator beside another's, guidellm's: the same load on the same gateway, in turns. Do our figures hold?

python -m tests.bench.load_generator [--quick] [--json FILE]

guidellm lives in a virtual environment of its own in the cache folder, which is made at need. Prompts are words that
are one token each, so that guidellm, which sends text, sends as many tokens as ours, which sends token ids. Requests
come at a constant rate. All figures are computed alike, from what each client saw of each request: time to first token,
time between tokens (from the first to the last, by their number), and tokens a second from first to last.
"""

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from services.cli.drill import Options, stream_all
from services.cli.local import LocalCluster
from services.gateway.tokenizer import Tokenizer
from services.worker.engine.model_files import default_cache_dir
from tests.bench import section
from tests.bench.clusters import peers
from tests.cluster.conftest import quiet

PACKAGES = ("guidellm==0.8.1", "torch==2.13.0")
"""torch is named for its size: an open range brings several GB for GPUs."""
INSTALL_S, RUN_S = 900.0, 300.0
RATE_S = 1.0
PROMPT_TOKENS, TOKENS = 256, 32
FIGURES = ("first_token_s", "between_tokens_s", "tokens_s")


@dataclass(frozen=True, slots=True)
class Row:
    """What a client saw: medians over the requests of a turn, then over the turns; `turns` has each turn's figures."""

    client: str
    requests: int
    first_token_s: float
    between_tokens_s: float
    tokens_s: float
    turns: list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as its client saw it; seconds of one clock."""

    began: float
    first_token: float
    ended: float
    tokens: int


def guidellm(console: Console, *, install: bool) -> Path | None:
    """The program, installed if need be and `install` says so; None, said loudly, where it can't be had."""
    folder = default_cache_dir() / "guidellm"
    program = folder / "bin" / "guidellm"
    if program.exists():
        return program
    if install:
        console.print(f"installing {PACKAGES[0]} into {folder}")
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, timeout=INSTALL_S)
            pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
            subprocess.run(pip, check=True, capture_output=True, timeout=INSTALL_S)
            return program
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            program.unlink(missing_ok=True)  # half an installation is none
            _say_not_checked(console, error)
            return None
    console.print("NOT CROSS-CHECKED: guidellm is not installed, and a quick run does not install it", style="bold red")
    return None


def _say_not_checked(console: Console, error: subprocess.SubprocessError) -> None:
    """Loudly; the rest of the bench goes on."""
    told = getattr(error, "stderr", None) or b""
    console.print(f"NOT CROSS-CHECKED by guidellm: {error}", style="bold red", markup=False)
    console.print(told.decode(errors="replace")[-2000:], markup=False)


def prompts(model_dir: Path, count: int, seed: int) -> list[tuple[str, list[int]]]:
    """Random texts of PROMPT_TOKENS words, with their token ids."""
    tokenizer = Tokenizer.load(str(model_dir))
    vocabulary = json.loads((model_dir / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(token for word, token in vocabulary.items() if re.fullmatch("Ġ[a-z]{3,}", word))
    dice, made = random.Random(seed), list[tuple[str, list[int]]]()
    for _ in range(count):
        ids = dice.choices(words, k=PROMPT_TOKENS)
        text = tokenizer.decode(ids)
        assert tokenizer.encode(text, special=True) == ids, "words are not one token each with this tokenizer"
        made.append((text, ids))
    return made


async def ours(cluster: LocalCluster, sent: Sequence[tuple[str, list[int]]], salt: str) -> list[Seen]:
    """The load by our own client."""

    async def one(number: int, ids: list[int]) -> Seen:
        await asyncio.sleep(number / RATE_S)
        (seen,) = await stream_all(cluster, [ids], Options(max_tokens=TOKENS), salt, digest=False)
        return Seen(seen.started, seen.times[0], seen.times[-1], len(seen.tokens))

    return await asyncio.gather(*(one(number, ids) for number, (_, ids) in enumerate(sent)))


async def theirs(
    program: Path, cluster: LocalCluster, sent: Sequence[tuple[str, list[int]]], folder: Path
) -> list[Seen]:
    """The load by guidellm."""
    data, out = folder / "prompts.jsonl", folder / "report.json"
    lines = [json.dumps({"prompt": text, "output_tokens_count": TOKENS}) for text, _ in sent]
    data.write_text("\n".join(lines) + "\n")
    model = (await cluster.status())["served_name"]
    backend = {
        "kind": "openai_http",
        "target": cluster.base_url,
        "model": model,
        "request_format": "/v1/completions",
        "http2": "false",
    }
    flags = {
        "--backend": ",".join(f"{key}={value}" for key, value in backend.items()),
        "--profile": f"kind=constant,rate={RATE_S}",
        "--data": f"kind=json_file,path={data}",
        "--tokenizer": f"kind=huggingface_auto,model={cluster.model_dir}",
        "--constraint": f"kind=max_requests,count={len(sent)}",
        "--output": f"kind=json,path={out}",
    }
    environment = os.environ | {"GUIDELLM__MAX_WORKER_PROCESSES": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(program), "run", *(part for flag in flags.items() for part in flag), "--disable-console"]
    await asyncio.to_thread(
        subprocess.run, command, check=True, capture_output=True, timeout=RUN_S, env=environment, cwd=folder
    )
    report = json.loads(out.read_text())
    (benchmark,) = report["benchmarks"]
    assert not benchmark["requests"]["errored"], benchmark["requests"]["errored"][0]
    return [_seen(request) for request in benchmark["requests"]["successful"]]


def _seen(request: dict[str, Any]) -> Seen:
    began = request["request_start_time"]
    first = began + request["time_to_first_token_ms"] / 1e3
    return Seen(began, first, request["request_end_time"], request["output_tokens"])


def figures(seen: Sequence[Seen]) -> dict[str, float]:
    """FIGURES of one turn."""
    assert all(each.tokens == TOKENS for each in seen), f"not {TOKENS} tokens in each answer"
    return {
        "first_token_s": statistics.median(each.first_token - each.began for each in seen),
        "between_tokens_s": statistics.median((each.ended - each.first_token) / (each.tokens - 1) for each in seen),
        "tokens_s": sum(each.tokens for each in seen) / (max(s.ended for s in seen) - min(s.began for s in seen)),
    }


async def measure(cluster: LocalCluster, program: Path, turns: int, requests: int, console: Console) -> list[Row]:
    """Both clients' rows; they take turns, and who is first changes."""
    seen: dict[str, list[dict[str, float]]] = {"ours": [], "guidellm": []}
    for turn in range(turns):
        for client in list(seen)[:: 1 if turn % 2 else -1]:
            await quiet(cluster)
            sent = prompts(cluster.model_dir, requests, 2 * turn + (client == "ours"))
            if client == "ours":
                saw = await ours(cluster, sent, f"load-{turn}")
            else:
                with tempfile.TemporaryDirectory() as folder:
                    saw = await theirs(program, cluster, sent, Path(folder))
            seen[client].append(figures(saw))
            shown = ", ".join(f"{name} {value:.3f}" for name, value in seen[client][-1].items())
            console.print(f"{client}, {len(saw)} requests: {shown}")
    return [
        Row(
            client,
            requests,
            *(statistics.median(each[name] for each in seen[client]) for name in FIGURES),
            seen[client],
        )
        for client in seen
    ]


def table(rows: Sequence[Row]) -> Table:
    """The rows, for a person."""
    shown = Table(
        title=f"Two load generators on one gateway: {RATE_S:g} requests a second of {PROMPT_TOKENS} + {TOKENS} tokens"
    )
    for column in ("client", "requests a turn", "first token, ms", "between tokens, ms", "tokens/s"):
        shown.add_column(column, justify="right")
    for row in rows:
        cells = []
        for name, scale, digits in zip(FIGURES, (1e3, 1e3, 1.0), (0, 1, 1), strict=True):
            values = [turn[name] * scale for turn in row.turns]
            middle = getattr(row, name) * scale
            cells.append(f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        shown.add_row(row.client, str(row.requests), *cells)
    return shown


async def run(quick: bool, console: Console) -> list[Row]:
    """The section, with a cluster of its own; no rows where guidellm can't be had or fails."""
    program = await asyncio.to_thread(guidellm, console, install=not quick)
    if program is None:
        return []
    async with peers(("parity",), spares=0) as clusters:
        try:
            return await measure(clusters["parity"], program, *((1, 10) if quick else (3, 20)), console)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            _say_not_checked(console, error)
            return []


if __name__ == "__main__":
    quick = "one turn of 10 requests, and nothing is installed"
    section.run(__doc__, quick, run, lambda rows: [table(rows)])
