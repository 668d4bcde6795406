"""The routes that make text: chat completions, and completions of prompts as they stand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from stepwell.api import chat, completions
from stepwell.api.answers import ChatCompletion, Completion
from stepwell.api.body import Models
from stepwell.api.texts import Answer
from stepwell.engine.intake import complete
from stepwell.errors import by_code
from stepwell.serve.docs import JSON, KEYED, Takes, described
from stepwell.serve.state import Server, unless_gone
from stepwell.serve.streams import event_stream
from stepwell.types import Done, Event, Failed, Queued, Request

REFUSES = (404, 429)


def router(server: Server) -> APIRouter:
    """`/v1/chat/completions` and `/v1/completions`"""
    routes = APIRouter()
    takes_chat, takes_prompts = Takes(chat.ChatBody, (JSON,)), Takes(completions.CompletionsBody, (JSON,))

    @routes.post("/v1/chat/completions", **described(ChatCompletion, *REFUSES, takes=takes_chat, headers=KEYED, streams=True))
    async def complete_chat(http: HttpRequest) -> Response:
        return await _respond(server, http, chat.to_answer)

    @routes.post("/v1/completions", **described(Completion, *REFUSES, takes=takes_prompts, headers=KEYED, streams=True))
    async def complete_prompts(http: HttpRequest) -> Response:
        return await _respond(server, http, completions.to_answer)

    return routes


async def _respond(server: Server, http: HttpRequest, translate: Callable[[Any, Models], Answer]) -> Response:
    body = await server.inputs.read_json(http)
    info = server.ready()
    answer = translate(body, server.models)
    answer.requests = tuple(complete(request, info.of(request)) for request in answer.requests)
    headers = {"x-ignored-params": ", ".join(answer.ignored)} if answer.ignored else {}
    if answer.stream:
        return await event_stream(_stream(server, answer, http.state.owner), headers)
    repeated = [http.url.path, body]
    result = await server.replays.run(http, repeated, lambda: _result(server, answer, http.state.owner), unless_gone)
    return JSONResponse(result, headers=headers)


async def _result(server: Server, answer: Answer, owner: str) -> dict[str, Any]:
    """Generate, and write the answer."""
    async with aclosing(_events(server, answer.requests, owner)) as events:
        async for place, event in events:
            answer.take(place, event)
    server.metrics.count_text(answer.model, answer.usage())
    return answer.response()


async def _stream(server: Server, answer: Answer, owner: str) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream. Raises before the first one if any request is refused; later failures are events."""
    waiting = len(answer.requests)
    held: list[dict[str, Any]] = []
    async with aclosing(_events(server, answer.requests, owner)) as events:
        async for place, event in events:
            waiting -= isinstance(event, Queued)
            held += answer.take(place, event)
            if not waiting:
                for each in held:
                    yield each
                held = []
    server.metrics.count_text(answer.model, answer.usage())
    for each in answer.last():
        yield each


async def _events(server: Server, requests: tuple[Request, ...], owner: str) -> AsyncGenerator[tuple[int, Event], None]:
    """What happens to these requests, each event with the place of its own, until all are done. The first that fails ends
    them all, and so does leaving early."""
    news: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()

    async def follow(place: int, request: Request) -> None:
        try:
            async with server.following(request, owner) as events:
                async for event in events:
                    news.put_nowait((place, event))
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(place, request)) for place, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            found = await news.get()
            if isinstance(found, Exception):
                raise found
            if isinstance(found[1], Failed):
                raise by_code(found[1].code, found[1].message, found[1].param)
            left -= isinstance(found[1], Done)
            yield found
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
