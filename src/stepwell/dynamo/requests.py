"""Requests as Dynamo's frontend hands them over, in the words of our own API.

The frontend knows a fixed set of fields: it moves others from the top level to `extra_args`, and drops those it does not know
inside `nvext`. What it has no room for, such as more than 255 steps of a picture, fits into `nvext.annotations` as "name:value".
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from typing import Any

from stepwell.errors import InvalidRequest

PROBE = "_HEALTH_CHECK"  # marks a request by which the runtime tries a worker
PASSED_THROUGH = "media_passthrough"
MOST_FLOAT32 = 3e38
FRONTEND_NOTES = frozenset({"formatted_prompt", "token_ids", "llm_metrics", "query_instance_id"})  # annotations that ask it
FRONTENDS = ("model", "prompt", "stream", "nvext", "annotations")  # it has read these itself, and acts on what it read


def body_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request for pictures or videos as a body of our own API. Raises InvalidRequest for what was said twice, differently."""
    body = {name: value for name, value in request.items() if value is not None and name not in ("nvext", "extra_args", PROBE)}
    extra = dict(request.get("extra_args") or {})
    _put(body, extra.pop(PASSED_THROUGH, None) or {})
    _put(body, extra)
    nvext = {name: value for name, value in (request.get("nvext") or {}).items() if value is not None}
    more = annotated(nvext.pop("annotations", None) or ())
    for name in FRONTENDS:
        if name in more:
            raise InvalidRequest(f"annotations: {name!r} is no annotation; it has a field of its own", param="annotations")
    _put(body, more)
    nvext = {name: _shortest(value) if isinstance(value, float) else value for name, value in nvext.items()}
    return {**body, "nvext": nvext} if nvext else body


def annotated(annotations: Any) -> dict[str, Any]:
    """What annotations say, as fields, but those that ask the frontend for something. Raises InvalidRequest for one without a
    value."""
    found: dict[str, Any] = {}
    for annotation in annotations:
        name, colon, value = str(annotation).partition(":")
        if name.strip() in FRONTEND_NOTES:
            continue
        if not colon:
            raise InvalidRequest(
                f"annotations: {name[:100]!r} has no value; write 'name:value', such as 'num_inference_steps:300'",
                param="annotations",
            )
        _put(found, {name.strip(): _value(value.strip())})
    return found


def _value(text: str) -> Any:
    """A number, a boolean, an object, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _shortest(value: float) -> float:
    """The number that was written: the frontend keeps those of nvext in 32 bits, and 7.1 comes as 7.099999904632568."""
    if not abs(value) < MOST_FLOAT32:
        return value
    kept = struct.pack("f", value)
    return next((short for digits in range(1, 9) if struct.pack("f", short := float(f"{value:.{digits}g}")) == kept), value)


def _put(body: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if name in body and body[name] != value:
            raise InvalidRequest(
                f"{name} = {body[name]!r:.100} contradicts {name} = {value!r:.100}; give one of them", param=name
            )
        body[name] = value


def folder_of(user: str) -> str:
    """A folder's name for a user: plain, and no other user's."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", user)[:48]
    return plain if plain == user else f"{plain}-{hashlib.sha256(user.encode(errors='surrogatepass')).hexdigest()[:16]}"
