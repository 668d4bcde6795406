"""What OpenAPI says of routes that read their bodies themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

JSON, FORM = "application/json", "multipart/form-data"


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error."""

    error: Problem


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "A value that is wrong; param names it",
        401: "No key, or an unknown one",
        403: "A page of another site asked",
        404: "No such thing",
        413: "The body is too large",
        415: "A body of another kind",
        429: "The queue is full; see Retry-After",
        500: "The server failed",
        503: "Loading, restarting or shutting down; see Retry-After",
        507: "The disk is full",
    }.items()
}


def described(
    kind: str | None = None, body: type[BaseModel] | None = None, files: tuple[str, ...] = (), also: str | None = None
) -> dict[str, Any]:
    """Arguments for a route: its errors, and the schema of its body, with files beside the fields of a form. `also` is
    another kind of body that takes the same fields."""
    options: dict[str, Any] = {"responses": ERRORS}
    if kind is not None and body is not None:
        schemas = {kind: _schema(body, files), **({} if also is None else {also: _schema(body, ())})}
        options["openapi_extra"] = {
            "requestBody": {"required": True, "content": {name: {"schema": schema} for name, schema in schemas.items()}}
        }
    return options


def _schema(body: type[BaseModel], files: tuple[str, ...]) -> dict[str, Any]:
    schema = body.model_json_schema(ref_template="#/{model}")
    definitions = schema.pop("$defs", {})
    inlined = _inline(schema, definitions)
    for name in files:
        inlined["properties"][name] = {"type": "string", "format": "binary"}
    return inlined


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its definitions in place, since a route can't add to the document's own."""
    if isinstance(node, dict):
        if "$ref" in node:
            return _inline(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
        return {key: _inline(value, definitions) for key, value in node.items()}
    return [_inline(item, definitions) for item in node] if isinstance(node, list) else node
