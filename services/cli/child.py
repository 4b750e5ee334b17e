"""One child process of a cluster on this machine: started, watched, started again on the same address, ended.

A child that listens prints one line with its address to its standard output; all else goes to its log file. It dies
with this process, however that ends.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from shared.errors import ConfigError, DeadlineExceeded, GhostError
from shared.service import EXIT_CONFIG, die_with_parent

LISTEN_DEADLINE_S = 90.0
STOP_DEADLINE_S = 12.0
LOG_TAIL_LINES = 15
LISTENING = re.compile(rb"^listening on (\S+)\s*$")
_LAST_WORDS = re.compile(r"^ghostserve [^:]*: (.*)$")


@dataclass(frozen=True, slots=True)
class Command:
    """How a child is started. `port_flag` names the flag of the port that its address has; empty: it says no address.

    The first start may take a free port; all later ones take that port again.
    """

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path | None
    """Where its output goes; None: where this process's goes."""
    port_flag: str = ""


@dataclass(slots=True)
class Child:
    """A child process, alive or dead."""

    command: Command
    process: asyncio.subprocess.Process
    address: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not been seen to end."""
        return self.process.returncode is None

    def log_tail(self) -> str:
        """The end of its log."""
        log = self.command.log
        lines = log.read_text(errors="replace").splitlines() if log is not None and log.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:]) or "(nothing)"

    async def how_it_ended(self) -> str:
        """Wait for its end, and say how it came."""
        code = await self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self.name} ended with {how}"

    async def failure(self) -> GhostError:
        """Why it ended: ConfigError, in its own words, where its settings or the model are wrong; else all we know."""
        how = await self.how_it_ended()
        if self.process.returncode == EXIT_CONFIG:
            lines = self.log_tail().splitlines()
            said = [match[1] for line in lines if (match := _LAST_WORDS.match(line))]
            return ConfigError(f"{self.name}: {(said or lines)[-1]}")
        return GhostError(f"{how}; the end of its log:\n{self.log_tail()}")

    async def listening(self) -> None:
        """Wait until it says its address. Raises GhostError if it ends instead, DeadlineExceeded if it says nothing."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(LISTEN_DEADLINE_S):
                async for line in self.process.stdout:
                    if match := LISTENING.match(line):
                        self.address = match[1].decode()
                        return
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} did not start within {LISTEN_DEADLINE_S:.0f} s") from None
        raise await self.failure()

    async def end(self) -> None:
        """SIGTERM, then SIGKILL for the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # one that was stopped could not end
        try:
            async with asyncio.timeout(STOP_DEADLINE_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


async def start(command: Command, address: str = "") -> Child:
    """Start a child; `address`: of its former life, to listen there again. It may not listen yet: see `listening`."""
    arguments = list(command.arguments)
    if address and command.port_flag:
        arguments += [command.port_flag, str(urlsplit(address).port)]
    with command.log.open("ab") if command.log is not None else contextlib.nullcontext() as log:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if command.port_flag else log,
            stderr=log,
            env=dict(command.environment),
            preexec_fn=die_with_parent,
            process_group=0,
        )
    return Child(command, process, address)
