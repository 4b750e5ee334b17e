"""`ghostserve drill`: lose ranks in mid-stream in a real cluster, and see that every stream ends with the same text."""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from services.local import LocalCluster, ServeSettings
from services.serve import fetch_model
from shared.errors import GhostError

SERVING_DEADLINE_S = 300.0
STREAM_DEADLINE_S = 900.0
RECORD_DEADLINE_S = 30.0
PREFILL_FRACTION = 0.5
"""Where in the fault-free time to first token a kill `--when prefill` comes."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a drill does."""

    fault: str = "kill"
    targets: tuple[int, ...] = (1,)
    when: str = "decode"
    prompt_tokens: int = 512
    max_tokens: int = 64
    streams: int = 1
    seed: int = 0


@dataclass(slots=True)
class Stream:
    """What one client saw. `times` are CLOCK_MONOTONIC of each event with tokens."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    started: float = 0.0
    finish: str | None = None
    digests: list[str] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.times[0] - self.started


@dataclass(slots=True)
class Report:
    """The outcome of a drill; its JSON has these keys."""

    identical: bool
    kv_identical: bool
    streams: int
    prompt_tokens: int
    max_tokens: int
    protection: str
    dtype: str
    fault: str
    target: list[int]
    when: str
    stall_s: float
    baseline_gap_s: float
    first_token_s: float
    baseline_first_token_s: float
    phases: dict[str, float]
    restored_pages: int
    recomputed_tokens: int
    kv_bytes_restored: int
    parity_bytes_stored: int
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The drill's flags."""
    parser.description = (
        "Start a cluster on free ports, stream completions with no fault, then the same ones while workers are\n"
        "killed, compare, and print a timeline. Exits 0 only if every stream ended with the same text."
    )
    parser.add_argument("--fault", choices=["kill"], default="kill", help="kill: SIGKILL [kill]")
    parser.add_argument("--target", default="rank:1", metavar="rank:N[,rank:M]", help="who is lost [rank:1]")
    parser.add_argument("--when", default="decode", metavar="prefill|decode|token:N", help="when it is lost [decode]")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="tokens of each prompt [512]")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of each answer [64]")
    parser.add_argument("--streams", type=int, default=1, metavar="S", help="clients at once [1]")
    parser.add_argument("--protection", choices=["parity", "replicate", "none"], default="parity", help="[parity]")
    parser.add_argument("--parity", type=int, default=1, metavar="M", help="parity shards a stripe [1]")
    parser.add_argument("--tp", type=int, default=3, metavar="K", help="ranks [3]")
    parser.add_argument("--spares", type=int, default=0, metavar="N", help="spares; 0: as many as targets [0]")
    parser.add_argument(
        "--stores", type=int, default=0, metavar="N", help="parity stores; 0: as many as parity shards [0]"
    )
    parser.add_argument("--transport", choices=["auto", "tcp", "ucx"], default="auto", help="bulk transport [auto]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="[float32]")
    parser.add_argument("--model", default="default", metavar="DIR", help="model [SmolLM2-135M-Instruct]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts [0]")
    parser.add_argument("--json", default="", metavar="FILE", help="write the report there")
    parser.add_argument("--log-dir", default="", metavar="DIR", help="keep the services' logs there")


def parse_options(arguments: argparse.Namespace) -> Options:
    """Options from flags. Raises GhostError for what can't be."""
    targets = []
    for part in arguments.target.split(","):
        match = re.fullmatch(r"rank:(\d+)", part.strip())
        if match is None or int(match[1]) >= arguments.tp:
            raise GhostError(f"--target {part!r}: rank:N with N from 0 to {arguments.tp - 1}, several with commas")
        targets.append(int(match[1]))
    when = re.fullmatch(r"prefill|decode|token:(\d+)", arguments.when)
    if when is None or (when[1] and not 1 <= int(when[1]) < arguments.max_tokens):
        raise GhostError(f"--when {arguments.when!r}: prefill, decode, or token:N with N from 1 to max-tokens - 1")
    for name, least in (("prompt_tokens", 1), ("max_tokens", 2), ("streams", 1)):
        if getattr(arguments, name) < least:
            raise GhostError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {least}")
    return Options(
        arguments.fault,
        tuple(sorted(set(targets))),
        arguments.when,
        arguments.prompt_tokens,
        arguments.max_tokens,
        arguments.streams,
        arguments.seed,
    )


def drill(arguments: argparse.Namespace) -> int:
    """Run a drill as the flags say, print its timeline, and return the exit code."""
    options = parse_options(arguments)
    console = Console()
    report = asyncio.run(_in_own_cluster(arguments, options, console))
    print_report(report, console)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 0 if report.identical else 1


async def _in_own_cluster(arguments: argparse.Namespace, options: Options, console: Console) -> Report:
    settings = ServeSettings(
        port=0,
        tp=arguments.tp,
        spares=arguments.spares or len(options.targets),
        stores=arguments.stores or arguments.parity,
        parity=arguments.parity,
        protection=arguments.protection,
        transport=arguments.transport,
        dtype=arguments.dtype,
        log_dir=arguments.log_dir,
        max_batch=max(32, options.streams),
    )
    model_dir = await asyncio.to_thread(fetch_model, arguments.model)
    with console.status("starting") as shown:
        async with LocalCluster(settings, model_dir, shown.update) as cluster:
            await cluster.wait_serving(SERVING_DEADLINE_S)
            return await run_drill(cluster, options, shown.update)


async def run_drill(
    cluster: LocalCluster, options: Options, narrate: Callable[[str], None] = lambda text: None
) -> Report:
    """The fault-free run, then the same with the fault, in a cluster that serves."""
    status = await cluster.status()
    vocabulary = status["model"]["vocab_size"]
    generator = random.Random(options.seed)
    prompts = [
        [generator.randrange(min(100, vocabulary // 2), vocabulary) for _ in range(options.prompt_tokens)]
        for _ in range(options.streams)
    ]
    salt = f"drill-{options.seed}-{time.monotonic_ns()}"
    narrate("warming up")
    await stream_all(cluster, [prompts[0][:64]], options, f"{salt}-warm", max_tokens=8)
    narrate("streaming with no fault")
    calm = await stream_all(cluster, prompts, options, f"{salt}-calm")
    narrate(f"streaming, and losing rank {', '.join(map(str, options.targets))}")
    pids = {worker["rank"]: worker["pid"] for worker in (await cluster.status())["workers"]}
    killed_at: list[float] = []

    def strike() -> None:
        killed_at.append(time.monotonic())
        for rank in options.targets:
            os.kill(pids[rank], signal.SIGKILL)

    trigger = Trigger(options, statistics.median(each.first_token_s for each in calm), strike)
    hit = await stream_all(cluster, prompts, options, f"{salt}-hit", watch=trigger.saw, background=trigger.wait)
    if not killed_at:
        raise GhostError("the streams ended before the fault came")
    narrate("reading the timeline")
    record, status = await _record(cluster, killed_at[0])
    return make_report(cluster.settings, options, calm, hit, killed_at[0], record, status)


@dataclass(slots=True)
class Trigger:
    """When the fault comes: at a token of the first stream, or in the middle of the prefill."""

    options: Options
    first_token_s: float
    strike: Callable[[], None]
    struck: bool = False

    @property
    def at_token(self) -> int | None:
        """The token of the first stream after which the fault comes."""
        if self.options.when == "prefill":
            return None
        if self.options.when == "decode":
            return self.options.max_tokens // 2
        return int(self.options.when.split(":")[1])

    def saw(self, index: int, stream: Stream) -> None:
        """A stream got tokens."""
        at = self.at_token
        if at is not None and index == 0 and not self.struck and len(stream.tokens) >= at:
            self.struck = True
            self.strike()

    async def wait(self) -> None:
        """Strike in the middle of the prefill, where that is asked for."""
        if self.at_token is None:
            await asyncio.sleep(self.first_token_s * PREFILL_FRACTION)
            self.struck = True
            self.strike()


async def stream_all(
    cluster: LocalCluster,
    prompts: Sequence[Sequence[int]],
    options: Options,
    salt: str,
    *,
    max_tokens: int | None = None,
    digest: bool = True,
    watch: Callable[[int, Stream], None] = lambda index, stream: None,
    background: Callable[[], Awaitable[None]] | None = None,
) -> list[Stream]:
    """Stream one completion for each prompt, all at once. The cache salt keeps runs from sharing pages."""
    model, tokens = (await cluster.status())["served_name"], max_tokens or options.max_tokens
    headers = {}
    if cluster.settings.api_keys:
        headers["Authorization"] = f"Bearer {cluster.settings.api_keys.get_secret_value().split(',')[0]}"
    async with (
        aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(STREAM_DEADLINE_S)) as session,
        asyncio.TaskGroup() as tasks,
    ):
        if background is not None:
            tasks.create_task(_awaited(background()))
        running = [
            tasks.create_task(
                _stream(session, cluster.base_url, _body(model, prompt, tokens, salt, digest), index, watch)
            )
            for index, prompt in enumerate(prompts)
        ]
    return [task.result() for task in running]


async def _awaited(work: Awaitable[None]) -> None:
    await work


def _body(model: str, prompt: Sequence[int], max_tokens: int, salt: str, digest: bool) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "cache_salt": salt,
        "return_token_ids": True,
        "return_kv_digest": digest,
    }


async def _stream(
    session: aiohttp.ClientSession,
    base_url: str,
    body: dict[str, Any],
    index: int,
    watch: Callable[[int, Stream], None],
) -> Stream:
    seen = Stream(started=time.monotonic())
    async with session.post(base_url + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise GhostError(f"the gateway answered {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                raise GhostError(f"stream {index} ended with an error: {event['error'].get('message')}")
            for choice in event["choices"]:
                if ids := choice.get("token_ids"):
                    seen.tokens.extend(ids)
                    seen.times.append(time.monotonic())
                seen.text += choice.get("text") or ""
                seen.finish = choice.get("finish_reason") or seen.finish
                seen.digests = choice.get("kv_digests") or seen.digests
            watch(index, seen)
    if seen.finish is None:
        raise GhostError(f"stream {index} broke off after {len(seen.tokens)} tokens")
    return seen


async def _record(cluster: LocalCluster, killed_at: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of the recovery that a kill began, and the status that has it, once it is closed."""
    end = time.monotonic() + RECORD_DEADLINE_S
    while time.monotonic() < end:
        status = await cluster.status()
        since = [record for record in status["recoveries"] if record["started"] >= killed_at]
        if since and status["state"] == "serving":
            return since[0], status
        await asyncio.sleep(0.05)
    raise GhostError(f"the coordinator reported no recovery within {RECORD_DEADLINE_S:.0f} s")


def make_report(
    settings: ServeSettings,
    options: Options,
    calm: Sequence[Stream],
    hit: Sequence[Stream],
    killed_at: float,
    record: dict[str, Any],
    status: dict[str, Any],
) -> Report:
    """Compare the two runs. A stall in prefill is what the first token came later."""
    ended = float(record["ended"] or killed_at)
    resumed = min((t for each in hit for t in each.times if t > killed_at), default=ended)
    late_start = max(after.first_token_s - before.first_token_s for before, after in zip(calm, hit, strict=True))
    stall = max((gap for each in hit for gap in each.gaps), default=0.0)
    return Report(
        identical=all(a.tokens == b.tokens and a.text == b.text for a, b in zip(calm, hit, strict=True)),
        kv_identical=all(a.digests == b.digests and len(a.digests) > 0 for a, b in zip(calm, hit, strict=True)),
        streams=len(hit),
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        protection=settings.protection,
        dtype=settings.dtype,
        fault=options.fault,
        target=list(options.targets),
        when=options.when,
        stall_s=max(stall, late_start),
        baseline_gap_s=statistics.median(gap for each in calm for gap in each.gaps),
        first_token_s=statistics.median(each.first_token_s for each in hit),
        baseline_first_token_s=statistics.median(each.first_token_s for each in calm),
        phases={
            "detect_s": max(0.0, record["started"] - killed_at),
            "regroup_s": record["regroup_s"],
            "weights_s": record["weights_s"],
            "restore_s": record["restore_s"],
            "recompute_s": record["recompute_s"],
            "resume_s": max(0.0, resumed - ended),
        },
        restored_pages=record["restored_pages"],
        recomputed_tokens=record["recomputed_tokens"],
        kv_bytes_restored=record["kv_bytes_restored"],
        parity_bytes_stored=status["parity_bytes_stored"],
        seed=options.seed,
    )


PHASES = {
    "detect_s": "kill to suspicion",
    "regroup_s": "fence, new epoch, communicators",
    "weights_s": "the spare fills its slice",
    "restore_s": "lost pages decoded from parity",
    "recompute_s": "what had no parity, as one prefill",
    "resume_s": "to the next token at the client",
}


def print_report(report: Report, console: Console) -> None:
    """The timeline and the verdict."""
    table = Table(
        title=f"Lost: rank {', '.join(map(str, report.target))} in {report.when}, protection {report.protection}"
    )
    table.add_column("phase")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("since the kill", justify="right")
    at = 0.0
    for name, what in PHASES.items():
        at += report.phases[name]
        table.add_row(name.removesuffix("_s"), what, f"{report.phases[name]:.3f}", f"{at:.3f}")
    console.print(table)
    console.print(
        f"longest stall {report.stall_s:.3f} s; fault-free gap {report.baseline_gap_s:.3f} s; "
        f"{report.restored_pages} pages ({report.kv_bytes_restored / 1e6:.1f} MB) restored, "
        f"{report.recomputed_tokens} tokens recomputed"
    )
    verdict = "[green]identical[/green]" if report.identical else "[red]DIFFERENT[/red]"
    kv = "identical" if report.kv_identical else "different"
    console.print(
        f"{report.streams} stream(s), {report.prompt_tokens} + {report.max_tokens} tokens: {verdict}; KV {kv}"
    )
