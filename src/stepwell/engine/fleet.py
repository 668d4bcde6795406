"""Several models behind one executor: a worker each, and one queue for them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stepwell.engine.steps import StagePlan, Step, StepExecutor, StepResult
from stepwell.errors import InvalidRequest
from stepwell.types import Request

LEAST_WEIGHT = 1 / 64  # what a step costs beside its arithmetic does not shrink with the model


def fleet(workers: Sequence[StepExecutor]) -> StepExecutor:
    """One executor for all of them: of a single one, itself."""
    return workers[0] if len(workers) == 1 else Fleet(workers)


class Fleet:
    """Implements `StepExecutor` by others, of one model each."""

    def __init__(self, workers: Sequence[StepExecutor]):
        self.models = tuple(model for worker in workers for model in worker.models)
        self.batch_tokens = {name: tokens for worker in workers for name, tokens in worker.batch_tokens.items()}
        self.choices = tuple(
            (f"{worker.models[0].id}: {what}", value, reason) for worker in workers for what, value, reason in worker.choices
        )
        self._workers = {worker.models[0].id: worker for worker in workers}
        if len(self._workers) < len(workers):
            names = ", ".join(model.id for model in self.models)
            raise InvalidRequest(f"model_path: one model is there twice, in {names}", param="model_path")
        largest = max(model.parameters for model in self.models)
        self._weights = {model.id: max(LEAST_WEIGHT, model.parameters / largest) for model in self.models}

    def plan(self, request: Request) -> tuple[StagePlan, ...]:
        weight = self._weights[request.model]
        return tuple(replace(stage, weight=weight) for stage in self._workers[request.model].plan(request))

    def execute(self, step: Step) -> StepResult:
        return self._workers[step.model].execute(step)

    def free(self, sample_ids: tuple[str, ...]) -> None:
        for worker in self._workers.values():  # who does not know a sample has nothing of it
            worker.free(sample_ids)

    def forget(self, request: Request) -> None:
        self._workers[request.model].forget(request)

    def held(self) -> int:
        return sum(worker.held() for worker in self._workers.values())

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
