"""Which host a process is on."""

import os
from pathlib import Path


def host_id() -> str:
    """Equal for processes that can open each other's files under /proc: one kernel, one PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
