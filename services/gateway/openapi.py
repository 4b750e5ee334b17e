"""The API's description for /openapi.json, from the request schemas."""

from typing import Any

from pydantic.json_schema import models_json_schema

from services.gateway.operate import ApplyRequest, FaultRequest
from services.gateway.schemas import ChatRequest, CompletionRequest

Json = dict[str, Any]

_GETS = {
    "/v1/models": "The model that is served, as a list",
    "/v1/models/{model}": "One model",
    "/v1/fault_tolerance/status": "Ranks, spares, stores, protection and recoveries",
    "/v1/fault_tolerance/events": "The same at each change, as server-sent events `status` and `absent`",
    "/health": "200 while requests are served; 503 with the reason otherwise",
    "/live": "200 while the process runs",
    "/version": "GhostServe's version",
    "/metrics": "Prometheus metrics",
    "/": "The status page",
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


_REFUSED = {
    "description": "An error in OpenAI's shape",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def describe(version: str, *, keys: bool, allow_faults: bool = True) -> Json:
    """The OpenAPI document. `keys`: whether clients need an API key. `allow_faults`: whether that path is there."""
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in (CompletionRequest, ChatRequest, ApplyRequest, FaultRequest)],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Json] = {
        "/v1/completions": {"post": _post("Continue a prompt", "CompletionRequest")},
        "/v1/chat/completions": {"post": _post("Answer a conversation", "ChatRequest")},
        "/v1/fault_tolerance/apply": {
            "post": _begun("Move a rank to a spare, or let a worker be taken again", "ApplyRequest")
        },
        "/v1/fault_tolerance/faults": {
            "post": _begun("Break a worker; there only with --allow-faults", "FaultRequest")
        },
    }
    for path, summary in _GETS.items():
        codes = ("401", "403", "404", "503") if path.startswith("/v1/") else ("503",)
        responses = {"200": {"description": summary}, **dict.fromkeys(codes, _REFUSED)}
        paths[path] = {"get": {"summary": summary, "responses": responses}}
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    if not allow_faults:
        del paths["/v1/fault_tolerance/faults"]
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": "GhostServe", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": _ERROR}},
    }
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _begun(summary: str, schema: str) -> Json:
    operation = _post(summary, schema)
    del operation["responses"]["200"]
    return operation | {"responses": {"202": {"description": "It is being done"}} | operation["responses"]}


def _post(summary: str, schema: str) -> Json:
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        },
        "responses": {
            "200": {
                "description": "The answer; with stream: true as server-sent events",
                "content": {"application/json": {}, "text/event-stream": {}},
            },
            **dict.fromkeys(("400", "401", "403", "404", "408", "413", "415", "417", "429", "500", "503"), _REFUSED),
        },
    }
