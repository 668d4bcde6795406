"""The loop: take in requests and aborts, schedule a step, have it executed, tell everyone what happened."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from stepwell.engine.api import Kind, QueueReply, StatsReply
from stepwell.engine.pace import Pace
from stepwell.engine.scheduler import Scheduler
from stepwell.engine.steps import ItemResult, Step, StepExecutor, StepResult
from stepwell.errors import Aborted, Asleep, EngineClosed, InvalidRequest, QueueFull, StepFailed, StepwellError, WorkerLost
from stepwell.types import Done, Event, Failed, Frames, Output, Preview, Progress, Queued, Request, SchedulingPolicy

Sink = Callable[[Event], None]
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Flight:
    """A live request: where its events go, and what it has so far."""

    request: Request
    sink: Sink
    submitted_at: float
    outputs: dict[int, Output] = field(default_factory=dict)
    timings_ms: dict[int, dict[str, float]] = field(default_factory=dict)
    denoise_ms: dict[int, list[float]] = field(default_factory=dict)
    memory_mb: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    steps_taken: Counter[tuple[int, str]] = field(default_factory=Counter)


class EngineCore:
    """Runs on a thread of its own (`run`); every other method may be called from any thread."""

    def __init__(
        self,
        worker: StepExecutor,
        max_running: int,
        max_queued: int,
        max_wait_s: float | None = None,
        policy: SchedulingPolicy = "shortest",
    ):
        self._worker = worker
        self._max_wait_s = max_wait_s
        self.pace = Pace()
        self._scheduler = Scheduler(worker.batch_tokens, max_running, max_queued, policy)
        self._flights: dict[str, Flight] = {}
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._is_closing = False
        self._resting: Future[bool] | None = None
        self._steps = 0
        self._batch_sizes: dict[Kind, Counter[int]] = {}

    # ------------------------------------------------------------------------------------------------- from any thread
    def submit(self, request: Request, sink: Sink) -> Future[None]:
        """Queue a request; the answer is there once it is queued, or is QueueFull or EngineClosed. Events go to `sink`.

        An abort posted after this call always finds the request, even if the answer is still to come.
        """
        submitted_at = time.perf_counter()
        return self._call(lambda: self._admit(request, sink, submitted_at))

    def abort(self, request_id: str) -> None:
        """End a request before its next step, with Failed(code="aborted")."""
        self._post(lambda: self._end(request_id, Aborted("the request was aborted")))

    def stats(self) -> StatsReply:
        """A snapshot, taken without waiting for the step under way."""
        return StatsReply(
            queued_samples=self._scheduler.queued,
            running_samples=self._scheduler.running,
            requests=len(self._flights),
            steps=self._steps,
            held_samples=self._worker.held(),
            batch_sizes={kind: dict(sizes) for kind, sizes in self._batch_sizes.copy().items()},
            step_seconds=self.pace.seconds.copy(),
            step_tokens=self.pace.step_tokens.copy(),
            tokens=self.pace.tokens,
        )

    def queue(self) -> QueueReply:
        """A snapshot, taken without waiting for the step under way."""
        return QueueReply(self._scheduler.overview(), self.pace.tokens_per_s)

    def forget(self, request: Request) -> None:
        """Erase what was saved of a request that is done: whoever asked has what it asked for."""
        self._worker.forget(request)

    def rest(self, *, abort: bool) -> Future[bool]:
        """Take nothing new in, and end what only waits, or with `abort` everything. The answer is True once nothing is under
        way any more, False if `resume` came first."""
        return self._call(lambda: self._begin_rest(abort=abort)).result()

    def resume(self) -> None:
        """Take requests again."""
        self._call(self._end_rest).result()

    @property
    def is_resting(self) -> bool:
        return self._resting is not None

    def close(self) -> None:
        """End every request and the loop."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            if not self._is_closing:
                self._inbox.append(action)
                self._wake.notify()

    def _call(self, action: Callable[[], T]) -> Future[T]:
        """Run `action` on the loop's thread, between two steps; the answer is what it returns."""
        answer: Future[T] = Future()

        def act() -> None:
            try:
                answer.set_result(action())
            except BaseException as error:  # whoever waits for the answer gets it; the loop goes on
                answer.set_exception(error)

        with self._wake:
            if self._is_closing:
                raise self._closed()
            self._inbox.append(act)
            self._wake.notify()
        return answer

    # ------------------------------------------------------------------------------------------------- the loop's thread
    def run(self, when_broken: Callable[[], object] = lambda: None) -> None:
        """Loop until closed. `when_broken` is called first thing if the loop itself or its worker is."""
        why: StepwellError = EngineClosed("the engine was closed while the request was under way")
        try:
            while self._take_in():
                step = self._scheduler.schedule()
                if step is not None:
                    self._execute(step)
        except Exception as error:
            logger.exception("the engine stops: its worker or the loop itself is broken")
            why = WorkerLost(f"the engine stopped: {' '.join(str(error).split())[:400]}")
            when_broken()
        finally:
            with self._wake:
                self._is_closing = True
                actions, self._inbox = self._inbox, []
            for action in actions:
                action()
            for request_id in list(self._flights):
                self._end(request_id, why)
            self._settle_rest()
            self._worker.close()

    def _take_in(self) -> bool:
        """Wait for something to do and apply what was posted. False once closed."""
        self._settle_rest()
        with self._wake:
            while not (self._inbox or self._is_closing or self._flights):
                self._wake.wait()
            if self._is_closing:
                return False
            actions, self._inbox = self._inbox, []
        for action in actions:
            action()
        return True

    def _admit(self, request: Request, sink: Sink, submitted_at: float) -> None:
        if self._is_closing or self._resting is not None:
            raise self._closed()
        if request.id in self._flights:
            raise InvalidRequest(f"id = {request.id!r}: a request of that id is under way", param="id")
        plan = self._worker.plan(request)
        self._check_wait()
        try:
            ahead = self._scheduler.add(request, plan)
        except QueueFull as error:
            rate, waiting = self.pace.tokens_per_s, self._scheduler.queued
            error.retry_after_s = self._scheduler.tokens_left() / rate / waiting if rate else None  # one place, on average
            raise
        flight = self._flights[request.id] = Flight(request, sink, submitted_at)
        self._tell(flight, Queued(request.id, ahead))

    def _closed(self) -> StepwellError:
        """Why nothing is taken in."""
        return EngineClosed("the engine is closed") if self._resting is None else Asleep()

    def _begin_rest(self, *, abort: bool) -> Future[bool]:
        self._resting = self._resting or Future()
        for request_id, flight in list(self._flights.items()):
            if abort or not flight.timings_ms:  # no step of it was taken
                self._end(request_id, Asleep())
        return self._resting

    def _end_rest(self) -> None:
        resting, self._resting = self._resting, None
        if resting is not None and not resting.done():
            resting.set_result(False)

    def _settle_rest(self) -> None:
        if self._resting is not None and not self._flights and not self._resting.done():
            self._resting.set_result(True)

    def _check_wait(self) -> None:
        """Refuse what would wait longer than is allowed, as far as the pace is known."""
        rate = self.pace.tokens_per_s
        if self._max_wait_s is None or not rate:
            return
        wait_s = self._scheduler.tokens_left() / rate
        if wait_s > self._max_wait_s:
            raise QueueFull(
                f"about {wait_s:.0f} s of work are waiting, and the queue takes {self._max_wait_s:g} s; try again later",
                retry_after_s=wait_s - self._max_wait_s,
            )

    def _tell(self, flight: Flight, event: Event) -> None:
        """Give an event to its owner. A sink that raises ends its own request and nobody else's."""
        try:
            flight.sink(event)
        except Exception:
            logger.exception("the sink of request %s raised; the request ends", event.request_id)
            if self._flights.pop(event.request_id, None) is not None:
                self._worker.free(self._scheduler.remove(event.request_id))
                self._worker.forget(flight.request)

    def _execute(self, step: Step) -> None:
        tokens, cost = self._scheduler.tokens(step), self._scheduler.cost(step)
        begun = [(new, self._scheduler.position(new.sample_id).steps) for new in step.new]
        for new, total in begun:
            if new.request.id in self._flights:
                self._tell(self._flights[new.request.id], Progress(new.request.id, new.index, step.stage, 0, total))
        began = time.perf_counter()
        kind = step.model, step.stage
        with self.pace.step(kind, tokens, cost):
            result = self._worker.execute(step)
        self._steps += 1
        self._batch_sizes.setdefault(kind, Counter())[len(step.items)] += 1
        for item in result.items:
            request_id, _, index = item.sample_id.rpartition("/")
            flight = self._flights.get(request_id)
            if flight is None:  # another output of the request failed in this very step
                self._worker.free((item.sample_id,))
            elif item.error is not None:
                self._end(request_id, item.error)
            else:
                self._settle(flight, int(index), item, step.stage, began, result)

    def _settle(self, flight: Flight, index: int, item: ItemResult, stage: str, began: float, result: StepResult) -> None:
        """Account for one sample's step and tell its owner."""
        request = flight.request
        timings = flight.timings_ms.setdefault(index, {"queued": (began - flight.submitted_at) * 1e3})
        timings[stage] = timings.get(stage, 0.0) + result.elapsed_ms
        if stage.startswith("denoise"):  # a second denoiser's stage is another
            flight.denoise_ms.setdefault(index, []).append(result.elapsed_ms)
        if item.is_done and result.memory_mb:
            flight.memory_mb.setdefault(index, {})[stage] = result.memory_mb
        if item.resumed:
            self._scheduler.resume(item.sample_id, item.resumed)
            flight.steps_taken.update({(index, name): steps for name, steps in item.resumed.items()})
        flight.steps_taken[index, stage] += 1
        total = self._scheduler.position(item.sample_id).steps
        has_left = self._scheduler.advance(item.sample_id, stage_is_done=item.is_done)
        if has_left:
            self._worker.free((item.sample_id,))
        if item.chunk is not None:
            self._tell(flight, item.chunk)
        if item.text_preview is not None:
            self._tell(flight, item.text_preview)
        if item.preview is not None:
            denoised = (n for (of, name), n in flight.steps_taken.items() if of == index and name.startswith("denoise"))
            self._tell(flight, Preview(request.id, index, sum(denoised), item.preview))
        share = 1.0 if has_left else self._scheduler.share(item.sample_id)
        self._tell(flight, Progress(request.id, index, stage, flight.steps_taken[index, stage], total, share))
        if not has_left or request.id not in self._flights:
            return
        assert request.sampling.seed is not None and (item.frames is not None or item.text is not None)
        timings["total"] = (time.perf_counter() - flight.submitted_at) * 1e3
        flight.outputs[index] = Output(
            index,
            request.sampling.seed + index,
            item.frames or Frames(b"", 0, 0, 0),
            timings,
            cache=item.cache,
            denoise_ms=tuple(flight.denoise_ms.get(index, ())),
            text=item.text,
            memory_mb=flight.memory_mb.get(index, {}),
        )
        if len(flight.outputs) == request.sampling.num_outputs:
            del self._flights[request.id]
            self._scheduler.remove(request.id)
            self._tell(flight, Done(request.id, tuple(flight.outputs[i] for i in sorted(flight.outputs))))

    def _end(self, request_id: str, error: Exception) -> None:
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return
        self._worker.free(self._scheduler.remove(request_id))
        if flight.timings_ms and not isinstance(
            error, EngineClosed
        ):  # else it is asked for again, and goes on from what there is
            self._worker.forget(flight.request)
        known = error if isinstance(error, StepwellError) else StepFailed(str(error))
        self._tell(flight, Failed(request_id, known.code, known.message, known.param, known.status))
