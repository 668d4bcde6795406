"""Executes steps on one device and owns the states of its samples. Decides nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stepwell.engine.checkpoints import Checkpoints
from stepwell.engine.memory import memory_mb
from stepwell.engine.steps import ItemResult, NewSample, StagePlan, Step, StepResult
from stepwell.errors import OutOfMemory, StepFailed, StepwellError
from stepwell.offload.parts import Residency
from stepwell.parallel.group import Lost
from stepwell.parallel.ranks import ALONE, Agreed, Ranks
from stepwell.stages.base import Stage, State
from stepwell.types import ModelInfo, Request

logger = logging.getLogger(__name__)
Item = tuple[str, State, int]  # a sample's id and state, and the index of the step to take


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What of the plan the worker itself needs."""

    batch_tokens: int
    threads: int | None
    device: str
    residency: Residency
    choices: tuple[tuple[str, str, str], ...] = ()
    checkpoints: Checkpoints | None = None
    ranks: Ranks = ALONE


class Worker:
    """One device's executor: a pipeline's stages and the states of the samples under way."""

    def __init__(self, info: ModelInfo, stages: tuple[Stage, ...], settings: WorkerSettings):
        self.info = info
        self.models = (info,)
        self.batch_tokens = {info.id: settings.batch_tokens}
        self.choices = settings.choices
        self._device = settings.device
        self._residency = settings.residency
        self._checkpoints = settings.checkpoints
        self._ranks = settings.ranks
        self._stages = {stage.name: stage for stage in stages}
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
        resumed: dict[str, dict[str, int]] = {}
        for sample in step.new:
            state = self._states[sample.sample_id] = _new_state(sample)
            if self._checkpoints is not None:
                resumed[sample.sample_id] = self._checkpoints.find(sample.sample_id, state)
        stage = self._stages[step.stage]
        if not (stage.is_shared or self._ranks.is_first):
            return StepResult((), 0.0)
        items = [(sample_id, self._states[sample_id], index) for sample_id, index in step.items]
        try:
            done = self._run(stage, items)
            results = [_result(sample_id, state, is_done) for (sample_id, state, _), is_done in zip(items, done, strict=True)]
        except Lost:
            raise
        except Exception as error:
            if len(items) == 1 or (self._ranks.size > 1 and not stage.resumes):  # ranks may have got to different points
                results = [ItemResult(sample_id, error=_typed(error)) for sample_id, _, _ in items]
            else:
                results = [self._alone(stage, item) for item in items]
        self._synchronise()
        elapsed_ms = (time.perf_counter() - began) * 1e3
        if self._checkpoints is not None:
            results = [replace(result, resumed=resumed.get(result.sample_id, {})) for result in results]
            for (sample_id, state, index), result in zip(items, results, strict=True):
                if result.error is None:
                    self._checkpoints.after(stage, sample_id, state, index + 1, elapsed_ms / 1e3)
        is_any_done = any(result.is_done for result in results)
        return StepResult(tuple(results), elapsed_ms, memory_mb(self._device) if is_any_done else {})

    def free(self, sample_ids: tuple[str, ...]) -> None:
        """Drop the tensors of samples that are over."""
        for sample_id in sample_ids:
            self._states.pop(sample_id, None)
        if self._checkpoints is not None:
            self._checkpoints.leave(sample_ids)
        for stage in self._stages.values():
            stage.release()
        if not self._states:
            self._residency.rest()

    def forget(self, request: Request) -> None:
        """Erase what was saved of a request: it is over, and nobody will come back for it."""
        if self._checkpoints is not None:
            self._checkpoints.erase(request)

    def held(self) -> int:
        """How many samples' tensors are here."""
        return len(self._states)

    def close(self) -> None:
        """Nothing here outlives it."""

    def _run(self, stage: Stage, items: Sequence[Item]) -> list[bool]:
        if self._checkpoints is not None:
            for sample_id, state, _ in items:
                self._checkpoints.before(stage.name, sample_id, state)
        states = [(state, index) for _, state, index in items]

        def run() -> list[bool]:
            self._residency.bring(stage.needs(states))
            return stage.run(states)

        return self._ranks.together(run) if stage.is_shared else run()

    def _alone(self, stage: Stage, item: Item) -> ItemResult:
        sample_id, state, _ = item
        try:
            return _result(sample_id, state, self._run(stage, [item])[0])
        except Lost:
            raise
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
    text_preview, state.text_preview = state.text_preview, None
    return ItemResult(
        sample_id,
        is_done,
        preview=preview,
        frames=frames,
        cache=state.cache,
        chunk=chunk,
        text_preview=text_preview,
        text=state.text,
    )


def _typed(error: Exception) -> StepwellError:
    """Any exception of a step, as one of ours."""
    error = error.error if isinstance(error, Agreed) else error
    if isinstance(error, StepwellError):
        return error
    logger.error("a step failed", exc_info=error)
    text = " ".join(str(error).split())[:400]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return OutOfMemory(
            f"this request does not fit into memory; try a smaller size or fewer outputs{f' ({text})' if text else ''}"
        )
    return StepFailed(f"{type(error).__name__}: {text}" if text else type(error).__name__)
