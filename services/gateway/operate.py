"""What operators ask of a gateway: the cluster's state, once or live, and faults where they are allowed."""

import asyncio
import dataclasses
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from services.gateway import sse
from services.gateway.bodies import SMALL_BYTES, Bodies
from services.gateway.cluster import Cluster
from shared.errors import RequestRejected
from shared.messages import InjectFault
from shared.types import ClusterStatus, Fault, OperatorAction

LEAST_PAUSE_S = 0.1
"""Between two events of one stream: a burst of changes is told as the last of them."""

Json = dict[str, Any]
Body = TypeVar("Body", bound=BaseModel)


class FaultRequest(BaseModel):
    """Body of POST /v1/fault_tolerance/faults."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    fault: Fault = Field(description="kill: the worker kills itself")
    worker: str = Field(description="its name, as in the status")


class ApplyRequest(BaseModel):
    """Body of POST /v1/fault_tolerance/apply."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    action: OperatorAction = Field(
        description="drain: move the rank and take its worker no more; replace: move it; resume: take the worker again"
    )
    target: str = Field(max_length=200, description="rank:N, or worker:NAME")


class Operate:
    """The handlers under /v1/fault_tolerance."""

    def __init__(self, cluster: Cluster, version: str, *, allow_faults: bool):
        self._cluster = cluster
        self._version = version
        self._allow_faults = allow_faults
        self._bodies = Bodies(SMALL_BYTES)

    def routes(self) -> list[web.RouteDef]:
        """The routes; that for faults is there only where they are allowed."""
        routes = [
            web.get("/v1/fault_tolerance/status", self._status),
            web.get("/v1/fault_tolerance/events", self._events),
            web.post("/v1/fault_tolerance/apply", self._apply),
        ]
        return [*routes, web.post("/v1/fault_tolerance/faults", self._fault)] if self._allow_faults else routes

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self._view(self._known()))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """The state now and at each change, at least once a second, as events `status` or `absent`."""
        async with sse.Stream(request) as stream:
            while not self._cluster.leaving:
                changed = self._cluster.changed
                status = self._cluster.status
                if status is not None:
                    event = sse.event(to_json(self._view(status)), "status")
                else:
                    event = sse.event(to_json({"detail": self._cluster.absence or "no status"}), "absent")
                await stream.write(event)
                await asyncio.sleep(LEAST_PAUSE_S)
                await changed.wait()
        return stream.response

    async def _fault(self, request: web.Request) -> web.Response:
        asked = await self._parsed(FaultRequest, request)
        if asked.worker not in [worker.name for worker in self._known().workers]:
            raise RequestRejected(f"no worker {asked.worker[:100]!r} is here", status=404, code="not_found")
        self._cluster.send(InjectFault(asked.worker, asked.fault))
        return web.json_response({"worker": asked.worker, "fault": asked.fault}, status=202)

    async def _apply(self, request: web.Request) -> web.Response:
        """Have the coordinator move a rank, or take a worker back. 202: what will happen; the status tells the rest."""
        asked = await self._parsed(ApplyRequest, request)
        told = await self._cluster.apply(asked.action, asked.target)
        return web.json_response({"action": asked.action, "target": asked.target, "message": told}, status=202)

    async def _parsed(self, kind: type[Body], request: web.Request) -> Body:
        """The request's body. Raises RequestRejected."""
        async with self._bodies.read(request) as body:
            try:
                return kind.model_validate_json(body)
            except ValidationError as error:
                problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
                param = ".".join(str(part) for part in problem["loc"])
                raise RequestRejected(problem["msg"], param=param) from error

    def _known(self) -> ClusterStatus:
        status = self._cluster.status
        if status is None:
            raise RequestRejected(self._cluster.absence or "no status", status=503, code="unavailable")
        return status

    def _view(self, status: ClusterStatus) -> Json:
        gateway = {
            "version": self._version,
            "in_flight": self._cluster.in_flight,
            "allow_faults": self._allow_faults,
        }
        return dataclasses.asdict(status) | {"gateway": gateway}
