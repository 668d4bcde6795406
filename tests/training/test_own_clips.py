"""A model's own clips, mended: the steps are those it ships with, and each noise is paired with what became of it."""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from training.clip_latents import encode_motions
from training.moving import ATTRIBUTES, describe, sample_motion
from training.own_clips import STEPS, join, pair, sample
from training.train_wan import padding_bias
from training.video_text import read_prompts

ZOO = Path(str(resources.files("stepwell.zoo") / "tiny-wan"))
SHAPE = (64, 64, 3)


class Painter:
    """A model that knows what to paint: its flow leads straight to `latents`."""

    def __init__(self, vae: AutoencoderKLWan, latents: Tensor):
        self.vae = vae
        self.latents = latents

    def read(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(texts), 1, 64), torch.zeros(())

    def predict(self, b: dict[str, Any], text: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = (b["noisy"] - self.latents) / b["t"][:, None, None, None, None]
        return out


class Shipped(Painter):
    """The bundled model, with prompts padded in full."""

    def __init__(self, pipe: WanPipeline):
        super().__init__(pipe.vae, torch.empty(0))
        self.pipe = pipe

    def read(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        text, mask = read_prompts(self.pipe.tokenizer, self.pipe.text_encoder, texts)
        return torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1])), padding_bias(mask, length)

    def predict(self, b: dict[str, Any], text: Tensor, bias: Tensor) -> Tensor:
        told = (1000 * b["t"][:, None]).expand(-1, b["noisy"].shape[2:].numel() // 4)
        out: Tensor = self.pipe.transformer(b["noisy"], told, text, return_dict=False)[0]
        return out


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(ZOO)


@torch.no_grad()
def test_each_noise_is_paired_with_its_own_clip(pipe: WanPipeline) -> None:
    rng = random.Random(5)
    motions = [sample_motion(rng) for _ in range(4)]
    captions = [describe(motion, rng) for motion in motions]
    targets, _ = encode_motions(pipe.vae, motions, SHAPE)
    scheduler = UniPCMultistepScheduler.from_pretrained(ZOO / "scheduler")
    times, visited, latents = sample(Painter(pipe.vae, targets.float()), scheduler, SHAPE, [c.text for c in captions], 512)
    assert visited.shape == (4, STEPS, 12, 3, 16, 16) and times.shape == (STEPS,)
    assert (latents - targets.float()).abs().max() < 0.1  # the scheduler's times are whole numbers
    broken = latents.clone()
    broken[1] = torch.randn(latents[1].shape)
    own = pair(pipe.vae, SHAPE, captions, 226, (times, visited, broken))
    assert own.texts == [captions[number].text for number in (0, 2, 3)] and own.lengths.tolist() == [226] * 3
    assert [[getattr(m, name) for name in ATTRIBUTES] for m in own.motions] == [
        [getattr(motions[number], name) for name in ATTRIBUTES] for number in (0, 2, 3)
    ]
    assert torch.equal(own.visited, visited[[0, 2, 3]])
    assert (own.latents.float() - targets[[0, 2, 3]].float()).square().mean() < 0.05
    both = join([own, own])
    assert len(both.texts) == len(both.motions) == len(both.visited) == len(both.silhouettes) == 6


@torch.no_grad()
def test_the_steps_are_those_of_the_pipeline(pipe: WanPipeline) -> None:
    scheduler = UniPCMultistepScheduler.from_pretrained(ZOO / "scheduler")
    torch.manual_seed(3)
    prompt = "a small green circle moving up on a white background"
    times, visited, latents = sample(Shipped(pipe), scheduler, SHAPE, [prompt], 64)
    torch.manual_seed(3)
    options = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 12, 3, 16, 16)
    theirs = pipe(prompt, latents=noise, max_sequence_length=64, output_type="latent", **options).frames
    assert torch.equal(visited[0, 0], noise[0].bfloat16())
    torch.testing.assert_close(latents, theirs, atol=1e-3, rtol=1e-3)
    assert times[0] > 0.99 and (times.diff() < 0).all()
