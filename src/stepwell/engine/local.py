"""An engine in this process: the core loop on a thread, events by callback, iterator or async iterator."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future

from stepwell.engine.api import (
    Control,
    EngineInfo,
    Queue,
    QueueReply,
    Reply,
    Sleep,
    SleepReply,
    StatsReply,
    Wake,
    Wakefulness,
)
from stepwell.engine.core import EngineCore
from stepwell.engine.intake import complete
from stepwell.engine.steps import StepExecutor
from stepwell.errors import Asleep, EngineClosed, Unavailable
from stepwell.types import Done, Event, Failed, Request, SchedulingPolicy, replace


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
        self._state: Wakefulness = "awake"  # where there is a core, it knows whether it is drowsy
        self._lifecycle = threading.Lock()

    # ----------------------------------------------------------------------------------------------------- blocking verbs
    def open(self) -> EngineInfo:
        """Build the worker and begin the loop; `start` for callers without an event loop."""
        with self._lifecycle:
            if self._is_closed:
                raise EngineClosed("the engine is closed")
            if self._info is None:
                try:
                    self._begin()
                except BaseException:
                    self._is_closed = True
                    raise
            assert self._info is not None
            return self._info

    def _begin(self) -> None:
        """Build the worker on a thread of its own, and have it loop there."""
        ready: Future[tuple[EngineCore, EngineInfo]] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="stepwell-engine", daemon=True)
        self._thread.start()
        self._core, self._info = ready.result()

    def _stop(self) -> None:
        """End the loop, and drop it with its worker."""
        if self._core is not None:
            self._core.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._core = self._thread = None

    def _run(self, ready: Future[tuple[EngineCore, EngineInfo]]) -> None:
        try:
            worker = self._build()
            core = EngineCore(worker, *self._limits)
            info = EngineInfo(worker.models, worker.choices)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result((core, info))
        core.run()

    def submit(self, request: Request, sink: Callable[[Event], None]) -> Request:
        """Complete and queue a request; `sink` is called on the engine's thread and must not block."""
        core, info = self._running()
        completed = complete(request, info.of(request))
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
            self._leave(request, is_over=is_over)

    def _leave(self, request: Request, *, is_over: bool) -> None:
        """Nobody waits for a request any more."""
        if is_over:
            self.forget(request)
        else:
            self.cancel(request.id)

    def forget(self, request: Request) -> None:
        """Erase what was saved of a request that is over and was submitted with a sink; a closed engine keeps it."""
        core = self._core
        if core is not None and not self._is_closed:
            core.forget(request)

    def cancel(self, request_id: str) -> None:
        """`abort` for callers without an event loop."""
        if self._core is not None:
            self._core.abort(request_id)

    def shut(self) -> None:
        """`close` for callers without an event loop. Waits for a build under way, and for the step under way."""
        with self._lifecycle:
            self._is_closed = True
            self._stop()

    def sleep(self, *, abort: bool = False) -> Wakefulness:
        """`Sleep` for callers without an event loop."""
        with self._lifecycle:  # a load under way ends first
            if self.state == "asleep" and not self._is_closed:
                return self.state
            core, _ = self._running()
        core.rest(abort=abort).result()
        with self._lifecycle:
            if core is self._core and core.is_resting:  # nobody woke it meanwhile
                self._state = "asleep"
                self._stop()
        del core
        gc.collect()  # a model is full of cycles
        return self.state

    def wake(self) -> Wakefulness:
        """`Wake` for callers without an event loop."""
        with self._lifecycle:
            if self._core is not None:
                self._core.resume()
            elif self.state == "asleep" and not self._is_closed:
                self._state = "waking"
                try:
                    self._begin()
                except BaseException:
                    self._state = "asleep"
                    raise
                self._state = "awake"
            else:
                self._running()
            return self.state

    @property
    def state(self) -> Wakefulness:
        core = self._core
        return "drowsy" if core is not None and core.is_resting else self._state

    def _running(self) -> tuple[EngineCore, EngineInfo]:
        core, info = self._core, self._info
        if core is not None and info is not None:
            return core, info
        if self._is_closed or info is None:
            raise EngineClosed("the engine is closed" if self._is_closed else "the engine has not been started")
        if self._state == "waking":
            raise Unavailable("the engine is waking up", retry_after_s=2)
        raise Asleep

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
            await asyncio.wrap_future(core.submit(complete(request, info.of(request)), sink))
            while not is_over:
                event = await events.get()
                is_over = isinstance(event, Done | Failed)
                yield event
        finally:
            self._leave(request, is_over=is_over)

    async def abort(self, request_id: str) -> None:
        self.cancel(request_id)

    async def control(self, message: Control) -> Reply:
        if isinstance(message, Sleep):
            return SleepReply(await asyncio.to_thread(self.sleep, abort=message.abort))
        if isinstance(message, Wake):
            return SleepReply(await asyncio.to_thread(self.wake))
        state = self.state
        if state in ("asleep", "waking") and not self._is_closed:
            return QueueReply((), 0.0) if isinstance(message, Queue) else StatsReply(0, 0, 0, 0, 0, state=state)
        core, _ = self._running()
        return core.queue() if isinstance(message, Queue) else replace(core.stats(), state=state)

    async def close(self) -> None:
        await asyncio.to_thread(self.shut)
