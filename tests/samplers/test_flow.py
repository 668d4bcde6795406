"""Euler on the schedules of FLUX and of HunyuanVideo, each against its pipeline's own functions; and how schedules load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import retrieve_timesteps

from stepwell.errors import WeightsError
from stepwell.models.parts import load_schedule
from stepwell.models.spec import Part
from stepwell.samplers.flow import FlowMatchEuler, FlowTable
from stepwell.weights.repository import Repository


def assert_same(table: FlowTable, reference: FlowMatchEulerDiscreteScheduler) -> None:
    """The same schedule and, by the same predictions, the same trajectory."""
    assert table.sigmas == tuple(reference.sigmas.tolist()) and table.timesteps.tolist() == reference.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    theirs = ours = torch.randn(1, 4, 3, 5, 2, generator=generator)
    for index, timestep in enumerate(reference.timesteps):
        prediction = torch.randn(theirs.shape, generator=generator)
        theirs = reference.step(prediction, timestep, theirs, return_dict=False)[0]
        ours, _ = table.step(ours, prediction, index, ())
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("shift", [7.0, 17.0])  # HunyuanVideo, FastHunyuan
@pytest.mark.parametrize("steps", [1, 2, 6, 7, 30, 50, 99])
def test_hunyuan_video(steps: int, shift: float) -> None:
    for tokens in (100, 100_000):
        reference = FlowMatchEulerDiscreteScheduler(shift=shift)
        retrieve_timesteps(reference, steps, "cpu", sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
        assert_same(FlowMatchEuler(FlowMatchEulerDiscreteScheduler(shift=shift)).table(steps, tokens), reference)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_flux(tokens: int) -> None:
    reference = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    retrieve_timesteps(reference, 20, "cpu", sigmas=np.linspace(1.0, 1 / 20, 20), mu=calculate_shift(tokens))
    assert_same(
        FlowMatchEuler(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)).table(20, tokens), reference
    )


@pytest.mark.parametrize("field", ["stochastic_sampling", "invert_sigmas"])
def test_what_it_can_not_do_is_refused(field: str) -> None:
    with pytest.raises(WeightsError, match=f"{field} = true, which is not supported: set it to false") as refused:
        FlowMatchEuler(FlowMatchEulerDiscreteScheduler(**{field: True}))
    assert refused.value.param == field


@pytest.mark.parametrize("schedule", [UniPCMultistepScheduler(flow_shift=5.0), FlowMatchEulerDiscreteScheduler(shift=5.0)])
def test_a_schedule_is_loaded_by_its_class(schedule: Any, tmp_path: Path) -> None:
    name = type(schedule).__name__
    schedule.save_pretrained(tmp_path / "scheduler")
    repository = Repository("it", tmp_path, {"scheduler": ["diffusers", name]}, {}, {})
    loaded = load_schedule(repository, Part("scheduler", "scheduler", ("UniPCMultistepScheduler", name)))
    assert type(loaded) is type(schedule)
    assert all(loaded.config[field] == schedule.config[field] for field in ("flow_shift", "shift") if field in schedule.config)
    with pytest.raises(WeightsError, match="this model takes DDIMScheduler"):
        load_schedule(repository, Part("scheduler", "scheduler", ("DDIMScheduler",)))
