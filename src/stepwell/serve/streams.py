"""Server-Sent Events: a generator of JSON objects as a response that ends with a result or an error, never in silence."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import Response, StreamingResponse

from stepwell.errors import StepwellError
from stepwell.serve.edges import error_body

PING_S = 15.0  # proxies cut connections that are silent for longer
logger = logging.getLogger(__name__)


async def event_stream(events: AsyncIterator[dict[str, Any]], headers: dict[str, str]) -> Response:
    """Wait for the first event, so that a refusal is still an error status, then stream. Empty events are not sent."""
    first = await anext(events)
    headers = {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_lines(first, events), media_type="text/event-stream", headers=headers)


async def _lines(first: dict[str, Any], events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    coming: asyncio.Future[dict[str, Any]] | None = None
    try:
        yield _line(first)
        while True:
            coming = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({coming}, timeout=PING_S))[0]:
                yield ": ping\n\n"
            try:
                yield _line(coming.result())
            except StopAsyncIteration:
                break
        yield "data: [DONE]\n\n"
    except StepwellError as error:
        yield f"data: {json.dumps(error_body(error.kind, error.code, error.message, error.param))}\n\n"
    except Exception:
        logger.exception("a stream failed")
        body = error_body("server_error", "internal_error", "internal error; the server's log has the details")
        yield f"data: {json.dumps(body)}\n\n"
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await events.aclose()  # type: ignore[attr-defined]


def _line(event: dict[str, Any]) -> str:
    if not event:
        return ": ok\n\n"
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" if "type" in event else f"data: {json.dumps(event)}\n\n"
