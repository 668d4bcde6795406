"""What OpenAPI says of routes that read their bodies themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel

from stepwell.api.answers import ErrorAnswer

JSON, FORM, EVENTS = "application/json", "multipart/form-data", "text/event-stream"
REFUSALS = {
    400: "A value that is wrong; param names it",
    401: "No key, or an unknown one",
    403: "A page of another site asked",
    404: "No such thing",
    413: "The body is too large",
    415: "A body of another kind",
    429: "The queue is full; see Retry-After",
    500: "The server failed",
    503: "Loading, restarting, asleep or shutting down; see Retry-After",
    507: "The disk is full, or fails",
}
ANYWHERE, WITH_BODY = (400, 401, 403, 500, 503), (413, 415)
HEADERS = {
    "Idempotency-Key": "The same key with the same body is the same request, made once.",
    "Range": "bytes=FIRST-LAST",
    "If-Range": "An ETag: the range counts only if the file still has it.",
    "If-None-Match": "An ETag that the client has.",
}
KEYED, CONDITIONS = ("Idempotency-Key",), ("Range", "If-Range", "If-None-Match")
_FIELDS = {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON, and [DONE] at the end."}}
_EVENTS = {EVENTS: {"schema": {"type": "object", "required": ["data"], "properties": _FIELDS, "description": "Each event."}}}
Answers = dict[int | str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Takes:
    """A body: its fields, the media types it comes as, and the files beside the fields where that is a form."""

    fields: type[BaseModel]
    kinds: tuple[str, ...]
    files: tuple[str, ...] = ()
    is_required: bool = True


def described(
    answer: type[BaseModel] | Answers,
    *refusals: int,
    takes: Takes | None = None,
    headers: tuple[str, ...] = (),
    streams: bool = False,
) -> dict[str, Any]:
    """Arguments for a route: what it answers and refuses with (beside what any route does), its body and request headers.

    `streams` is for an answer that comes as events, too, if the body asks for them.
    """
    responses: Answers = {}
    options: dict[str, Any] = {"responses": responses, "response_model": None}
    if isinstance(answer, dict):
        responses.update(answer)
        options["response_class"] = Response
    else:
        responses[200] = {"model": answer, "description": answer.__doc__, **({"content": _EVENTS} if streams else {})}
    for status in sorted({*ANYWHERE, *refusals, *(() if takes is None else WITH_BODY)}):
        responses[status] = {"model": ErrorAnswer, "description": REFUSALS[status]}
    extra: dict[str, Any] = {}
    if takes is not None:
        content = {kind: {"schema": _schema(takes.fields, takes.files if kind == FORM else ())} for kind in takes.kinds}
        extra["requestBody"] = {"required": takes.is_required, "content": content}
    if headers:
        extra["parameters"] = [
            {"in": "header", "name": name, "schema": {"type": "string"}, "description": HEADERS[name]} for name in headers
        ]
    return {**options, "openapi_extra": extra}


def file_of(*kinds: str) -> Answers:
    """The answers of `content.serve_file`."""
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}
    return {
        200: {"description": "The file", "content": content},
        206: {"description": "The part that Range asks for", "content": content},
        304: {"description": "The client has it"},
        416: {"description": "The file has no such part"},
    }


def text_of(kind: str, description: str) -> Answers:
    """An answer that is text."""
    return {200: {"description": description, "content": {kind: {"schema": {"type": "string"}}}}}


def events_of(description: str) -> Answers:
    """An answer that comes as events."""
    return {200: {"description": description, "content": _EVENTS}}


def complete_document(app: FastAPI, *, asks_for_key: bool, is_open: frozenset[str]) -> None:
    """Have the document say what holds for every route: keys, the headers of every answer, and no statuses of FastAPI's."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            parts = document["components"]
            parts["securitySchemes"] = {"bearerAuth": {"type": "http", "scheme": "bearer"}}
            for name in ("HTTPValidationError", "ValidationError"):
                parts["schemas"].pop(name, None)
            if asks_for_key:
                document["security"] = [{"bearerAuth": []}]
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    if path in is_open:
                        operation.update(security=[], responses={key: operation["responses"][key] for key in ("200", "400")})
                    _complete(operation["responses"])
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(responses: dict[str, Any]) -> None:
    responses.pop("422", None)  # `edges` makes a 400 of it
    for status, response in responses.items():
        names = {"X-Request-Id": "string", **({"Retry-After": "integer"} if status in ("429", "503") else {})}
        response["headers"] = {name: {"required": True, "schema": {"type": kind}} for name, kind in names.items()}


def _schema(body: type[BaseModel], files: tuple[str, ...]) -> dict[str, Any]:
    schema = body.model_json_schema(ref_template="#/{model}")
    definitions = schema.pop("$defs", {})
    inlined: dict[str, Any] = _inline(schema, definitions)
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
