"""A drill from its flags to its exit code: a run without a fault, the same with it, and what became of the streams."""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from services.cli.drill.faults import inflict
from services.cli.drill.history import History
from services.cli.drill.options import Options, parse_options
from services.cli.drill.report import Report, make_report, print_report
from services.cli.drill.streams import Stream, stream_all
from services.cli.local import LocalCluster, ServeSettings
from services.cli.serve import fetch_model
from services.cli.vllm import VllmCluster, VllmSettings, check_installed, vllm_arguments
from shared.errors import GhostError

SERVING_DEADLINE_S = 300.0
RECORD_DEADLINE_S = 30.0
PROTECTED_DEADLINE_S = 60.0
PREFILL_FRACTION = 0.5
"""Where in the fault-free time to first token a fault `--when prefill` comes."""


def drill(arguments: argparse.Namespace) -> int:
    """Run a drill as the flags say, print its timeline, and return the exit code."""
    options = parse_options(arguments)
    console = Console()
    logs = Path(arguments.log_dir or tempfile.mkdtemp(prefix="ghostserve-drill-"))
    try:
        report = asyncio.run(_in_own_cluster(arguments, options, console, logs))
    except GhostError:
        _say_where(logs, console)
        raise
    print_report(report, console)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(report), indent=2) + "\n")
    if not report.identical:
        _say_where(logs, console)
    elif not arguments.log_dir:
        shutil.rmtree(logs, ignore_errors=True)
    return 0 if report.identical else 1


def _say_where(logs: Path, console: Console) -> None:
    console.print(f"logs are in {logs}; what the coordinator saw: ghostserve replay {logs}/recordings", soft_wrap=True)


async def _in_own_cluster(arguments: argparse.Namespace, options: Options, console: Console, logs: Path) -> Report:
    model_dir = await asyncio.to_thread(fetch_model, arguments.model)
    with console.status("starting") as shown, tempfile.TemporaryDirectory(prefix="ghostserve-faults-") as orders:
        kind = VllmSettings if arguments.engine == "vllm" else ServeSettings
        settings = kind(
            port=0,
            tls_cert_file="",
            tls_key_file="",
            tp=arguments.tp,
            spares=arguments.spares or max(1, options.loses_ranks),
            stores=arguments.stores or arguments.parity,
            parity=arguments.parity,
            protection=arguments.protection,
            protect_tail=arguments.protect_tail,
            transport=arguments.transport,
            communicator=arguments.communicator,
            dtype=arguments.dtype,
            log_dir=str(logs),
            record=True,
            max_batch=max(32, options.streams),
            fault_dir=orders,
        )
        async with _cluster(settings, model_dir, shown.update) as cluster:
            await cluster.wait_serving(SERVING_DEADLINE_S)
            async with cluster.kept():
                return await run_drill(cluster, options, shown.update)


def _cluster(settings: ServeSettings, model_dir: Path, narrate: Callable[[str], None]) -> LocalCluster:
    if not isinstance(settings, VllmSettings):
        return LocalCluster(settings, model_dir, narrate)
    check_installed()
    settings = settings.model_copy(update={"served_name": model_dir.name})
    return VllmCluster(settings, model_dir, narrate, arguments=vllm_arguments(settings, model_dir))


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
    narrate("waiting for spares")
    await cluster.wait_spares(SERVING_DEADLINE_S)
    narrate("warming up")
    await stream_all(cluster, [prompts[0][:64]], options, f"{salt}-warm", max_tokens=8)
    narrate("streaming with no fault")
    calm = await stream_all(cluster, prompts, options, f"{salt}-calm")
    if options.cached:
        narrate("waiting until all is protected")
        await cluster.wait_protected(PROTECTED_DEADLINE_S)
    narrate(f"streaming, with {options.fault} of {', '.join(options.targets)}")
    strike = Strike(cluster, options, await cluster.status(), statistics.median(each.first_token_s for each in calm))
    async with History(cluster) as history:
        hit = await stream_all(
            cluster, prompts, options, f"{salt}-calm" if options.cached else f"{salt}-hit", watch=strike.saw,
            background=strike.in_prefill, tolerant=options.breaks_streams,
        )  # fmt: skip
        await strike.over(hit)
        narrate("reading the timeline")
        await cluster.wait_serving(SERVING_DEADLINE_S)
        record, status = await _record(cluster, options, strike.began)
    again = None
    if options.breaks_streams:
        narrate("streaming what broke off again")
        again = await stream_all(cluster, prompts, options, f"{salt}-again")
    return make_report(
        cluster.settings, options, calm, hit, again, strike.lost_at, record, status, history.since(strike.began)
    )


@dataclass(slots=True)
class Strike:
    """The fault: when it comes, and that it came. `status`: who is which rank."""

    cluster: LocalCluster
    options: Options
    status: dict[str, Any]
    first_token_s: float
    began: float = 0.0
    lost_at: float = 0.0
    """When ranks were lost for sure: with the fault, or by what came then."""
    task: asyncio.Task[None] | None = None

    @property
    def at_token(self) -> int | None:
        """The token of the first stream after which the fault comes; None: in the middle of the prefill."""
        if self.options.when == "prefill":
            return None
        if self.options.when == "decode":
            return self.options.max_tokens // 2
        return int(self.options.when.split(":")[1])

    def saw(self, index: int, stream: Stream) -> None:
        """A stream got tokens."""
        at = self.at_token
        if at is not None and index == 0 and len(stream.tokens) >= at:
            self._begin()

    async def in_prefill(self) -> None:
        """Begin in the middle of the prefill, where that is asked for."""
        if self.at_token is None:
            await asyncio.sleep(self.first_token_s * PREFILL_FRACTION)
            self._begin()

    async def over(self, streams: Sequence[Stream]) -> None:
        """Wait until the fault is over. Raises GhostError if these streams ended before it came, or what came then."""
        if self.task is None:
            raise GhostError("the streams ended before the fault came")
        await self.task
        ended = not self.options.breaks_streams and all(stream.times[-1:] < [self.lost_at] for stream in streams)
        if self.options.then and ended:
            raise GhostError(f"the streams ended before {', '.join(self.options.then)} died: ask for more tokens")

    def _begin(self) -> None:
        if self.task is None:
            self.began = self.lost_at = time.monotonic()
            self.task = asyncio.create_task(self._inflict())

    async def _inflict(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            options = self.options
            tasks.create_task(inflict(self.cluster, options.fault, options.targets, self.status, options.for_s))
            if options.then:
                await asyncio.sleep(options.then_s)
                self.lost_at = time.monotonic()
                tasks.create_task(inflict(self.cluster, "kill", options.then, self.status, 0.0))


async def _record(
    cluster: LocalCluster, options: Options, since: float
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The record of the recovery that the fault began, where there is one; and the status then."""
    if not options.loses_ranks or options.breaks_streams:
        return None, await cluster.status()
    return await closed_record(cluster, since)


async def closed_record(cluster: LocalCluster, since: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of the first recovery that began after `since`, once the group serves again; and the status then.

    Raises GhostError if there is none in time.
    """
    end = time.monotonic() + RECORD_DEADLINE_S
    while time.monotonic() < end:
        status = await cluster.status()
        found = [record for record in status["recoveries"] if record["started"] >= since]
        if found and status["state"] == "serving":
            return found[0], status
        await asyncio.sleep(0.05)
    raise GhostError(f"the coordinator reported no recovery within {RECORD_DEADLINE_S:.0f} s")
