"""What every service process does alike: logging, signals, an honest exit code."""

import asyncio
import ctypes
import gc
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from shared import logs
from shared.config import CommonSettings
from shared.errors import ConfigError, GhostError, ModelError

log = logging.getLogger(__name__)

SHUTDOWN_DEADLINE_S = 10.0
EXIT_CONFIG = 78
"""As in sysexits.h: the settings, or the model, are wrong."""
COLLECT_AFTER = 20_000
"""Objects that a service makes before it looks for unreachable ones: some steps of a thousand streams' tokens."""
_PR_SET_PDEATHSIG = 1

Service = Callable[[asyncio.Event], Awaitable[None]]
"""A service's life: runs until the event is set, then cleans up and returns."""


def run_service(name: str, service: Service, settings: CommonSettings, *, grace_s: float = 0.0) -> int:
    """Run a service until SIGINT or SIGTERM. Returns its exit code: 0, or after a crash 1, with a line that says why.

    It may take `grace_s` to end its work before the time to clean up begins.

    EXIT_CONFIG instead of 1 says that another start would end the same way. A second signal ends the process at once.
    """
    logs.configure(name, settings.log_level, as_json=settings.log_json)
    gc.set_threshold(COLLECT_AFTER)
    gc.freeze()  # what is loaded stays: nobody who waits for a step has time for a look through all of it

    def say(why: str) -> None:
        if settings.log_json:
            log.critical("%s", why)
        else:
            print(f"ghostserve {name}: {why}", file=sys.stderr, flush=True)

    try:
        asyncio.run(_until_signal(name, service, grace_s + SHUTDOWN_DEADLINE_S))
    except GhostError as error:
        say(str(error))
        return exit_code(error)
    except BaseExceptionGroup as group:
        for cause in _leaves(group):
            say(f"{type(cause).__name__}: {cause}")
        log.debug("crash", exc_info=group)
        return 1
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        log.error("crash", exc_info=error)
        return 1
    return 0


def exit_code(error: GhostError) -> int:
    """EXIT_CONFIG for a setting or a model that is wrong, 1 for all that may go better another time."""
    return EXIT_CONFIG if isinstance(error, ConfigError | ModelError) else 1


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


async def _until_signal(name: str, service: Service, deadline_s: float) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        log.info("stopping")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    task = asyncio.ensure_future(service(stop))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        _, late = await asyncio.wait({task}, timeout=deadline_s)
        if late:
            task.cancel()
            await asyncio.wait({task}, timeout=SHUTDOWN_DEADLINE_S)
            raise GhostError(f"{name} did not stop within {deadline_s:.0f} s")
    await task


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def check_bind(host: str, token: str | None, needs: str = "a token (GHOST_TOKEN)") -> None:
    """Raise ConfigError for a bind address that others can reach, unless a token guards it: what it `needs`."""
    if host == "localhost" or token:
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(f"host {host!r} can be reached from other machines: set {needs}, or bind to 127.0.0.1")
