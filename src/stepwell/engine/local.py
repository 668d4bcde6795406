"""An engine in this process: the core loop on a thread, events by callback, iterator or async iterator."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future

from stepwell.engine.api import Control, EngineInfo, Queue, Reply
from stepwell.engine.core import EngineCore
from stepwell.engine.intake import complete
from stepwell.engine.steps import StepExecutor
from stepwell.errors import EngineClosed
from stepwell.types import Done, Event, Failed, Request, SchedulingPolicy


class LocalEngine:
    """Implements `Engine`. The worker is built, and lives, on the engine's own thread."""

    def __init__(
        self,
        build: Callable[[], StepExecutor],
        *,
        max_running: int = 32,
        max_queued: int = 1024,
        max_wait_s: float | None = None,
        policy: SchedulingPolicy = "shortest",
    ):
        self._build = build
        self._limits = max_running, max_queued, max_wait_s, policy
        self._core: EngineCore | None = None
        self._info: EngineInfo | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._lifecycle = threading.Lock()

    # ----------------------------------------------------------------------------------------------------- blocking verbs
    def open(self) -> EngineInfo:
        """Build the worker and begin the loop; `start` for callers without an event loop."""
        with self._lifecycle:
            if self._is_closed:
                raise EngineClosed("the engine is closed")
            if self._info is None:
                ready: Future[tuple[EngineCore, EngineInfo]] = Future()
                self._thread = threading.Thread(target=self._run, args=(ready,), name="stepwell-engine", daemon=True)
                self._thread.start()
                try:
                    self._core, self._info = ready.result()
                except BaseException:
                    self._is_closed = True
                    raise
            return self._info

    def _run(self, ready: Future[tuple[EngineCore, EngineInfo]]) -> None:
        try:
            worker = self._build()
            core = EngineCore(worker, *self._limits)
            info = EngineInfo(worker.info, worker.choices)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result((core, info))
        core.run()

    def submit(self, request: Request, sink: Callable[[Event], None]) -> Request:
        """Complete and queue a request; `sink` is called on the engine's thread and must not block."""
        core, info = self._running()
        completed = complete(request, info.model)
        core.submit(completed, sink).result()
        return completed

    def stream(self, request: Request) -> Iterator[Event]:
        """`generate` for callers without an event loop; the request is queued when the first event is asked for."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        is_over = False
        try:
            self.submit(request, events.put)
            while not is_over:
                event = events.get()
                is_over = isinstance(event, Done | Failed)
                yield event
        finally:
            if not is_over:
                self.cancel(request.id)

    def cancel(self, request_id: str) -> None:
        """`abort` for callers without an event loop."""
        if self._core is not None:
            self._core.abort(request_id)

    def shut(self) -> None:
        """`close` for callers without an event loop. Waits for a build under way, and for the step under way."""
        with self._lifecycle:
            self._is_closed = True
            if self._core is not None:
                self._core.close()
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join()
            self._core = None

    def _running(self) -> tuple[EngineCore, EngineInfo]:
        core, info = self._core, self._info
        if core is None or info is None:
            raise EngineClosed("the engine is closed" if self._is_closed else "the engine has not been started")
        return core, info

    # -------------------------------------------------------------------------------------------------------- Engine verbs
    async def start(self) -> EngineInfo:
        return await asyncio.to_thread(self.open)

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def sink(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the caller's loop is gone, and with it the caller
                self.cancel(request.id)

        is_over = False
        try:
            core, info = self._running()
            await asyncio.wrap_future(core.submit(complete(request, info.model), sink))
            while not is_over:
                event = await events.get()
                is_over = isinstance(event, Done | Failed)
                yield event
        finally:
            if not is_over:
                self.cancel(request.id)

    async def abort(self, request_id: str) -> None:
        self.cancel(request_id)

    async def control(self, message: Control) -> Reply:
        core, _ = self._running()
        return core.queue() if isinstance(message, Queue) else core.stats()

    async def close(self) -> None:
        await asyncio.to_thread(self.shut)
