"""FastWan: three steps without guidance, against the plain loop of its reference (FastVideo's `DmdDenoisingStage`) around
diffusers' transformer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from stepwell import DiffGenerator
from stepwell.engine.intake import complete
from stepwell.errors import InvalidRequest
from stepwell.models import wan
from stepwell.types import Request, SamplingParams
from tests.support.driving import final_latents, worker_of
from tests.support.repositories import wan_repository


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one, with the gates that FastWan 2.1's checkpoints hold."""
    folder = wan_repository(tmp_path_factory.mktemp("fastwan"), dict(wan.FAST_1B.tiny))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "WanDMDPipeline"}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    gates = {f"blocks.{i}.to_gate_compress.{kind}": torch.zeros(4) for i in range(3) for kind in ("weight", "bias")}
    save_file({**load_file(weights), **gates}, weights)
    return folder


@torch.no_grad()
def test_the_plain_loop_makes_the_same(path: Path) -> None:
    asked = Request("a red circle moving right", SamplingParams(width=48, height=32, num_frames=9, seed=5))
    worker = worker_of(path, threads=1)
    got = final_latents(worker, asked)
    layout = worker._stages["denoise"].latents  # type: ignore[attr-defined]
    whole = complete(asked, worker.models[0])
    assert whole.sampling.num_inference_steps == 3

    parts = WanPipeline.from_pretrained(path, transformer=None)
    text, _ = parts.encode_prompt(asked.prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    transformer = WanTransformer3DModel.from_pretrained(path / "transformer").eval()
    generator = torch.Generator().manual_seed(5)
    x = layout.noise(whole, generator, torch.float32)  # the same noise, in the order of tokens
    grid = layout.grid(whole)
    for time, following in ((1000, 757), (757, 522), (522, None)):
        video = layout.unpack(x, grid)[None]
        velocity = layout.pack(transformer(video, torch.tensor([float(time)]), text, return_dict=False)[0][0])
        x = x - sigma(time) * velocity
        if following is not None:
            x = sigma(following) * torch.randn(x.shape, generator=generator) + (1 - sigma(following)) * x
    assert (got - x).abs().max() < 1e-4


def sigma(time: int) -> float:
    """Of the nearest of 1000 timesteps under a shift of 8."""
    linear = torch.linspace(1000, 1, 1000).double() / 1000
    shifted = 8 * linear / (1 + 7 * linear)
    return float(shifted[(1000 * shifted - time).abs().argmin()])


def test_another_number_of_steps_is_refused(path: Path) -> None:
    with DiffGenerator.from_pretrained(path, threads=1) as generator:
        with pytest.raises(InvalidRequest, match="num_inference_steps = 8: .* was distilled for 3 steps"):
            generator.generate("a red circle", num_inference_steps=8)
        (made,) = generator.generate("a red circle", seed=1)
        (guided,) = generator.generate("a red circle", seed=1, guidance_scale=6.0, negative_prompt="dark")
    assert made.frames.shape == (5, 32, 32, 3) and (made.frames == guided.frames).all()
