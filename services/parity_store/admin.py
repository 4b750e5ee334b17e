"""The store's admin endpoint: HTTP on a port of its own, guarded by the cluster token where one is set."""

import hmac
import json
import time
import typing
from collections import Counter
from dataclasses import asdict

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.parity_store import openapi
from services.parity_store.arena import Arena
from services.parity_store.shards import Shard
from services.parity_store.store import Store
from services.parity_store.upkeep import Upkeep
from services.parity_store.views import CapacityView, DrainView, ShardView, StatusView
from shared.errors import ConfigError
from shared.transport.server import BulkServer, Refused
from shared.types import MAX_KEY_BYTES, PAGE_KEY_BYTES, PageKey, StoreInfo, is_page_key

_OPEN_PATHS = ("/health", "/live", "/openapi.json")


class Admin:
    """The endpoint's handlers, over a store.

    Kept by the app: `connected`, whether the coordinator is there, and `info`, what the store said of itself last.
    """

    def __init__(self, store: Store, arena: Arena, bulk: BulkServer, info: StoreInfo, upkeep: Upkeep):
        self._upkeep = upkeep
        self.connected = False
        self._store = store
        self._arena = arena
        self.info = info
        self._started = time.monotonic()
        self._registry = CollectorRegistry()
        self._refused: Counter[int] = Counter()  # calls, by status
        self._registry.register(_StoreCollector(store, arena, bulk, self._refused))
        ProcessCollector(registry=self._registry)

    def application(self, token: str | None) -> web.Application:
        """Return the aiohttp application; with a token, all but /health and /live need it as a bearer token."""
        application = web.Application(
            middlewares=[_errors_as_json(self._refused), _guard(token)], client_max_size=64 * 1024
        )
        application.add_routes(
            [
                web.get("/health", self._health),
                web.get("/live", self._live),
                web.get("/metrics", self._metrics),
                web.get("/openapi.json", self._openapi),
                web.get("/admin/status", self._status),
                web.get("/admin/stripes", self._stripes),
                web.get("/admin/stripes/{page_key}", self._stripe),
                web.delete("/admin/stripes/{page_key}", self._delete_stripe),
                web.post("/admin/scrub", self._scrub),
                web.post("/admin/drain", self._drain),
                web.put("/admin/capacity", self._capacity),
            ]
        )
        return application

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.json_response(openapi.document())

    async def _health(self, _: web.Request) -> web.Response:
        """200 only where the store can do all that it is for: take shards, index them, and be known."""
        reasons = []
        if not self.connected:
            reasons.append("no connection to the coordinator")
        if self._store.writer.is_away:
            reasons.append("the stripe index is away")
        return web.json_response(
            {"status": "unhealthy" if reasons else "healthy", "reasons": reasons}, status=503 if reasons else 200
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), content_type="text/plain", charset="utf-8")

    async def _status(self, _: web.Request) -> web.Response:
        table, writer = self._store.table, self._store.writer
        status = StatusView(
            store_id=self.info.store_id,
            incarnation=self.info.incarnation,
            bulk_address=self.info.bulk_address,
            connected=self.connected,
            index="away" if writer.is_away else "ok",
            uptime_s=round(time.monotonic() - self._started, 3),
            capacity_bytes=self._arena.capacity_bytes,
            used_bytes=self._arena.used_bytes,
            stripes=table.stripe_count,
            shards=table.count,
            index_queue=writer.queued,
            epochs=table.epochs,
            totals=asdict(self._store.totals),
            draining=self._store.draining,
            scrub=self._upkeep.scrub,
        )
        return web.json_response(asdict(status))

    async def _stripes(self, request: web.Request) -> web.Response:
        after = _page_key(request.query["cursor"], "cursor") if "cursor" in request.query else b""
        limit = _limit(request.query.get("limit", "100"))
        keys = self._store.table.stripes(after, limit + 1)
        stripes = [self._view(key) for key in keys[:limit]]
        return web.json_response({"stripes": stripes, "next_cursor": keys[limit - 1].hex() if keys[limit:] else None})

    async def _stripe(self, request: web.Request) -> web.Response:
        page_key = _page_key(request.match_info["page_key"], "page_key")
        if not self._store.table.stripe(page_key):
            raise web.HTTPNotFound(text=f"no shard of stripe {page_key.hex()} in this store")
        return web.json_response(self._view(page_key))

    async def _delete_stripe(self, request: web.Request) -> web.Response:
        page_key = _page_key(request.match_info["page_key"], "page_key")
        groups = {shard.group for shard in self._store.table.stripe(page_key)}
        released = sum(self._store.release(group, [page_key]) for group in groups)
        if not released:
            raise web.HTTPNotFound(text=f"no shard of stripe {page_key.hex()} in this store")
        return web.json_response({"page_key": page_key.hex(), "released_shards": released})

    async def _scrub(self, _: web.Request) -> web.Response:
        self._upkeep.start_scrub()
        return web.json_response(asdict(self._upkeep.scrub), status=202)

    async def _drain(self, _: web.Request) -> web.Response:
        self._upkeep.start_drain()
        return web.json_response(asdict(DrainView(True, self._store.table.count)), status=202)

    async def _capacity(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
            wanted = body["capacity_bytes"]
            if isinstance(wanted, bool) or wanted != int(wanted):  # 5.0 is an integer in JSON
                raise TypeError
            self._arena.resize(int(wanted))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise web.HTTPBadRequest(text='the body must be {"capacity_bytes": N}') from error
        except ConfigError as error:
            raise web.HTTPConflict(text=str(error)) from error
        return web.json_response(asdict(CapacityView(self._arena.capacity_bytes, self._arena.used_bytes)))

    def _view(self, page_key: PageKey) -> dict[str, object]:
        shards = [asdict(_shard_view(shard, time.time())) for shard in self._store.table.stripe(page_key)]
        return {"page_key": page_key.hex(), "shards": shards}


class _StoreCollector(Collector):
    """The store's figures for Prometheus, read when it asks."""

    def __init__(self, store: Store, arena: Arena, bulk: BulkServer, requests: Counter[int]):
        self._store = store
        self._arena = arena
        self._bulk = bulk
        self._requests = requests

    def collect(self) -> list[Metric]:
        """Return all metrics of the store."""
        table, writer, totals = self._store.table, self._store.writer, self._store.totals
        shards = CounterMetricFamily("ghostserve:store_shards", "Shards by what was done with them", labels=["outcome"])
        for outcome, count in (
            ("stored", totals.puts),
            ("refused", totals.refused_puts),
            ("read", totals.gets),
            ("missing", totals.refused_gets),
            ("released", totals.released),
        ):
            shards.add_metric([outcome], count)
        transferred = CounterMetricFamily("ghostserve:store_bytes", "Shard bytes moved", labels=["direction"])
        transferred.add_metric(["in"], totals.bytes_in)
        transferred.add_metric(["out"], totals.bytes_out)
        connections = CounterMetricFamily(
            "ghostserve:store_refused_connections", "Bulk connections closed for what they said", labels=["reason"]
        )
        for reason in typing.get_args(Refused):
            connections.add_metric([reason], self._bulk.refused[reason])
        requests = CounterMetricFamily(
            "ghostserve:store_refused_requests", "Calls of the admin endpoint refused, by status", labels=["code"]
        )
        for code, count in sorted(self._requests.items()):
            requests.add_metric([str(code)], count)
        return [
            shards,
            transferred,
            connections,
            requests,
            GaugeMetricFamily("ghostserve:store_capacity_bytes", "Size of the arena", self._arena.capacity_bytes),
            GaugeMetricFamily("ghostserve:store_used_bytes", "Bytes of the arena in use", self._arena.used_bytes),
            GaugeMetricFamily("ghostserve:store_stripes", "Stripes with a shard here", table.stripe_count),
            GaugeMetricFamily("ghostserve:store_shards_held", "Shards here", table.count),
            GaugeMetricFamily("ghostserve:store_index_queue", "Shards whose index write is pending", writer.queued),
            GaugeMetricFamily("ghostserve:store_index_away", "1 while the index can't be reached", writer.is_away),
        ]


def _guard(token: str | None) -> Middleware:
    """Return the middleware that asks for the token."""
    wanted = f"Bearer {token}".encode()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if token is not None and request.path not in _OPEN_PATHS and not hmac.compare_digest(given, wanted):
            raise web.HTTPUnauthorized(text="wrong or missing token", headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return guard


def _errors_as_json(refused: Counter[int]) -> Middleware:
    """Return the middleware that puts refusals into JSON, and counts them."""

    @web.middleware
    async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status >= 400:
                refused[error.status] += 1
                error.text = json.dumps({"error": {"message": error.text, "code": error.status}})
                error.content_type = "application/json"
            raise

    return errors_as_json


def _page_key(text: str, name: str) -> PageKey:
    try:
        page_key = bytes.fromhex(text)
    except ValueError:
        page_key = b""
    if not is_page_key(page_key):
        raise web.HTTPBadRequest(text=f"{name} must be {2 * PAGE_KEY_BYTES} to {2 * MAX_KEY_BYTES} hexadecimal digits")
    return page_key


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6 or not 1 <= int(text) <= openapi.MAX_LIMIT:
        raise web.HTTPBadRequest(text=f"limit must be a number from 1 to {openapi.MAX_LIMIT}")
    return int(text)


def _shard_view(shard: Shard, now: float) -> ShardView:
    label = shard.label
    return ShardView(
        group=shard.group,
        number=label.number,
        k=label.k,
        m=label.m,
        epoch=shard.epoch,
        bytes=label.length,
        checksum=f"{label.checksum:016x}",
        data_checksums=[f"{checksum:016x}" for checksum in label.data_checksums],
        age_s=round(now - shard.stored_at, 3),
        readers=shard.pins,
    )
