"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request as HttpRequest

from stepwell.config.schema import EngineOptions, ServerOptions
from stepwell.engine.api import Engine, EngineInfo
from stepwell.errors import StepwellError, Unavailable
from stepwell.serve.edges import ClientGone
from stepwell.serve.files import Files
from stepwell.serve.inputs import Inputs
from stepwell.serve.jobs import IdempotencyMismatch, Job, JobKind
from stepwell.serve.metrics import Metrics
from stepwell.serve.runner import JobRunner
from stepwell.types import Done, Event, Failed, Request

REPLAY_S = 600  # how long a finished answer is kept for its idempotency key
REPLAYS, REPLAY_BYTES = 64, 2**28  # at most, of all clients


class NotFound(StepwellError):
    """No such picture, video or request, or not one of this key's."""

    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class Server:
    """One running server. `info` is None until the engine is ready."""

    def __init__(
        self,
        engine: Engine,
        engine_options: EngineOptions,
        options: ServerOptions,
        jobs: JobRunner,
        files: Files,
        metrics: Metrics,
    ):
        self.engine = engine
        self.engine_options = engine_options
        self.options = options
        self.jobs = jobs
        self.files = files
        self.metrics = metrics
        self.inputs = Inputs(options)
        self.replays = Replays()
        self.info: EngineInfo | None = None
        self.name = options.served_model_name or ""
        self.created = int(time.time())
        self.is_draining = False
        self.live: dict[str, str] = {}  # owners of the requests somebody waits for
        self.queue_seen: tuple[float, list[dict[str, Any]]] = 0.0, []  # when, and what it held

    def begin(self, info: EngineInfo) -> None:
        """The engine is ready: take up unfinished jobs, and take in new requests."""
        self.name = self.name or info.model.id
        self.info = info
        self.jobs.start(info.model, self.name)

    def ready(self) -> EngineInfo:
        """What the engine is. Raises Unavailable while it loads."""
        if self.info is None:
            raise Unavailable("the model is still loading", retry_after_s=2)
        return self.info

    @asynccontextmanager
    async def following(self, request: Request, owner: str) -> AsyncIterator[AsyncIterator[Event]]:
        """A generation and its events; leaving it early aborts it."""
        events = self.engine.generate(request)
        self.live[request.id] = owner
        is_over = False

        async def watched() -> AsyncIterator[Event]:
            nonlocal is_over
            async for event in events:
                is_over = isinstance(event, Done | Failed)
                if isinstance(event, Failed):
                    self.metrics.failures.labels(event.code).inc()
                yield event

        stream = watched()
        try:
            yield stream
        except StepwellError:
            is_over = True
            raise
        finally:
            self.live.pop(request.id, None)
            await stream.aclose()  # type: ignore[attr-defined]
            await events.aclose()  # type: ignore[attr-defined]
            if not is_over:
                self.metrics.aborts.inc()

    def find(self, id: str, owner: str, kind: JobKind) -> Job:
        """A job of this owner. Raises NotFound."""
        job = self.jobs.store.get(id, owner)
        if job is None or job.kind != kind:
            raise NotFound(f"{id[:100]!r}: no such {kind}", param="id")
        return job


async def unless_gone(http: HttpRequest, work: Awaitable[Any]) -> Any:
    """Await `work`, but give it up, and with it the generation, once the client has hung up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def body_hash(body: Any) -> str:
    """The same for bodies that say the same."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class Replay:
    """The one generation behind requests that are the same request again."""

    hash: str
    task: asyncio.Task[Any]
    waiting: int = 0  # requests that do
    born_at: float = field(default_factory=time.monotonic)


class Replays:
    """Answers a repeated request with the first one's result instead of generating again.

    With an `Idempotency-Key` the work goes on even if the client hangs up, and its result is kept for a while. Without
    one, a client's automatic retry (`x-stainless-retry-count`) joins its first attempt if that is still under way, and the
    work is given up once nobody waits for it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Replay] = {}

    async def run(
        self,
        http: HttpRequest,
        body: Any,
        work: Callable[[], Awaitable[Any]],
        guard: Callable[[HttpRequest, Awaitable[Any]], Awaitable[Any]],
    ) -> Any:
        """The result of `work`, or of the earlier request that this one repeats."""
        digest, given = body_hash(body), http.headers.get("idempotency-key") or None
        key = (http.state.owner, f"given {given}" if given else f"same {digest}")
        self._forget_old()
        known = self._known.get(key)
        if known is not None and known.hash != digest:
            raise IdempotencyMismatch("this Idempotency-Key came with another body before", param="Idempotency-Key")
        is_again = given is not None or http.headers.get("x-stainless-retry-count", "0") != "0"
        if known is None or not is_again:
            known = Replay(digest, asyncio.ensure_future(work()))
            self._known.setdefault(key, known)
            if given is not None:
                known.task.add_done_callback(partial(self._settle, key, known))
        known.waiting += 1
        try:
            return await guard(http, asyncio.shield(known.task))
        finally:
            known.waiting -= 1
            if given is None and not known.waiting:
                self._forget(key, known)
                known.task.cancel()
                await asyncio.gather(known.task, return_exceptions=True)

    def _settle(self, key: tuple[str, str], replay: Replay, task: asyncio.Task[Any]) -> None:
        """A failure is not kept: the same key may try again."""
        if task.cancelled() or task.exception() is not None:
            self._forget(key, replay)

    def _forget(self, key: tuple[str, str], replay: Replay) -> None:
        if self._known.get(key) is replay:
            del self._known[key]

    def _forget_old(self) -> None:
        now = time.monotonic()
        kept, size = 0, 0
        for key, replay in reversed(list(self._known.items())):  # the newest first
            if replay.task.done() and not replay.task.cancelled() and replay.task.exception() is None:
                kept, size = kept + 1, size + _size(replay.task.result())
                if now - replay.born_at > REPLAY_S or kept > REPLAYS or size > REPLAY_BYTES:
                    del self._known[key]


def _size(result: dict[str, Any]) -> int:
    """About the bytes an answer takes: those of its pictures."""
    return sum(len(picture.get("b64_json") or "") for picture in result["data"])
