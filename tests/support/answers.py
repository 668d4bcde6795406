"""What every answer of the server has in common."""

from __future__ import annotations

from typing import Any

import httpx


def check_refusal(answer: httpx.Response, *statuses: int, param: str | None = None) -> dict[str, Any]:
    """A refusal in OpenAI's shape, with what every answer has."""
    assert answer.status_code in (statuses or range(400, 500)), answer.text[:500]
    body = answer.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"] and error["type"].endswith("_error") and error["code"] and len(answer.text) < 10_000
    assert param is None or error["param"] == param, error
    check_headers(answer)
    return error


def check_headers(answer: httpx.Response) -> None:
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"
