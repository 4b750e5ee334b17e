"""The gateway service: HTTP on one side, the coordinator on the other."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aiohttp import web

from services.gateway import page
from services.gateway.account import Account
from services.gateway.answer import Answer
from services.gateway.bodies import SMALL_BYTES, Bodies, parse
from services.gateway.cluster import Cluster
from services.gateway.cors import Cors
from services.gateway.guard import Guard, client_keys, http_log
from services.gateway.intake import Job, prepare
from services.gateway.metrics import CONTENT_TYPE, Metrics
from services.gateway.openapi import describe
from services.gateway.operate import Operate
from services.gateway.prompts import ServedModel
from services.gateway.schemas import ChatRequest, CompletionRequest
from services.gateway.tokenizer import Tokenizer
from shared.config import GatewaySettings
from shared.errors import ModelError, RequestRejected
from shared.port import serving
from shared.tls import server_context
from shared.tracing import Tracing, tracing
from shared.types import EMBEDDED, ClusterStatus

log = logging.getLogger(__name__)

ACCEPT_DEADLINE_S = 15.0
RELOAD_S = 10.0
SHUTDOWN_S = 3.0
LOGGED_PROMPT_BYTES = 4096

Json = dict[str, Any]


async def run(
    settings: GatewaySettings, stop: asyncio.Event, on_listening: Callable[[str], None] | None = None
) -> None:
    """Serve until `stop` is set, and what was taken before that to its end, or for `drain_s`.

    `on_listening` is told the base URL once the port is open.
    """
    with tracing("gateway") as traces, contextlib.closing(Gateway(settings, traces)) as gateway:
        await _run(gateway, settings, stop, on_listening)


async def _run(
    gateway: "Gateway", settings: GatewaySettings, stop: asyncio.Event, on_listening: Callable[[str], None] | None
) -> None:
    async with serving(
        gateway.application(),
        settings.host,
        settings.port,
        tls=server_context(settings),
        most=settings.max_connections,
        refuse=gateway.guard.refuse,
        shutdown_s=SHUTDOWN_S,
        cancels=True,
        logger=http_log(),
    ) as port:
        gateway.guard.is_full = lambda: port.is_full
        log.info("gateway listening on %s", port.url)
        if on_listening is not None:
            on_listening(port.url)
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(gateway.cluster.run()), tasks.create_task(gateway.keep_tokenizer())]
                await stop.wait()
                port.stop_listening()
                await gateway.cluster.drain(settings.drain_s)
                gateway.cluster.stop()
                for task in background:
                    task.cancel()
        finally:
            gateway.cluster.stop()


class Gateway:
    """The request handlers, and what they share. Raises ConfigError for a bind that nothing guards."""

    def __init__(self, settings: GatewaySettings, tracing: Tracing):
        self.tracing = tracing
        self._settings = settings
        self._keys = client_keys(settings)
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_problem = "the tokenizer is not loaded yet"
        self._version = _version()
        self._created = int(time.time())
        self.cluster = Cluster(settings)
        self._operate = Operate(self.cluster, self._version, allow_faults=settings.allow_faults)
        self.metrics = Metrics(lambda: self.cluster.in_flight, lambda: self._trouble() is None)
        operator = settings.operator_token.get_secret_value() if settings.operator_token else ""
        self.guard = Guard(self._keys, operator, self.metrics)
        self._bodies = Bodies(int(settings.max_body_mb * 2**20))
        self._small = ThreadPoolExecutor(2, "small bodies")
        self._large = ThreadPoolExecutor(1, "large bodies")

    def close(self) -> None:
        """End the threads; what they have not begun is dropped."""
        for lane in (self._small, self._large):
            lane.shutdown(wait=False, cancel_futures=True)

    def application(self) -> web.Application:
        """The aiohttp application with all routes."""
        application = web.Application(middlewares=[self.guard.__call__])
        Cors(self._settings.cors_origins).join(application)
        application.add_routes(
            [
                web.post("/v1/completions", functools.partial(self._generate, CompletionRequest)),
                web.post("/v1/chat/completions", functools.partial(self._generate, ChatRequest)),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.get("/health", self._health),
                web.get("/live", self._live),
                web.get("/version", self._show_version),
                web.get("/metrics", self._show_metrics),
                web.get("/openapi.json", self._openapi),
                *self._operate.routes(),
                *page.routes(),
            ]
        )
        return application

    async def keep_tokenizer(self) -> None:
        """Load the tokenizer once the model is known, and again when another model is served; until cancelled."""
        loaded = ""
        while True:
            changed = self.cluster.changed
            status = self.cluster.status
            named = status.model.model_dir if status is not None and status.model is not None else ""
            source = named if self._settings.model in ("", "default") else self._settings.model
            if source in ("", loaded) or (status is not None and status.engine != EMBEDDED):
                await changed.wait()
                continue
            try:
                self._tokenizer = await asyncio.to_thread(Tokenizer.load, source)
                loaded = source
                log.info("tokenizer of %s loaded", source)
            except ModelError as error:
                if self._tokenizer_problem != str(error):
                    log.error("%s", error)
                self._tokenizer_problem = str(error)
                await asyncio.sleep(RELOAD_S)

    async def _generate(
        self, kind: type[CompletionRequest] | type[ChatRequest], request: web.Request
    ) -> web.StreamResponse:
        try:
            with Account(request, self.metrics, self.tracing) as account:
                job = account.begins(await self._job(kind, request, self._serving()))
                async with self.cluster.open(job.sequences) as call:
                    await call.accepted(ACCEPT_DEADLINE_S)
                    answer = Answer(job, call, self.metrics, account.started)
                    if job.request.stream:
                        response = await answer.stream(request)
                    else:
                        headers = {"X-Request-Id": job.reply_id}
                        body = await answer.collect()
                        response = web.Response(body=body, content_type="application/json", headers=headers)
                    account.outcome = answer.outcome
                    return response
        except ConnectionError:
            return web.Response(status=499)  # the client is away: nobody reads it

    async def _job(
        self, kind: type[CompletionRequest] | type[ChatRequest], request: web.Request, serving: ServedModel
    ) -> Job:
        """The request made ready, in a thread: one for large bodies, so that they wait for each other only."""
        async with self._bodies.read(request) as body:
            if self._settings.log_prompts:
                log.info("asked", extra={"body": body[:LOGGED_PROMPT_BYTES].decode(errors="replace")})
            lane = self._small if len(body) <= SMALL_BYTES else self._large
            job = await asyncio.get_running_loop().run_in_executor(lane, _prepare, kind, body, serving)
        if job.request.return_kv_digest:
            self.guard.check_operator(request)
        return job

    def _serving(self) -> ServedModel:
        """What is needed to take a request. Raises RequestRejected (503) if it is not known.

        A group in recovery still takes requests: the coordinator queues them.
        """
        status = self.cluster.status
        if status is None:
            raise _unavailable(self.cluster.absence or "no status")
        if status.engine != EMBEDDED:
            raise RequestRejected(f"requests go to {status.engine}, by its own API", code="hosted_engine")
        if status.model is None or status.max_model_len <= 0:
            raise _unavailable(f"the model is not loaded yet: {status.detail or status.state}")
        if self._tokenizer is None:
            raise _unavailable(self._tokenizer_problem)
        model = status.model
        return ServedModel(
            tokenizer=self._tokenizer,
            model=_model_name(status),
            max_model_len=status.max_model_len,
            vocab_size=model.vocab_size,
            fingerprint=model.fingerprint,
        )

    def _trouble(self) -> str | None:
        """Why a request would not be served right now; None if it would."""
        status = self.cluster.status
        try:
            if status is None or status.engine == EMBEDDED:
                self._serving()
        except RequestRejected as error:
            return str(error)
        if status is not None and status.state != "serving":
            return status.detail or status.state
        return None

    async def _health(self, request: web.Request) -> web.Response:
        trouble, status = self._trouble(), self.cluster.status
        body: Json = {"status": "ok" if trouble is None else "unavailable", "detail": trouble or ""}
        if status is not None:
            body |= {"state": status.state, "epoch": status.epoch, "can_lose": status.can_lose}
        return web.json_response(body, status=200 if trouble is None else 503)

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _show_version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self._version})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(
            describe(self._version, keys=bool(self._keys), allow_faults=self._settings.allow_faults)
        )

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: web.Request) -> web.Response:
        card, name = self._model_card(), request.match_info["model"]
        if name != card["id"]:
            raise RequestRejected(
                f"The model {name[:100]!r} does not exist", status=404, code="model_not_found", param="model"
            )
        return web.json_response(card)

    def _model_card(self) -> Json:
        status = self.cluster.status
        if status is None or status.model is None:
            raise _unavailable(self.cluster.absence or "the model is not loaded yet")
        return {
            "id": _model_name(status),
            "object": "model",
            "created": self._created,
            "owned_by": "ghostserve",
            "max_model_len": status.max_model_len,
        }


def _prepare(kind: type[CompletionRequest] | type[ChatRequest], body: bytes, serving: ServedModel) -> Job:
    return prepare(parse(kind, body), serving)


def _model_name(status: ClusterStatus) -> str:
    return status.served_name or (Path(status.model.model_dir).name if status.model else "")


def _unavailable(detail: str) -> RequestRejected:
    return RequestRejected(detail, status=503, code="unavailable")


def _version() -> str:
    try:
        return version("ghostserve")
    except PackageNotFoundError:
        return "0.0.0"
