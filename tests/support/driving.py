"""Driving a worker by hand, step by step, to look at what no public door shows: the latents."""

from __future__ import annotations

from pathlib import Path

import torch

from stepwell.config.load import load
from stepwell.config.schema import EngineOptions
from stepwell.engine.build import build_worker
from stepwell.engine.intake import complete
from stepwell.engine.steps import NewSample, Step
from stepwell.engine.worker import Worker
from stepwell.types import Request


def worker_of(path: Path, **options: object) -> Worker:
    """A worker for a repository, with options by their configuration names."""
    return build_worker(load((EngineOptions,), flags={"model_path": str(path), **options})[EngineOptions])


def final_latents(worker: Worker, request: Request) -> torch.Tensor:
    """(tokens, channels) after the last denoising step of a request's first output"""
    request = complete(request, worker.info)
    name = f"{request.id}/0"
    new: tuple[NewSample, ...] = (NewSample(name, request, 0),)
    for stage in worker.plan(request):
        if stage.name == "decode":
            break
        for index in range(stage.steps):
            result = worker.execute(Step(stage.name, ((name, index),), new)).items[0]
            assert result.error is None, result.error
            new = ()
    latents = worker._states[name].latents
    assert latents is not None
    worker.free((name,))
    return latents
