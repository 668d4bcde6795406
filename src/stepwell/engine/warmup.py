"""Takes what is slow the first time (kernels chosen, memory mapped, code compiled) before anybody waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from stepwell.engine.intake import complete
from stepwell.engine.steps import NewSample, Step, StepExecutor
from stepwell.errors import InvalidRequest, StepwellError, by_code
from stepwell.types import Request, SamplingParams

STEPS = 1  # of denoising: the second has nothing left to do for the first time


def warm_up(worker: StepExecutor, sizes: Sequence[str]) -> None:
    """Make something of each size, WIDTHxHEIGHT in pixels, with every model. Raises StepwellError, naming the size, where that
    can't be."""
    for size, model in product(sizes, worker.models):
        width, height = map(int, size.split("x"))
        sampling = SamplingParams(width=width, height=height, num_inference_steps=STEPS, num_outputs=1, seed=0)
        try:
            _run(worker, complete(Request("", sampling), model))
        except InvalidRequest as error:
            raise InvalidRequest(f"warmup_sizes = {size!r}: {error.message}", param="warmup_sizes") from error
        except StepwellError as error:
            raise by_code(error.code, f"warmup_sizes = {size!r}: {error.message}", "warmup_sizes") from error


def _run(worker: StepExecutor, request: Request) -> None:
    name = f"{request.id}/0"
    new: tuple[NewSample, ...] = (NewSample(name, request, 0),)
    try:
        for stage in worker.plan(request):
            for index in range(stage.steps):
                error = worker.execute(Step(stage.name, ((name, index),), new, request.model)).items[0].error
                if error is not None:
                    raise error
                new = ()
    finally:
        worker.free((name,))
        worker.forget(request)
