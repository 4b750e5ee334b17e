"""The admin endpoint as an OpenAPI document, its answers taken from views.py."""

from functools import cache
from typing import Any

from pydantic import TypeAdapter

from services.parity_store import views
from services.parity_store.upkeep import Scrub
from shared.types import MAX_KEY_BYTES, PAGE_KEY_BYTES

MAX_LIMIT = 1000

_KEY = {"type": "string", "pattern": f"^([0-9a-fA-F]{{2}}){{{PAGE_KEY_BYTES},{MAX_KEY_BYTES}}}$"}
_PAGE_KEY: dict[str, object] = {"name": "page_key", "in": "path", "required": True, "schema": _KEY}
_CURSOR: dict[str, object] = {"name": "cursor", "in": "query", "schema": _KEY}
_LIMIT: dict[str, object] = {
    "name": "limit",
    "in": "query",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT},
}
_CAPACITY = {
    "type": "object",
    "required": ["capacity_bytes"],
    "properties": {"capacity_bytes": {"type": "integer", "minimum": 1}},
}


@cache
def document() -> dict[str, Any]:
    """Return the document."""
    stripe = {
        "get": _operation("One stripe's shards", views.StripeView, parameters=[_PAGE_KEY], errors=(400, 404)),
        "delete": _operation("Forget a stripe", views.ReleasedView, parameters=[_PAGE_KEY], errors=(400, 404)),
    }
    stripes = _operation("Stripes by key", views.StripesView, parameters=[_CURSOR, _LIMIT], errors=(400,))
    capacity = _operation("Change the capacity", views.CapacityView, errors=(400, 409))
    capacity["requestBody"] = {"required": True, "content": {"application/json": {"schema": _CAPACITY}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "GhostServe parity store, admin endpoint", "version": "1"},
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {view.__name__: _schema(view) for view in (views.StripeView, views.ShardView, Scrub)},
        },
        "paths": {
            "/admin/status": {"get": _operation("The store's state", views.StatusView)},
            "/admin/stripes": {"get": stripes},
            "/admin/stripes/{page_key}": stripe,
            "/admin/scrub": {"post": _operation("Check all checksums in the background", Scrub, status=202)},
            "/admin/drain": {"post": _operation("Empty the store, then leave", views.DrainView, status=202)},
            "/admin/capacity": {"put": capacity},
        },
    }


def _operation(
    summary: str,
    answer: type,
    *,
    status: int = 200,
    parameters: list[dict[str, object]] | None = None,
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    message = {"type": "object", "properties": {"message": {"type": "string"}, "code": {"type": "integer"}}}
    error = {"type": "object", "required": ["error"], "properties": {"error": message}}
    responses = {str(code): _response("refused", error) for code in (401, *errors)}
    responses[str(status)] = _response("done", _schema(answer))
    return {
        "summary": summary,
        "security": [{"token": []}],
        "parameters": parameters or [],
        "responses": responses,
    }


def _schema(view: type) -> dict[str, Any]:
    """Return a dataclass's schema; those that it contains are named in the document's components."""
    schema = TypeAdapter(view).json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return schema


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
