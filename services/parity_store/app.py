"""The parity store service: bulk transport, stripe index, admin endpoint, and the channel to the coordinator."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

from services.parity_store import faults
from services.parity_store.admin import Admin
from services.parity_store.arena import Arena
from services.parity_store.index_writer import IndexWriter
from services.parity_store.rebuild import keep_index
from services.parity_store.shards import ShardTable
from services.parity_store.store import Store
from services.parity_store.upkeep import Upkeep
from shared import channel
from shared.config import ParityStoreSettings, default_name
from shared.errors import GhostError, PeerLost, ProtocolError
from shared.messages import (
    EpochNow,
    FindShards,
    Goodbye,
    KeepStripes,
    Message,
    ReleaseStripes,
    ShardsFound,
    StoreHello,
    Welcome,
)
from shared.port import serving
from shared.service import check_bind
from shared.sockets import bracketed
from shared.stripe_index import StripeIndex
from shared.tls import client_context, server_context
from shared.transport.backends import choose
from shared.transport.server import serve
from shared.types import StoreInfo

log = logging.getLogger(__name__)

_INDEX_PAUSE_S = 2.0


async def run(
    settings: ParityStoreSettings, stop: asyncio.Event, on_listening: Callable[[str], None] | None = None
) -> None:
    """Be a parity store until the event is set. Raises ConfigError for settings that can't work.

    `on_listening` is told the admin URL once both ports are open.
    """
    check_bind(settings.host, settings.secret)
    incarnation = os.urandom(8).hex()
    store_id = settings.name or f"{default_name('store')}-{settings.port or incarnation[:8]}"
    scheme, why = choose(settings.transport)
    arena = Arena(settings.capacity_mb << 20)
    async with StripeIndex(settings.redis_url) as index:
        writer = IndexWriter(index, store_id, incarnation)
        store = Store(ShardTable(arena), writer)
        if settings.fault_dir:
            faults.arm(store, settings.fault_dir)
        async with serve(
            f"{scheme}://{bracketed(settings.host)}:{settings.port}", store, token=settings.secret or ""
        ) as bulk:
            info = StoreInfo(store_id, incarnation, bulk.address, "", arena.capacity_bytes)
            upkeep = Upkeep(store, index, store_id, incarnation)
            admin = Admin(store, arena, bulk, info, upkeep)
            async with serving(
                admin.application(settings.secret),
                settings.host,
                settings.admin_port,
                tls=server_context(settings),
                shutdown_s=1.0,
            ) as port:
                admin_url = port.url
                admin.info = info = replace(info, admin_url=admin_url)
                log.info("transport %s: %s", scheme, why)
                log.info("store %s: bulk %s, admin %s, %d MiB", store_id, bulk.address, admin_url, settings.capacity_mb)
                if on_listening is not None:
                    on_listening(admin_url)
                async with asyncio.TaskGroup() as tasks:
                    running = [
                        tasks.create_task(writer.run(), name="index writer"),
                        tasks.create_task(_follow(settings, store, admin, info, upkeep), name="coordinator"),
                        tasks.create_task(upkeep.run_scrubs(), name="scrub"),
                        tasks.create_task(_forget_former_lives(index, store_id, incarnation), name="former lives"),
                        tasks.create_task(
                            keep_index(index, store.table, writer, store_id, incarnation), name="keep index"
                        ),
                    ]
                    ends: list[asyncio.Task[object]] = [
                        tasks.create_task(stop.wait()),
                        tasks.create_task(upkeep.drained(), name="drain"),
                    ]
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    if not stop.is_set():
                        log.info("drained: nothing is left here")
                    upkeep.take_leave()
                    for task in (*running, *ends):
                        task.cancel()
        store.table.check()


async def _forget_former_lives(index: StripeIndex, store_id: str, incarnation: str) -> None:
    """Clear the index, once, of what this store held before it was started."""
    while True:
        try:
            count = await index.forget_former_lives(store_id, incarnation)
        except PeerLost as error:
            log.info("entries of former lives stay for now: %s", error)
            await asyncio.sleep(_INDEX_PAUSE_S)
            continue
        if count:
            log.info("%d entries of former lives are deleted", count)
        return


async def _follow(settings: ParityStoreSettings, store: Store, admin: Admin, info: StoreInfo, upkeep: Upkeep) -> None:
    """Keep a channel to the coordinator, dialled again whenever it breaks, and do what it says.

    Raises GhostError if the coordinator does not want this store at all.
    """

    def hello(own_address: str) -> StoreHello:
        admin.info = _reached_by(info, settings.advertise_host or own_address)
        return StoreHello(admin.info)

    tls = client_context(settings.tls_ca_file)
    told = ""
    while True:
        try:
            dialled = channel.dial(settings.coordinator_url, settings.secret, hello, settings.dial_deadline_s, tls)
            async with dialled as (link, answer):
                _obey(store, answer, link.send)
                admin.connected = True
                upkeep.channel = link
                upkeep.say_drains()
                async for message in link:
                    _obey(store, message, link.send)
            log.warning("the coordinator closed the channel")
        except (PeerLost, ProtocolError) as error:
            log.log(logging.DEBUG if str(error) == told else logging.WARNING, "%s", error)
            told = str(error)
        finally:
            admin.connected = False
            upkeep.channel = None
        await asyncio.sleep(channel.REDIAL_S)


def _obey(store: Store, message: Message, answer: Callable[[Message], None]) -> None:
    match message:
        case Welcome():
            store.advance_epoch(message.config.group, message.epoch)
        case EpochNow():
            store.advance_epoch(message.group, message.epoch)
        case ReleaseStripes():
            store.release(message.group, message.keys, (message.epoch, message.serial))
        case KeepStripes():
            store.keep(message)
        case FindShards():
            answer(ShardsFound(message.question, store.find(message.group, message.keys)))
        case Goodbye(final=True):
            raise GhostError(f"the coordinator does not want this store: {message.reason}")
        case Goodbye():
            raise PeerLost(f"the coordinator said goodbye: {message.reason}")
        case _:
            raise ProtocolError(f"the coordinator sent a store {type(message).__name__}")


def _reached_by(info: StoreInfo, host: str) -> StoreInfo:
    """The store's addresses as other hosts reach them: what it listens on may be a wildcard."""
    bulk, admin = urlsplit(info.bulk_address), urlsplit(info.admin_url)
    return replace(
        info,
        bulk_address=f"{bulk.scheme}://{bracketed(host)}:{bulk.port}",
        admin_url=f"{admin.scheme}://{bracketed(host)}:{admin.port}",
    )
