"""The image for the tests: a base from a registry or of Debian's packages, and wheels from where pip gets them here."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.docker.engine import docker, run

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "docker" / "wheels"
REGISTRY = ("registry-1.docker.io", 443)
BASE = "python:3.11-slim"
IMAGE = "ghostserve:test"
DEBIAN = "bookworm"  # its Python is 3.11
LATER = ["async-timeout"]  # wanted by Debian's Python 3.11.2, though not by the one that asks for the wheels
BUILD_S = 900.0


def build(host: str) -> str:
    """Build the image with its CPU flavour, tell how long that took and how large it is, and return its name."""
    if sys.version_info[:2] != (3, 11):
        raise RuntimeError(f"the wheels are for the image's Python 3.11; this is {sys.version.split()[0]}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ghostserve-base-") as folder:
        bootstrap = None if _pulled(host) else _bootstrap(Path(folder))
        try:
            _fetch_wheels()
            base = BASE if bootstrap is None else _import(host, bootstrap, Path(folder))
        finally:
            if bootstrap is not None and bootstrap.poll() is None:
                bootstrap.terminate()
                bootstrap.wait()
    ready = time.monotonic()
    print(f"base image {base} and wheels: {ready - began:.0f} s", flush=True)
    docker(
        host, "build", "--network", "none", "--file", str(ROOT / "docker" / "Dockerfile"), "--target", "ghostserve",
        "--build-arg", f"BASE={base}", "--tag", IMAGE, str(ROOT), deadline_s=BUILD_S,
    )  # fmt: skip
    size = int(docker(host, "image", "inspect", "--format", "{{.Size}}", IMAGE))
    of_base = int(docker(host, "image", "inspect", "--format", "{{.Size}}", base))
    print(
        f"image {IMAGE}: {size / 1e6:.0f} MB, of which the base {of_base / 1e6:.0f} MB; "
        f"built in {time.monotonic() - ready:.0f} s",
        flush=True,
    )
    return IMAGE


def _pulled(host: str) -> bool:
    with suppress(OSError, subprocess.SubprocessError), socket.create_connection(REGISTRY, timeout=3.0):
        docker(host, "pull", "--quiet", BASE)
        return True
    print(f"no registry can be reached: the base is made of Debian {DEBIAN}'s packages", flush=True)
    return False


def _bootstrap(folder: Path) -> "subprocess.Popen[bytes]":
    log = (folder / "debootstrap.log").open("wb")
    return subprocess.Popen(
        ["debootstrap", "--variant=minbase", "--include=python3,python3-venv", DEBIAN, str(folder / "root")],
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def _fetch_wheels() -> None:
    """Fill docker/wheels with what pip, as it is set up on this machine, installs for the CPU flavour."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, Path(folder, "src"), ignore=_not_packages)  # building in place would leave files there
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        constraints = str(ROOT / "constraints.txt")
        run([*pip, "wheel", "-c", constraints, "-w", str(WHEELS), *LATER, str(Path(folder, "src"))], deadline_s=BUILD_S)
    for own in WHEELS.glob("ghostserve-*.whl"):
        own.unlink()


def _not_packages(folder: str, names: list[str]) -> set[str]:
    """What of the repository no wheel is made of."""
    if Path(folder) != ROOT:
        return {"__pycache__"}
    return set(names) - {"kernels", "shared", "services", "pyproject.toml", "README.md", "LICENSE"}


def _import(host: str, bootstrap: "subprocess.Popen[bytes]", folder: Path) -> str:
    if bootstrap.wait(BUILD_S):
        raise RuntimeError(f"debootstrap failed:\n{(folder / 'debootstrap.log').read_text()[-1000:]}")
    archive = folder / "base.tar"
    caches = ["--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*"]
    run(["tar", "--create", "--file", str(archive), *caches, "--directory", str(folder / "root"), "."])
    docker(host, "import", str(archive), "ghostserve-base")
    return "ghostserve-base"
