"""docs/api.md is what the OpenAPI documents say. `python -m tests.pure.test_api_docs` writes it anew."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.gateway.openapi import describe
from services.parity_store import openapi as store_openapi

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
Json = dict[str, Any]

HEAD = """# API

Written from the services' own OpenAPI documents (`/openapi.json` of a running gateway or parity store) by
`python -m tests.pure.test_api_docs`. Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
With `GHOST_API_KEYS`, paths under `/v1` need one as a bearer token; those under `/v1/fault_tolerance` need the
operators' token (`GHOST_OPERATOR_TOKEN`), which opens the others too; a parity store wants the cluster's token. A field
that is `null` is left out. Fields that would change the answer and are not listed here are refused by name, others are
ignored.
"""


def render() -> str:
    """The whole document."""
    parts = [HEAD, *_service("Gateway", describe("", keys=False)), *_service("Parity store", store_openapi.document())]
    return "\n".join(parts)


def _service(name: str, document: Json) -> Iterator[str]:
    schemas = document["components"]["schemas"]
    yield f"## {name}\n"
    yield "| | |\n| --- | --- |"
    operations = [(method, path, each) for path, item in document["paths"].items() for method, each in item.items()]
    for method, path, operation in operations:
        yield f"| `{method.upper()} {path}` | {operation['summary']} |"
    yield ""
    for method, path, operation in operations:
        body = operation.get("requestBody")
        if body:
            yield f"### {method.upper()} {path}\n"
            yield from _fields(body["content"]["application/json"]["schema"], schemas)
        answer = next(each for code, each in operation["responses"].items() if code.startswith("2"))
        schema = answer.get("content", {}).get("application/json", {}).get("schema")
        if schema and "properties" in schema:
            yield f"### {method.upper()} {path}: the answer\n"
            yield from _fields(schema, schemas)
    for title in ("ChatMessage", "ToolCall", "FunctionCall", "StreamOptions", "ShardView", "Scrub"):
        if title in schemas:
            yield f"### {title}\n"
            yield from _fields(schemas[title], schemas)


def _fields(schema: Json, schemas: Json) -> Iterator[str]:
    schema = schemas[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    required = schema.get("required", [])
    yield "| field | type | default | meaning |\n| --- | --- | --- | --- |"
    for name, field in schema["properties"].items():
        default = field.get("default")
        shown = "required" if name in required else "" if default in (None, "") else f"`{str(default).lower()}`"
        yield f"| `{name}` | {_type(field)} | {shown} | {field.get('description', '')} |".replace("  |", " |")
    yield ""


def _type(schema: Json) -> str:
    """A schema in words."""
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(each) for each in choices if each.get("type") != "null")
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "object")
    if kind == "array":
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of {_type(schema['items'])}{most}"
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum", schema.get("exclusiveMaximum"))
    if least is not None and most is not None and abs(most) < 10**6:
        return f"{kind}, {'above ' if 'exclusiveMinimum' in schema else ''}{least} to {most}"
    return f"{kind}, {least} or more" if least is not None and abs(least) < 10**6 else kind


def test_the_api_reference_is_that_of_the_services() -> None:
    assert DOCUMENT.read_text() == render(), "python -m tests.pure.test_api_docs writes it anew"


if __name__ == "__main__":
    DOCUMENT.write_text(render())
