"""An engine in this process: the core loop on a thread, events by callback, iterator or async iterator."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future

from stepwell.engine.api import Control, EngineInfo, Reply
from stepwell.engine.core import EngineCore
from stepwell.engine.intake import complete
from stepwell.engine.steps import StepExecutor
from stepwell.errors import EngineClosed
from stepwell.types import Done, Event, Failed, Request


class LocalEngine:
    """Implements `Engine`. The worker is built, and lives, on the engine's own thread."""

    def __init__(self, build: Callable[[], StepExecutor], *, max_running: int = 32, max_queued: int = 1024):
        self._build = build
        self._max_running, self._max_queued = max_running, max_queued
        self._core: EngineCore | None = None
        self._info: EngineInfo | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    # ----------------------------------------------------------------------------------------------------- blocking verbs
    def open(self) -> EngineInfo:
        """Build the worker and begin the loop; `start` for callers without an event loop."""
        if self._info is not None:
            return self._info
        if self._is_closed:
            raise EngineClosed("the engine is closed")
        ready: Future[EngineCore] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="stepwell-engine", daemon=True)
        self._thread.start()
        try:
            self._core = ready.result()
        except BaseException:
            self._is_closed = True
            raise
        assert self._info is not None
        return self._info

    def _run(self, ready: Future[EngineCore]) -> None:
        try:
            worker = self._build()
            core = EngineCore(worker, self._max_running, self._max_queued)
            self._info = EngineInfo(worker.info, worker.choices)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(core)
        core.run()

    def submit(self, request: Request, sink: Callable[[Event], None]) -> Request:
        """Complete and queue a request; `sink` is called on the engine's thread and must not block."""
        core, info = self._running()
        completed = complete(request, info.model)
        core.submit(completed, sink)
        return completed

    def stream(self, request: Request) -> Iterator[Event]:
        """`generate` for callers without an event loop."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit(request, events.put)
        return self._drain(request.id, events)

    def _drain(self, request_id: str, events: queue.SimpleQueue[Event]) -> Iterator[Event]:
        is_over = False
        try:
            while not is_over:
                event = events.get()
                is_over = isinstance(event, Done | Failed)
                yield event
        finally:
            if not is_over:
                self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """`abort` for callers without an event loop."""
        if self._core is not None:
            self._core.abort(request_id)

    def shut(self) -> None:
        """`close` for callers without an event loop."""
        self._is_closed = True
        if self._core is not None:
            self._core.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._core = None

    def _running(self) -> tuple[EngineCore, EngineInfo]:
        if self._core is None or self._info is None:
            raise EngineClosed("the engine is closed" if self._is_closed else "the engine has not been started")
        return self._core, self._info

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

        await asyncio.to_thread(self.submit, request, sink)
        is_over = False
        try:
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
        return await asyncio.to_thread(core.stats)

    async def close(self) -> None:
        await asyncio.to_thread(self.shut)
