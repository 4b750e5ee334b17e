"""A Docker engine for the tests alone: its own socket, data and networks, gone without a trace when they end."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

PACKAGES = {
    "dockerd": "docker.io",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
"""Programs that are needed -> Debian's packages that bring them."""
START_S = 60.0
STOP_S = 30.0
COMMAND_S = 120.0


class NoEngine(Exception):
    """There can be no Docker engine here: why."""


def install() -> None:
    """Install what is missing from Debian. Raises NoEngine."""
    if os.geteuid() != 0:
        raise NoEngine("a Docker engine needs root")
    wanted = sorted({package for program, package in PACKAGES.items() if shutil.which(program) is None})
    if not wanted:
        return
    if shutil.which("apt-get") is None:
        raise NoEngine(f"{', '.join(wanted)} missing, and this is no Debian to install them from")
    print(f"installing {', '.join(wanted)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *wanted]):
        done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoEngine(f"apt-get {arguments[0]} failed: {done.stderr.strip()[-500:]}")


class Engine:
    """A dockerd over `folder`, as a context manager. Raises NoEngine if it does not come up."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.host = f"unix://{folder}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        arguments = [
            "dockerd", "--host", self.host, "--data-root", str(self.folder / "data"),
            "--exec-root", str(self.folder / "exec"), "--pidfile", str(self.folder / "docker.pid"),
            "--bridge", "none",  # the tests make their own
            "--iptables=false", "--ip-forward=false", "--ip-masq=false",  # the host's firewall stays as it is
        ]  # fmt: skip
        with (self.folder / "dockerd.log").open("wb") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.folder / "docker.sock"))
                docker(self.host, "info")
                return
            time.sleep(0.1)
        last = (self.folder / "dockerd.log").read_text(errors="replace").splitlines()[-3:]
        raise NoEngine("dockerd does not run here: " + " | ".join(last))

    def stop(self) -> None:
        """End all containers and the engine, and remove what it kept."""
        if self._process is None:
            return
        if self._process.poll() is None:
            with suppress(subprocess.SubprocessError):
                if containers := docker(self.host, "ps", "-aq").split():
                    docker(self.host, "rm", "-f", "-v", *containers)
                networks = docker(self.host, "network", "ls", "-q", "--filter", "type=custom").split()
                if networks:
                    docker(self.host, "network", "rm", *networks)
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._process = None
        for line in Path("/proc/mounts").read_text().splitlines():
            if (mounted := line.split()[1]).startswith(str(self.folder)):
                subprocess.run(["umount", "-l", mounted], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def docker(host: str, *arguments: str, deadline_s: float = COMMAND_S) -> str:
    """Run the docker client. Returns its output; raises CalledProcessError with what it said."""
    return run(["docker", "--host", host, *arguments], deadline_s=deadline_s)


def run(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, deadline_s: float = COMMAND_S
) -> str:
    """Run a command to its end and return its output. An error carries the end of what it said."""
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=deadline_s, check=False)
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, arguments, done.stdout, done.stderr)
        error.add_note((done.stdout + done.stderr)[-2000:])
        raise error
    return done.stdout
