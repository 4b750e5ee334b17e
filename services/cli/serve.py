"""`ghostserve serve`: a cluster for a person at a terminal."""

import asyncio
import json
import signal
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from services.cli.local import LocalCluster, ServeSettings
from services.worker.engine.checkpoint import CONFIG, check_size, read_json
from services.worker.engine.model_files import resolve_model

SERVING_DEADLINE_S = 300.0


def fetch_model(name: str) -> Path:
    """The directory of a model's files, made or fetched with a progress display on standard error."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("model", total=1.0)
        return resolve_model(
            name, progress=lambda stage, done: progress.update(task, description=stage, completed=done)
        )


def check_model(model_dir: Path, settings: ServeSettings) -> None:
    """Raise ModelError unless these ranks can serve the model. Takes seconds; of the default model, which is our own
    doing, only the number of ranks is in question."""
    if settings.model == "default":
        check_size(model_dir, read_json(model_dir / CONFIG), settings.tp)
        return
    from services.worker.engine import model

    model.check_model(model_dir, settings.tp, settings.dtype)


def serve(settings: ServeSettings) -> int:
    """Run a cluster until Ctrl-C or SIGTERM.

    Raises GhostError if a service does not start, or can't be kept alive: ConfigError or ModelError if it never could.
    """
    return asyncio.run(_serve(settings))


async def _serve(settings: ServeSettings) -> int:
    console = Console()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    model_dir = await asyncio.to_thread(fetch_model, settings.model)
    await asyncio.to_thread(check_model, model_dir, settings)
    stopped = asyncio.create_task(stop.wait())
    cluster = LocalCluster(settings, model_dir, lambda text: console.print(f"  {text}", style="dim"))
    running = asyncio.create_task(_run(cluster, console))
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        stopped.cancel()
        await running
    console.print("stopping")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return 0


async def _run(cluster: LocalCluster, console: Console) -> None:
    """Run the cluster, and restart what dies. Raises GhostError for what can't be kept alive."""
    async with cluster:
        status = await cluster.wait_serving(SERVING_DEADLINE_S)
        _greet(cluster, console, status["served_name"])
        await cluster.keep()


def _greet(cluster: LocalCluster, console: Console, model: str) -> None:
    settings, url = cluster.settings, cluster.base_url
    console.print(
        f"\n[bold]{model}[/bold] on {settings.tp} ranks, {settings.spares} spare(s), {settings.stores} parity "
        f"store(s), protection {settings.protection}"
    )
    for child in cluster.processes.values():
        console.print(f"  {child.name:12} pid {child.pid:<8} {child.address}", style="dim")
    console.print(f"\nBase URL   [bold]{url}/v1[/bold]   (logs in {cluster.settings.log_dir or cluster.folder})")
    console.print(f"Status     [bold]{url}/[/bold]\n")
    body = json.dumps(
        {"model": model, "max_tokens": 48, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    )
    print(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '{body}'")
    print("\nCtrl-C stops all of it.", flush=True)
