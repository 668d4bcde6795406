"""Takes what is slow the first time (kernels chosen, memory mapped, code compiled) before anybody waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from stepwell.engine.intake import complete
from stepwell.engine.steps import NewSample, Step, StepExecutor
from stepwell.errors import InvalidRequest, StepwellError, by_code
from stepwell.types import Frames, ModelInfo, Request, SamplingParams

STEPS = 1  # of denoising: the second has nothing left to do for the first time


def warm_up(worker: StepExecutor, sizes: Sequence[str]) -> None:
    """Make something of each size, WIDTHxHEIGHT in pixels, with every model. Raises StepwellError, naming the size, where that
    can't be."""
    for model in worker.models:
        for size, request in requests(sizes, model).items():
            try:
                _run(worker, request)
            except StepwellError as error:
                raise by_code(error.code, f"warmup_sizes = {size!r}: {error.message}", "warmup_sizes") from error


def requests(sizes: Sequence[str], model: ModelInfo) -> dict[str, Request]:
    """What is made of each size. Raises InvalidRequest, naming the size, for one that the model does not make."""
    made = {}
    for size in sizes:
        width, height = map(int, size.split("x"))
        steps = max(STEPS, model.limits.min_steps)
        sampling = SamplingParams(width=width, height=height, num_inference_steps=steps, num_outputs=1, seed=0)
        needs_image = all(task.takes_image for task in model.tasks)
        image = Frames(bytes(width * height * 3), 1, height, width) if needs_image else None
        try:
            made[size] = complete(Request("", sampling, image=image), model)
        except InvalidRequest as error:
            raise InvalidRequest(f"warmup_sizes = {size!r}: {error.message}", param="warmup_sizes") from error
    return made


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
