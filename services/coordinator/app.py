"""The coordinator's process: control channels in, one group behind them."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

from aiohttp import web

from services.coordinator.events import Hello
from services.coordinator.group import Group
from services.coordinator.membership.journal import Journal
from services.coordinator.membership.lease import Lease
from services.coordinator.recording.recorder import Recorder
from services.coordinator.shell import Shell
from services.coordinator.views.metrics import CONTENT_TYPE
from shared.channel import CHANNEL_PATH, Channel, accept
from shared.config import CoordinatorSettings
from shared.errors import ConfigError, GhostError, PeerLost
from shared.messages import Goodbye
from shared.port import serving
from shared.service import check_bind
from shared.stripe_index import StripeIndex
from shared.tls import server_context
from shared.tracing import tracing
from shared.types import GroupConfig

log = logging.getLogger(__name__)

REDIS_PAUSE_S = 0.2
SHELL_WAIT_S = 1.0
"""Who dials while the last epoch is read is kept waiting for so long, rather than sent away at once."""
REDIS_CALL_S = 0.5
"""Of each call: a recovery does not wait longer before it asks the stores."""
CLOSE_DEADLINE_S = 2.0


class Front:
    """What stands behind the HTTP side: the shell, once Redis has told the last epoch; before, what it waits for."""

    def __init__(self) -> None:
        self.waits = "the last epoch is read from Redis"
        self.shell: asyncio.Future[Shell] = asyncio.get_running_loop().create_future()


FRONT = web.AppKey("front", Front)
TOKEN = web.AppKey("token", object)


async def run(
    settings: CoordinatorSettings, stop: asyncio.Event, on_listening: Callable[[str], None] | None = None
) -> None:
    """Serve until `stop` is set; without a Redis wait for it. Raises ConfigError for settings that can't be."""
    check_bind(settings.host, settings.secret)
    tls = server_context(settings)
    config = group_config(settings)
    front = Front()
    async with AsyncExitStack() as stack:
        index = await stack.enter_async_context(StripeIndex(settings.redis_url, timeout=REDIS_CALL_S))
        traces = stack.enter_context(tracing("coordinator"))
        journal = Journal(index, config.group)
        async with serving(
            application(front, settings.secret),
            settings.host,
            settings.port,
            tls=tls,
            scheme="ws",
            shutdown_s=CLOSE_DEADLINE_S,
        ) as port:
            log.info("coordinator of group %s listens on %s", config.group, port.url)
            if on_listening:
                on_listening(port.url)
            lease = Lease(index, config.group, port.url)
            async with _leading(lease, front, stop) as leads:
                if leads and (last := await _last(journal, front, stop)) is not None:
                    epoch, cordons = last
                    group = Group(config, settings, epoch, time.monotonic(), traces, cordons)
                    shell = Shell(group, index, journal, Recorder(group, settings) if settings.record_dir else None)
                    front.shell.set_result(shell)
                    await shell.run(stop)


@contextlib.asynccontextmanager
async def _leading(lease: Lease, front: Front, stop: asyncio.Event) -> AsyncIterator[bool]:
    """Lead the group as long as this is entered. False: told to stop before the lease was had.

    Raises ConfigError where another coordinator leads it, and GhostError when another one has come to.
    """

    def tell(what: str) -> None:
        if front.waits != what:
            log.warning("%s", what)
        front.waits = what

    taking, stopped = asyncio.create_task(lease.take(tell)), asyncio.create_task(stop.wait())
    await asyncio.wait({taking, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not taking.done():
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        yield False
        return
    await taking
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lease.keep(), name="lease")
        try:
            yield True
        finally:
            lease.end()
    await lease.leave()


async def _last(journal: Journal, front: Front, stop: asyncio.Event) -> tuple[int, dict[str, int | None]] | None:
    """What an earlier coordinator left, from where this one goes on; None: it is told to stop before."""
    told = False
    while not stop.is_set():
        try:
            return await journal.last()
        except PeerLost as error:
            front.waits = f"Redis does not tell the last epoch: {error}"
            if not told:
                log.warning("%s; waiting for it", front.waits)
            told = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REDIS_PAUSE_S):
                await stop.wait()
    return None


def group_config(settings: CoordinatorSettings) -> GroupConfig:
    """The group's configuration from the coordinator's settings. Raises ConfigError for what can't be."""
    if settings.parity + settings.tp > 256:
        raise ConfigError(f"--tp {settings.tp} and --parity {settings.parity}: together at most 256")
    served = settings.served_name or settings.model.rstrip("/").rsplit("/", 1)[-1]
    return GroupConfig(
        group=settings.group,
        model=settings.model,
        served_name=served,
        dtype=settings.dtype,
        size=settings.tp,
        parity=settings.parity,
        protection=settings.protection,
        engine=settings.engine,
        page_tokens=settings.page_tokens,
        kv_bytes=settings.kv_memory_mb << 20,
        max_step_tokens=settings.max_step_tokens,
        max_batch=settings.max_batch,
        communicator=settings.communicator,
        heartbeat_s=settings.heartbeat_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        collective_timeout_s=settings.collective_timeout_s,
        logits_bytes=settings.logits_mb << 20,
    )


def application(front: Front, token: str | None) -> web.Application:
    """The HTTP side: the control channel, and health for those who watch."""
    app = web.Application()
    app[FRONT] = front
    app[TOKEN] = token
    app.router.add_get(CHANNEL_PATH, _channel)
    app.router.add_get("/live", _live)
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    return app


async def _live(request: web.Request) -> web.Response:
    return web.json_response({"status": "live"})


async def _health(request: web.Request) -> web.Response:
    front = request.app[FRONT]
    if not front.shell.done():
        return web.json_response({"state": "starting", "detail": front.waits, "epoch": 0}, status=503)
    status = front.shell.result().group.status()
    body = {"state": status.state, "detail": status.detail, "epoch": status.epoch}
    return web.json_response(body, status=200 if status.state == "serving" else 503, dumps=json.dumps)


async def _metrics(request: web.Request) -> web.Response:
    shell = await _shell(request)
    return web.Response(body=shell.group.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def _shell(request: web.Request) -> Shell:
    """Raises HTTPServiceUnavailable if it is not there soon: who dials tries again."""
    front = request.app[FRONT]
    await asyncio.wait({front.shell}, timeout=SHELL_WAIT_S)
    if not front.shell.done():
        raise web.HTTPServiceUnavailable(text=f"{front.waits}\n")
    return front.shell.result()


async def _channel(request: web.Request) -> web.WebSocketResponse:
    shell, token = await _shell(request), request.app[TOKEN]
    socket, hello = await accept(request, str(token) if token is not None else None)
    if hello is None:
        return socket
    peer = getattr(hello, "name", None) or type(hello).__name__
    async with Channel(socket, peer) as channel:
        try:
            if isinstance(hello, Hello):
                await shell.serve(hello, channel)
            else:
                channel.send(Goodbye(f"a hello was expected, not {type(hello).__name__}", final=True))
        except (GhostError, ConnectionError) as error:
            log.warning("channel to %s: %s", peer, error)
    return socket
