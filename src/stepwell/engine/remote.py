"""An engine in a process of its own, watched over: it may crash or hang without taking a request with it.

Every request that was under way when the process died runs again, from its last checkpoint or its seed. If the process dies
with it again, and no checkpoint lies between the two deaths, the request fails and is quarantined, so that a client's retries
can't bring the server down. Requests that only waited are not held to blame, unless nobody was known to be under way in several
deaths. See `engine.process` for the other side.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import zmq
import zmq.asyncio

from stepwell.config.load import torchrun_place
from stepwell.config.schema import EngineOptions
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
from stepwell.engine.checkpoint_files import erase, fingerprint, steps_saved
from stepwell.engine.intake import complete
from stepwell.engine.wire import Abort, Command, Open, Opened, Order, Pulse, Refusal, Report, Shut, Submit, pack, unpack
from stepwell.errors import Aborted, Asleep, EngineClosed, QueueFull, StepwellError, Unavailable, Unsupported, WorkerLost
from stepwell.types import Chunk, Done, Event, Failed, Preview, Progress, Queued, Request, TextPreview, replace

logger = logging.getLogger(__name__)
HANG_FACTOR = 20  # a step this many times slower than usual hangs
MOST_RUNS = 2  # of one request whose process dies, from the same checkpoint
MOST_SUSPICIONS = 6  # deaths a request may see in which nobody was known to be under way
QUARANTINE_S = 3600
RESTART_S = (0, 1, 2, 4, 8, 15, 30)  # waits before each further try to load
HOPELESS = 3  # failed loads in a row after which waiting requests fail
SHUT_S = 10
QUIET_S = 0.02  # between looks whether anything is under way still
ANSWER_S = 2  # a process that is well answers within milliseconds, whatever it computes
IDLE = Pulse(0.0, None)


class Phase(StrEnum):
    """What the engine's process is doing."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    ASLEEP = "asleep"
    WAKING = "waking"
    RESTARTING = "restarting"
    BROKEN = "broken"
    CLOSED = "closed"


@dataclass(slots=True)
class Flight:
    """A live request: its events, and how often it was begun since steps of it were last saved."""

    request: Request
    events: asyncio.Queue[Event | StepwellError] = field(default_factory=asyncio.Queue)
    runs: int = 0
    steps_saved: int = 0  # by the last death
    suspicions: int = 0  # deaths in which nobody was known to be under way
    is_running: bool = False
    is_queued: bool = False
    shown: dict[int, int] = field(default_factory=dict)  # characters of each text that its owner has
    told: dict[int, int] = field(default_factory=dict)  # tokens of each text that its owner has
    heard: dict[int, int] = field(default_factory=dict)  # of these, what the process at hand has said


@dataclass(slots=True)
class Child:
    """One life of the engine's process, and what was last heard of it."""

    process: asyncio.subprocess.Process
    commands: zmq.asyncio.Socket
    reports: zmq.asyncio.Socket
    heard_at: float
    pulse: Pulse = IDLE
    answers: deque[asyncio.Future[StatsReply | QueueReply]] = field(default_factory=deque)

    def hang_s(self) -> tuple[float, float | None]:
        """Seconds since the process made progress, as far as is known, and what the step under way should take."""
        silent_s = time.monotonic() - self.heard_at
        return (silent_s + self.pulse.busy_s if self.pulse.busy_s else silent_s), self.pulse.usual_s


class RemoteEngine:
    """Implements `Engine`. Lives on one event loop."""

    def __init__(self, options: EngineOptions):
        self._options = options
        self._flights: dict[str, Flight] = {}
        self._quarantine: dict[str, float] = {}
        self._context = zmq.asyncio.Context()
        self._folder = ""
        self._lives = 0
        self._child: Child | None = None
        self._info: EngineInfo | None = None
        self._watch: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # of whoever ends or begins a life of the process on purpose
        self._is_drowsy = False  # or asleep
        self.restarts = 0
        self.phase = Phase.NEW

    # -------------------------------------------------------------------------------------------------------------- verbs
    async def start(self) -> EngineInfo:
        if self._info is None:
            self.phase = Phase.LOADING
            roomy = len(tempfile.gettempdir()) < 60  # a local socket's path has at most 107 characters
            self._folder = tempfile.mkdtemp(prefix="stepwell-", dir=None if roomy else "/tmp")  # only its owner may enter
            try:
                self._info = await self._load()
            except BaseException:
                await self.close()
                raise
            self._open_up()
            self._watch = asyncio.create_task(self._supervise())
        return self._info

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        request = complete(request, self._known().of(request))
        self._check_open(request)
        flight = self._flights[request.id] = Flight(request)
        event: Event | StepwellError | None = None
        try:
            if self.phase is Phase.READY:
                self._submit(flight)
            while True:
                event = await flight.events.get()
                if isinstance(event, StepwellError):
                    raise event
                if isinstance(event, Done | Failed):
                    self._flights.pop(request.id, None)
                yield event
                if isinstance(event, Done | Failed):
                    return
        finally:
            if self._flights.pop(request.id, None) is not None:
                self._send(Abort(request.id))
            is_for_later = isinstance(event, Failed) and event.status == Unavailable.status
            if flight.runs and not is_for_later and self.phase is not Phase.CLOSED:
                self._erase(flight)  # not before whoever asked is done with the result

    def _check_open(self, request: Request) -> None:
        """Raise what a request is refused with at the door."""
        if self._is_drowsy:
            raise Asleep
        print_ = fingerprint(request)
        if self._quarantine.get(print_, 0.0) > time.monotonic():
            raise WorkerLost("this very request brought the engine's process down twice; it is refused for an hour")
        if self.phase is Phase.BROKEN:
            raise Unavailable("the engine can't be brought back for now; see the server's log", retry_after_s=30)
        if self.phase is not Phase.READY and len(self._flights) >= self._options.max_queued_samples:
            raise QueueFull("the engine is restarting and its queue is full; try again later", retry_after_s=5)

    async def abort(self, request_id: str) -> None:
        flight = self._flights.get(request_id)
        if flight is None:
            return
        self._erase(flight)
        if self.phase is Phase.READY:
            self._send(Abort(request_id))
        else:
            self._end(flight, Aborted("the request was aborted"))

    async def control(self, message: Control) -> Reply:
        if isinstance(message, Sleep):
            return SleepReply(await self._sleep(abort=message.abort))
        if isinstance(message, Wake):
            return SleepReply(await self._wake())
        if self.state in ("asleep", "waking"):
            empty = StatsReply(0, 0, len(self._flights), 0, 0, restarts=self.restarts, state=self.state)
            return QueueReply((), 0.0) if isinstance(message, Queue) else empty
        child = self._child
        if self.phase is not Phase.READY or child is None:
            raise Unavailable(f"the engine is {self.phase}", retry_after_s=1)
        answer: asyncio.Future[StatsReply | QueueReply] = asyncio.get_running_loop().create_future()
        child.answers.append(answer)
        self._send(message)
        try:
            reply = await asyncio.wait_for(answer, ANSWER_S)
        except TimeoutError:
            raise Unavailable("the engine's process does not answer", retry_after_s=ANSWER_S) from None
        return replace(reply, restarts=self.restarts, state=self.state) if isinstance(reply, StatsReply) else reply

    async def close(self) -> None:
        if self.phase is Phase.CLOSED:
            return
        self.phase = Phase.CLOSED
        await self._end_process()
        for flight in list(self._flights.values()):
            self._end(flight, EngineClosed("the engine was closed while the request was under way"))
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _known(self) -> EngineInfo:
        if self._info is None or self.phase is Phase.CLOSED:
            raise EngineClosed("the engine is closed" if self.phase is Phase.CLOSED else "the engine has not been started")
        return self._info

    # ------------------------------------------------------------------------------------------------------ sleep and wake
    @property
    def state(self) -> Wakefulness:
        if self.phase is Phase.ASLEEP:
            return "asleep"
        if self.phase is Phase.WAKING:
            return "waking"
        return "drowsy" if self._is_drowsy else "awake"

    async def _sleep(self, *, abort: bool) -> Wakefulness:
        """End the process, and with it all memory it holds, once nothing is under way in it."""
        self._known()
        place = torchrun_place()
        if place is not None and place.size > 1:
            raise Unsupported(
                f"sleep: torchrun has started {place.size} ranks, and the others, which end with the engine, would not come "
                "back; end it, or serve without torchrun"
            )
        self._is_drowsy = True
        for flight in list(self._flights.values()):
            if abort or not flight.runs:
                self._end(flight, Asleep())
                self._send(Abort(flight.request.id))
        while self._flights and self._is_drowsy:
            await asyncio.sleep(QUIET_S)
        async with self._turn:
            self._known()
            if self._is_drowsy and self.phase is not Phase.ASLEEP:
                self.phase = Phase.ASLEEP
                await self._end_process()
        self._known()
        return self.state

    async def _wake(self) -> Wakefulness:
        """Begin a new process, unless there is one."""
        self._known()
        self._is_drowsy = False
        async with self._turn:
            self._known()
            if self.phase is Phase.ASLEEP:
                self.phase = Phase.WAKING
                try:
                    self._info = await self._load()
                except BaseException as error:
                    self._stay_asleep(error)
                    raise
                self._known()
                self._open_up()
                self._watch = asyncio.create_task(self._supervise())
        return self.state

    def _stay_asleep(self, error: BaseException) -> None:
        """The model could not be loaded; requests that came meanwhile are told so."""
        if self.phase is Phase.WAKING:
            self.phase, self._is_drowsy = Phase.ASLEEP, True
            for flight in list(self._flights.values()):
                self._end(flight, Unavailable(f"the engine could not be woken: {error}"))

    async def _end_process(self) -> None:
        """End the process, and what watches over it."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        child = self._child
        if child is not None:
            self._send(Shut())
            with suppress(TimeoutError):
                await asyncio.wait_for(child.process.wait(), SHUT_S)
            await self._bury(child)

    # ---------------------------------------------------------------------------------------------------------- requests
    def _submit(self, flight: Flight) -> None:
        flight.is_running = False
        flight.heard.clear()
        self._send(Submit(flight.request))

    def _send(self, command: Command) -> None:
        if self._child is not None:
            # the queue to a local socket has no bound, so this never waits
            self._child.commands.send(pack(command))

    def _end(self, flight: Flight, error: StepwellError) -> None:
        self._flights.pop(flight.request.id, None)
        flight.events.put_nowait(Failed(flight.request.id, error.code, error.message, error.param, error.status))

    def _erase(self, flight: Flight) -> None:
        """Nobody will come back for what was saved of a request."""
        if self._options.checkpoint_path is not None:
            erase(Path(self._options.checkpoint_path), flight.request)

    def _take(self, child: Child, report: Report | Command | Order) -> None:
        """One report of the process."""
        child.heard_at = time.monotonic()
        if isinstance(report, Pulse):
            child.pulse = report
        elif isinstance(report, StatsReply | QueueReply):
            answer = child.answers.popleft()
            if not answer.done():
                answer.set_result(report)
        elif isinstance(report, Refusal):
            flight = self._flights.pop(report.request_id or "", None)
            if flight is not None:
                flight.events.put_nowait(report.error())
        elif isinstance(report, Queued | Progress | Preview | TextPreview | Chunk | Done | Failed):
            self._pass_on(report)

    def _pass_on(self, event: Event) -> None:
        flight = self._flights.get(event.request_id)
        if flight is None:
            return
        if isinstance(event, Queued):
            if flight.is_queued:  # it runs again; its owner knows that it is queued
                return
            flight.is_queued = True
        elif not flight.is_running:
            flight.is_running = True
            flight.runs += 1
        if isinstance(event, Chunk):
            seen = flight.shown.get(event.index, 0)
            fresh = event.text[max(0, seen - event.start) :]
            told, heard = flight.told.get(event.index, 0), flight.heard.get(event.index, 0)
            tokens = event.tokens[max(0, told - heard) :]
            flight.heard[event.index] = heard + len(event.tokens)
            flight.told[event.index] = max(told, heard + len(event.tokens))
            if event.start < seen and not fresh and not tokens:  # it runs again
                return
            event = replace(event, start=max(seen, event.start), text=fresh, tokens=tokens)
            flight.shown[event.index] = event.start + len(fresh)
        flight.events.put_nowait(event)

    # ----------------------------------------------------------------------------------------------------------- process
    async def _load(self) -> EngineInfo:
        """Start a process and wait until it is ready. Raises what it refuses with, or WorkerLost if it dies."""
        self._lives += 1
        addresses = [f"ipc://{self._folder}/{self._lives}.{name}" for name in ("commands", "reports")]
        commands, reports = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for socket, address in zip((commands, reports), addresses, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            socket.set_hwm(0)
            socket.bind(address)
        line = (sys.executable, "-m", "stepwell.engine.process", *addresses, str(os.getpid()))
        process = await asyncio.create_subprocess_exec(*line, stdin=asyncio.subprocess.DEVNULL)
        self._child = child = Child(process, commands, reports, time.monotonic())
        self._send(Open(self._options.model_dump_json(exclude_unset=True)))
        dead = asyncio.ensure_future(process.wait())
        try:
            while True:
                heard = asyncio.ensure_future(reports.recv())
                await asyncio.wait({heard, dead}, timeout=self._options.hang_seconds, return_when=asyncio.FIRST_COMPLETED)
                if not heard.done():
                    heard.cancel()
                    raise WorkerLost(f"the engine's process died while loading (exit code {process.returncode})")
                report = unpack(heard.result())
                if isinstance(report, Opened):
                    child.heard_at = time.monotonic()
                    return report.info
                if isinstance(report, Refusal):
                    raise report.error()
        except BaseException:
            await self._bury(child)
            raise
        finally:
            dead.cancel()

    async def _supervise(self) -> None:
        """Serve one life of the process after the other."""
        while True:
            assert self._child is not None
            await self._serve(self._child)
            self.restarts += 1
            self._blame()
            await self._reload()
            self._open_up()

    def _open_up(self) -> None:
        """A life of the process begins: give it what waits."""
        self.phase = Phase.READY
        for flight in list(self._flights.values()):
            self._submit(flight)

    async def _serve(self, child: Child) -> None:
        """Pass on what the process says until it is dead, then what it said last."""
        reading = asyncio.create_task(self._read(child))
        dead = asyncio.ensure_future(child.process.wait())
        watching = asyncio.create_task(self._watch_for_hang(child))
        try:
            await asyncio.wait({dead, watching, reading}, return_when=asyncio.FIRST_COMPLETED)
            self.phase = Phase.RESTARTING
            logger.error("the engine's process is lost (exit code %s)", child.process.returncode)
            await self._bury(child, keep_reports=True)
            await asyncio.sleep(0.05)  # what it sent last is on its way through the local socket
        finally:
            for task in (reading, watching, dead):
                task.cancel()
            await asyncio.gather(reading, watching, dead, return_exceptions=True)
            child.reports.close()
            for answer in child.answers:
                if not answer.done():
                    answer.set_exception(Unavailable("the engine is restarting", retry_after_s=1))

    async def _read(self, child: Child) -> None:
        while True:
            self._take(child, unpack(await child.reports.recv()))

    async def _watch_for_hang(self, child: Child) -> None:
        """Return once the process is silent, or a step takes, far too long."""
        least_s = self._options.hang_seconds
        while True:
            await asyncio.sleep(min(0.25, least_s / 4))
            stuck_s, usual_s = child.hang_s()
            is_first = child.pulse.busy_s > 0 and usual_s is None  # nobody knows yet how long such a step takes
            limit_s = HANG_FACTOR * least_s if is_first else max(least_s, HANG_FACTOR * (usual_s or 0.0))
            if time.monotonic() - child.heard_at > least_s or stuck_s > limit_s:
                logger.error("the engine's process hangs for %.1f s; the limit is %.1f s", stuck_s, limit_s)
                child.process.send_signal(signal.SIGABRT)  # it prints where it is
                with suppress(TimeoutError):
                    await asyncio.wait_for(child.process.wait(), 2)
                return

    async def _bury(self, child: Child, *, keep_reports: bool = False) -> None:
        with suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()
        self._child = None
        child.commands.close()
        if not keep_reports:
            child.reports.close()

    def _blame(self) -> None:
        """Fail the requests that were under way for the second time, and got nowhere in between."""
        if not any(flight.is_running for flight in self._flights.values()):
            for flight in self._flights.values():  # one of them may have been begun, and nobody can say which
                flight.suspicions += 1
        for flight in list(self._flights.values()):
            if flight.is_running and self._options.checkpoint_path is not None:
                saved = steps_saved(Path(self._options.checkpoint_path), flight.request)
                if saved > flight.steps_saved:
                    flight.steps_saved, flight.runs, flight.suspicions = saved, 1, 0
            if (flight.is_running and flight.runs >= MOST_RUNS) or flight.suspicions >= MOST_SUSPICIONS:
                self._quarantine[fingerprint(flight.request)] = time.monotonic() + QUARANTINE_S
                self._end(flight, WorkerLost("the engine's process died with this request under way, twice"))

    async def _reload(self) -> None:
        """Load again until it works."""
        failures = 0
        while True:
            await asyncio.sleep(RESTART_S[min(failures, len(RESTART_S) - 1)])
            try:
                await self._load()
                return
            except Exception as error:
                failures += 1
                logger.error("the engine's process could not be brought back (%d): %s", failures, error)
            if failures >= HOPELESS:
                self.phase = Phase.BROKEN
                for flight in list(self._flights.values()):
                    self._end(flight, Unavailable("the engine's process died and can't be brought back"))
