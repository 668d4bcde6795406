"""The requests a worker has under way: each can be cancelled at every step, and the worker leaves once none is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Protocol

from stepwell.engine.api import Engine
from stepwell.errors import Aborted, by_code
from stepwell.types import Done, Event, Failed, Request

POLL_S = 0.02


class Context(Protocol):
    """What is used of Dynamo's own context of a request."""

    def id(self) -> str | None: ...

    def is_stopped(self) -> bool: ...


class Live:
    """One worker's requests."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._requests: dict[str, set[str]] = {}  # our ids by Dynamo's, which clients may choose
        self._under_way = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A request is under way until its last answer was taken."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def events(self, request: Request, context: Context) -> AsyncIterator[Event]:
        """A generation's events, the last of which is Done. Raises StepwellError, Aborted once the client is gone."""
        key = str(context.id())
        self._requests.setdefault(key, set()).add(request.id)
        try:
            async with aclosing(self._engine.generate(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, Failed):
                        raise by_code(event.code, event.message, event.param)
                    if context.is_stopped():
                        raise Aborted("the client has hung up")
                    yield event
        finally:
            self._requests[key].discard(request.id)
            if not self._requests[key]:
                del self._requests[key]

    async def done(self, request: Request, context: Context) -> Done:
        """The result of a generation whose progress nobody asks for."""
        async with aclosing(self.events(request, context)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Done):
                    return event
        raise AssertionError("a request ended without a terminal event")

    async def abort(self, context: Context) -> None:
        """Dynamo says that a request's client has gone; it may be waiting, where no step would notice."""
        for id in tuple(self._requests.get(str(context.id()), ())):
            await self._engine.abort(id)

    async def drain(self, limit_s: float) -> None:
        """Wait until nothing is under way. Dynamo cancels what is left right after, so this must not return before."""
        deadline = time.monotonic() + limit_s
        while self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
