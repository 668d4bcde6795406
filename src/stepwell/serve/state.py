"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import Request as HttpRequest

from stepwell.api.body import Models
from stepwell.api.models import named
from stepwell.config.schema import EngineOptions, ServerOptions, one_or_more
from stepwell.engine.api import Engine, EngineInfo, Sleep, SleepReply, Stats, StatsReply, Wake, Wakefulness
from stepwell.errors import StepwellError, Unavailable
from stepwell.serve.edges import ClientGone
from stepwell.serve.files import Files
from stepwell.serve.inputs import Inputs
from stepwell.serve.jobs import Job, JobKind
from stepwell.serve.metrics import Metrics
from stepwell.serve.replays import Replays
from stepwell.serve.runner import JobRunner
from stepwell.types import Done, Event, Failed, Request


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
        self.models: Models = {}  # by the names under which they are served
        self.created = int(time.time())
        self.is_draining = False
        self.live: dict[str, str] = {}  # owners of the requests somebody waits for
        self.queue_seen: tuple[float, list[dict[str, Any]]] = 0.0, []  # when, and what it held

    def begin(self, info: EngineInfo) -> None:
        """The engine is ready: take up unfinished jobs, and take in new requests."""
        self.models = named(info.models, one_or_more(self.options.served_model_name))
        self.info = info
        self.jobs.start(self.models)

    def name_of(self, model_id: str) -> str:
        """The name under which a model is served."""
        return next(name for name, model in self.models.items() if model.id == model_id)

    def ready(self) -> EngineInfo:
        """What the engine is. Raises Unavailable while it loads."""
        if self.info is None:
            raise Unavailable("the model is still loading", retry_after_s=2)
        return self.info

    async def sleep(self, *, abort: bool) -> Wakefulness:
        """Let the engine go of its model; jobs wait in the store meanwhile."""
        self.ready()
        self.jobs.is_awake.clear()
        try:
            return await self._tell(Sleep(abort))
        finally:
            await self._settle_jobs()

    async def wake(self) -> Wakefulness:
        """Have the engine load its model again."""
        self.ready()
        try:
            return await self._tell(Wake())
        finally:
            await self._settle_jobs()

    async def _tell(self, message: Sleep | Wake) -> Wakefulness:
        reply = await self.engine.control(message)
        assert isinstance(reply, SleepReply)
        return reply.state

    async def _settle_jobs(self) -> None:
        """Jobs go on where the engine takes them, however it got there; one that can't be asked makes them try again."""
        with suppress(StepwellError):
            stats = await self.engine.control(Stats())
            assert isinstance(stats, StatsReply)
            if stats.state in ("drowsy", "asleep"):
                return
        self.jobs.is_awake.set()

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
