"""Wan's repositories: which schedules and configs they may have; and what is told of two transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from stepwell import DiffGenerator
from stepwell.errors import Unsupported, WeightsError
from stepwell.models import wan
from tests.contract.test_contract import request
from tests.support.driving import final_latents, worker_of
from tests.support.families import _wan_reference
from tests.support.repositories import wan_repository


def test_an_euler_schedule_makes_the_same_as_the_reference(tmp_path: Path) -> None:
    path = wan_repository(tmp_path, dict(wan.T2V_1B.tiny))
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(path / "scheduler")
    index = json.loads((path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (path / "model_index.json").write_text(json.dumps(index))
    asked = request(num_frames=5, num_inference_steps=5, guidance_scale=4.0, negative_prompt="blurry")
    latents = final_latents(worker_of(path, threads=1), asked)
    assert (latents - _wan_reference(path, asked).latents).abs().max() < 1e-4


def test_patches_of_several_frames_are_refused(tmp_path: Path) -> None:
    path = wan_repository(tmp_path, {**wan.T2V_1B.tiny, "patch_size": (2, 2, 2)})
    with pytest.raises(WeightsError, match="patch_size = .2, 2, 2. is not supported"):
        worker_of(path)


def test_pictures_only_and_no_encoder_is_refused(tmp_path: Path) -> None:
    path = wan_repository(tmp_path, dict(wan.I2V_14B.tiny), pipeline="WanImageToVideoPipeline")
    with pytest.raises(Unsupported, match="load_encoder = false, but wan2.1-i2v-14b always starts from a picture"):
        worker_of(path, vae_config={"load_encoder": False})


def test_a_cache_reports_on_both_transformers(tmp_path: Path) -> None:
    path = wan_repository(tmp_path, dict(wan.T2V_A14B.tiny), boundary_ratio=0.875)
    sampling = {"width": 32, "height": 32, "num_frames": 1, "num_inference_steps": 10, "seed": 1, "guidance_scale": 1.0}
    with DiffGenerator.from_pretrained(path, threads=1) as generator:
        (made,) = generator.generate("a star", cache={"method": "first_block", "rdt": 1.0, "mc": -1}, **sampling)
    assert made.cache is not None and len(made.cache.computed_steps) == len(made.cache.residuals) == 10
    assert sum(made.cache.computed_steps) == 2 and made.cache.computed_steps[0]  # each transformer's first
    assert made.cache.computed_ratio == pytest.approx((2 * 3 + 8 * 1) / (10 * 3))  # of three blocks, one where it is cached
