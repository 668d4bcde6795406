"""A worker that traces requests, one at a time, while it executes everybody's steps.

A trace follows a request's first output. Of the denoising steps it passes over the first, in which caches and kernels
warm up (unless there is no other), records the next `steps`, and ends. With `all_stages` it records from the request's first
step until all of its outputs are done. Steps that others take meanwhile are in the trace under their own name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from stepwell.config.schema import EngineOptions
from stepwell.engine.steps import ItemResult, StagePlan, Step, StepExecutor, StepResult
from stepwell.profiling.trace import Recording, file_name, named, open_folder
from stepwell.types import Request

logger = logging.getLogger("stepwell.profiling")


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """Where traces go, how many denoising steps each holds, and whether it holds all stages instead."""

    folder: Path
    steps: int
    all_stages: bool


def trace_settings(options: EngineOptions) -> TraceSettings | None:
    """How to trace, if that is asked for; says what of it does not apply."""
    given = options.model_fields_set
    if not options.profile:
        if "num_profiled_timesteps" in given:
            logger.warning("num_profiled_timesteps does not apply: profile is off")
        if options.profile_all_stages:
            logger.warning("profile_all_stages does not apply: profile is off")
        return None
    if options.profile_all_stages and "num_profiled_timesteps" in given:
        logger.warning("num_profiled_timesteps does not apply: profile_all_stages records every step")
    return TraceSettings(open_folder(), options.num_profiled_timesteps, options.profile_all_stages)


class TracingWorker:
    """Implements `StepExecutor` by another one. A request that begins during another's trace has none of its own."""

    def __init__(self, worker: StepExecutor, settings: TraceSettings):
        self.models = worker.models
        self.batch_tokens = worker.batch_tokens
        self.choices = worker.choices
        self._worker = worker
        self._settings = settings
        self._trace: Trace | None = None

    def plan(self, request: Request) -> tuple[StagePlan, ...]:
        return self._worker.plan(request)

    def execute(self, step: Step) -> StepResult:
        if self._trace is None:
            first = next((new.request for new in step.new if new.index == 0), None)
            if first is None:
                return self._worker.execute(step)
            self._trace = Trace(first, self._worker.plan(first), self._settings)
        trace = self._trace
        trace.before(step)
        with named(trace.name(step)):
            result = self._worker.execute(step)
        trace.after(step, result)
        if trace.is_over:
            self._trace = None
        return result

    def free(self, sample_ids: tuple[str, ...]) -> None:
        if self._trace is not None and self._trace.misses(sample_ids):
            self._trace.drop()
            self._trace = None
        self._worker.free(sample_ids)

    def forget(self, request: Request) -> None:
        self._worker.forget(request)

    def held(self) -> int:
        return self._worker.held()

    def close(self) -> None:
        self._worker.close()


class Trace:
    """The trace of one request. Whatever goes wrong with it is logged, and is not the request's trouble."""

    def __init__(self, request: Request, plan: tuple[StagePlan, ...], settings: TraceSettings):
        assert request.sampling.num_outputs is not None
        self._request_id = request.id
        self._settings = settings
        steps = sum(stage.steps for stage in plan if stage.name == "denoise")
        self._first = 0 if steps == 1 else 1  # index of the first step to record
        self._end = min(steps, self._first + settings.steps)
        self._last_stage = next(stage.name for stage in reversed(plan) if stage.steps)
        self._followed = {f"{request.id}/{index}" for index in range(request.sampling.num_outputs if settings.all_stages else 1)}
        self._seen = 0  # denoising steps so far
        self._recording: Recording | None = None
        self.is_over = False

    def name(self, step: Step) -> str:
        """What the step is called: `denoise_step_3` if it is one of the request's, else `others_denoise`."""
        own = next((index for sample_id, index in step.items if sample_id in self._followed), None)
        return f"others_{step.stage}" if own is None else f"{step.stage}_step_{own}"

    def before(self, step: Step) -> None:
        """Prepare or start, if this is the step for it."""
        is_own = any(sample_id in self._followed for sample_id, _ in step.items)
        if not is_own or not (self._settings.all_stages or step.stage == "denoise"):
            return
        try:
            if self._recording is None:
                self._recording = Recording.prepare()
                if self._recording is None:
                    logger.warning("%s is not traced: this process is recording another trace", self._request_id)
                    self.is_over = True
                    return
                is_due = self._settings.all_stages or self._first == 0
            else:
                is_due = not self._settings.all_stages and self._seen == self._first
            if is_due:
                self._recording.start()
        except Exception as error:
            self._give_up(error)

    def after(self, step: Step, result: StepResult) -> None:
        """Count, and save if this was the last step."""
        if self._recording is None or self.is_over:
            return
        own = [item for item in result.items if item.sample_id in self._followed and item.error is None]
        if self._settings.all_stages:
            self._followed -= {item.sample_id for item in own if self._is_last(step, item)}
            is_complete = not self._followed
        else:
            self._seen += step.stage == "denoise" and bool(own)
            is_complete = self._seen == self._end
        if is_complete:
            self._save()

    def _is_last(self, step: Step, item: ItemResult) -> bool:
        return item.is_done and step.stage == self._last_stage

    def misses(self, sample_ids: tuple[str, ...]) -> bool:
        """Whether a sample that is over early is one whose steps the trace was to hold."""
        return not self._followed.isdisjoint(sample_ids)

    def drop(self) -> None:
        """End without a file: the request was aborted, or failed."""
        self.is_over = True
        if self._recording is None:
            return
        try:
            self._recording.drop()
        except Exception as error:
            logger.warning("the trace of %s could not be ended: %s", self._request_id, error)

    def _save(self) -> None:
        assert self._recording is not None
        self.is_over = True
        steps = None if self._settings.all_stages else self._end - self._first
        path = self._settings.folder / file_name(self._request_id, steps)
        try:
            self._recording.save(path)
        except Exception as error:
            logger.warning("the trace of %s could not be saved: %s", self._request_id, error)
        else:
            logger.info("Saved profiler traces to: %s", path)

    def _give_up(self, error: Exception) -> None:
        logger.warning("%s is not traced: %s", self._request_id, error)
        self.drop()
