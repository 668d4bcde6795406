"""Executes steps on one device and owns the states of its samples. Decides nothing."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from stepwell.engine.memory import memory_mb
from stepwell.engine.steps import ItemResult, NewSample, StagePlan, Step, StepResult
from stepwell.errors import OutOfMemory, StepFailed, StepwellError
from stepwell.offload.parts import Residency
from stepwell.stages.base import Item, Pipeline, Stage, State
from stepwell.types import ModelInfo, Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What of the plan the worker itself needs."""

    batch_tokens: int
    threads: int | None
    device: str
    residency: Residency
    choices: tuple[tuple[str, str, str], ...] = ()


class Worker:
    """One device's executor: a pipeline's stages and the states of the samples under way."""

    def __init__(self, info: ModelInfo, pipeline: Pipeline, settings: WorkerSettings):
        self.info = info
        self.batch_tokens = settings.batch_tokens
        self.choices = settings.choices
        self._device = settings.device
        self._residency = settings.residency
        self._stages = {stage.name: stage for stage in pipeline.stages}
        self._states: dict[str, State] = {}
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if settings.device != "cpu":
            torch.cuda.reset_peak_memory_stats()

    def plan(self, request: Request) -> tuple[StagePlan, ...]:
        """The stages a request goes through, with their cost."""
        return tuple(
            StagePlan(stage.name, stage.steps(request), stage.tokens(request), stage.packs) for stage in self._stages.values()
        )

    def execute(self, step: Step) -> StepResult:
        """Take a step. If it fails for several samples together, each is tried alone, so that only the culprit fails."""
        began = time.perf_counter()
        for sample in step.new:
            self._states[sample.sample_id] = _new_state(sample)
        stage = self._stages[step.stage]
        items = [(sample_id, self._states[sample_id], index) for sample_id, index in step.items]
        try:
            done = self._run(stage, [(state, index) for _, state, index in items])
            results = [_result(sample_id, state, is_done) for (sample_id, state, _), is_done in zip(items, done, strict=True)]
        except Exception as error:
            if len(items) == 1:
                results = [ItemResult(items[0][0], error=_typed(error))]
            else:
                results = [self._alone(stage, *item) for item in items]
        self._synchronise()
        elapsed_ms = (time.perf_counter() - began) * 1e3
        is_any_done = any(result.is_done for result in results)
        return StepResult(tuple(results), elapsed_ms, memory_mb(self._device) if is_any_done else {})

    def free(self, sample_ids: tuple[str, ...]) -> None:
        """Drop the tensors of samples that are over."""
        for sample_id in sample_ids:
            self._states.pop(sample_id, None)
        for stage in self._stages.values():
            stage.release()
        if not self._states:
            self._residency.rest()

    def held(self) -> int:
        """How many samples' tensors are here."""
        return len(self._states)

    def _run(self, stage: Stage, items: list[Item]) -> list[bool]:
        self._residency.bring(stage.needs(items))
        return stage.run(items)

    def _alone(self, stage: Stage, sample_id: str, state: State, index: int) -> ItemResult:
        try:
            return _result(sample_id, state, self._run(stage, [(state, index)])[0])
        except Exception as error:
            return ItemResult(sample_id, error=_typed(error))

    def _synchronise(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()


def _new_state(sample: NewSample) -> State:
    seed = sample.request.sampling.seed
    assert seed is not None
    return State(sample.request, sample.index, seed + sample.index)


def _result(sample_id: str, state: State, is_done: bool) -> ItemResult:
    preview, state.preview = state.preview, None
    frames, state.frames = state.frames, None
    chunk, state.chunk = state.chunk, None
    return ItemResult(sample_id, is_done, preview=preview, frames=frames, cache=state.cache, chunk=chunk, text=state.text)


def _typed(error: Exception) -> StepwellError:
    """Any exception of a step, as one of ours."""
    if isinstance(error, StepwellError):
        return error
    logger.error("a step failed", exc_info=error)
    text = " ".join(str(error).split())[:400]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return OutOfMemory(f"this request does not fit into memory; try a smaller size or fewer outputs ({text})")
    return StepFailed(f"{type(error).__name__}: {text}")
