"""A network namespace whose loopback has the rate of a given link: what a real network would make slow."""

import os
import shutil
import subprocess
import sys

_SETUP = 'ip link set lo up && tc qdisc add dev lo root tbf rate "$0"mbit burst 512kb latency 200ms && exec "$@"'


def why_not() -> str:
    """Why this machine can't do it; empty if it can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def run_module(module: str, arguments: list[str], *, gbit: float, timeout: float) -> None:
    """Run `python -m module` in such a namespace. Raises CalledProcessError, TimeoutExpired."""
    command = [sys.executable, "-m", module, *arguments]
    subprocess.run(
        ["unshare", "--net", "sh", "-c", _SETUP, str(round(gbit * 1000)), *command], check=True, timeout=timeout
    )
