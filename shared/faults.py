"""Faults on demand: a process that was started with --fault-dir DIR breaks itself when a drill tells it to.

The drill writes the fault's name to DIR/PID and sends SIGUSR1; the process does it and removes the file. There is no
port: who may do this may kill the process as well. Without the flag nothing here runs.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from shared.errors import ConfigError, DeadlineExceeded

log = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR1
TAKEN_DEADLINE_S = 5.0


def folder(name: str) -> Path:
    """The directory of orders. Raises ConfigError unless it is one that nobody else can write to."""
    path = Path(name)
    if not path.is_dir() or path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022:
        raise ConfigError(f"--fault-dir {name!r}: a directory that only you can write to")
    return path


def obey(orders: Path, actions: Mapping[str, Callable[..., None]]) -> None:
    """From now on, do what the files in `orders` say: an action's name, and after it words that the action is given.

    To be called on the event loop, in the main thread.
    """
    order = orders / str(os.getpid())

    def take() -> None:
        with contextlib.suppress(FileNotFoundError):
            text = order.read_text()
            log.warning("fault on demand: %s", text)
            name, *words = text.split() or [""]
            if name in actions:
                actions[name](*words)
            order.unlink()

    asyncio.get_running_loop().add_signal_handler(SIGNAL, take)


async def tell(orders: Path, pid: int, name: str) -> None:
    """Have a process break itself. Returns when it has, or is gone. Raises DeadlineExceeded if it does not listen."""
    order = orders / str(pid)
    order.write_text(name)
    try:
        os.kill(pid, SIGNAL)
        async with asyncio.timeout(TAKEN_DEADLINE_S):
            while order.exists():
                os.kill(pid, 0)
                await asyncio.sleep(0.005)
    except ProcessLookupError:
        pass
    except TimeoutError:
        raise DeadlineExceeded(f"process {pid} did not take the fault {name}") from None
    finally:
        order.unlink(missing_ok=True)
