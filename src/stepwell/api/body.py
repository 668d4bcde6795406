"""Request bodies: validated by pydantic, refused in one line that names the field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stepwell.config.load import nested_fields, shorten, unknown_name
from stepwell.errors import InvalidRequest

B = TypeVar("B", bound=BaseModel)


def parse_body(kind: type[B], body: Any) -> B:
    """`body` as a `kind`. Strict: no string passes for a number, no unknown field passes at all."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(body).__name__}")
    try:
        return kind.model_validate(body, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = nested_fields(kind, first["loc"][:-1])
            raise unknown_name(name, known, "in the body") from None
        if first["type"] == "missing":
            raise InvalidRequest(f"{name} is missing", param=name) from None
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise InvalidRequest(f"{name} = {shorten(first['input'])}: {message}", param=name) from None
