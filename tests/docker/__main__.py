"""`make docker-test`: start an engine, build the image, run the tests of this folder on it, and leave nothing behind.

    python -m tests.docker [--hold] [ARGUMENTS OF PYTEST]

With --hold the tests begin when a line is read from standard input, and do not begin at its end: CI builds the image
beside its other tests, and has the cores to itself for these. Exits with pytest's code, or with 3, and a loud line,
where there can be no Docker engine.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.docker.engine import Engine, NoEngine, install
from tests.docker.image import ROOT, build

EXIT_NO_ENGINE = 3
EXIT_NOT_WANTED = 130
HOLD = "--hold"


def main(arguments: list[str]) -> int:
    """Run the tests, with further arguments for pytest."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as after Ctrl-C
    try:
        install()
        with (
            tempfile.TemporaryDirectory(prefix="ghostserve-docker-", dir=_spacious()) as folder,
            Engine(Path(folder, "engine")) as engine,
        ):
            environment = {**os.environ, "GHOST_TEST_DOCKER": engine.host, "GHOST_TEST_IMAGE": build(engine.host)}
            if HOLD in arguments and not sys.stdin.readline():
                return EXIT_NOT_WANTED
            tests = [sys.executable, "-m", "pytest", "tests/docker", *(each for each in arguments if each != HOLD)]
            return subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode
    except NoEngine as error:
        print(f"\nDOCKER TESTS DID NOT RUN: {error}\n", file=sys.stderr)
        return EXIT_NO_ENGINE
    except KeyboardInterrupt:
        return EXIT_NOT_WANTED


def _spacious() -> str:
    """A folder on a disk with room for images: not /tmp, which may lie in memory."""
    return os.environ.get("GHOST_TEST_DOCKER_DIR", "/var/tmp")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
