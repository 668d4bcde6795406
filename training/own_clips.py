"""Clips a model makes itself, and what they would be without their mistakes: what noise becomes what clip.

With noise drawn anew for every clip the flow's loss averages over all places where an object might be, and late steps have to
choose. Here each noise has one clip: what the model made of it as it ships, mended (`training.mending_clips`). Straight paths
between the two ("rectified flow", X. Liu et al. 2022, section 2) and the latents that the model's own steps visited lead there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from torch import Tensor

from training.clip_latents import PATCH, Shape, decode_latents, encode_motions
from training.mending_clips import mend
from training.moving import Caption, Motion, describe, sample_motion

STEPS = 12  # of sampling, as the model ships
SHARES: dict[Shape, float] = {(64, 64, 5): 0.74, (64, 64, 3): 0.14, (96, 64, 5): 0.06, (64, 96, 5): 0.06}  # of batches
TOKENS = 5120  # of video sampled at once
FULL = 0.35  # of prompts state everything
LENGTHS, LENGTH_WEIGHTS = (512, 226, 64), (0.8, 0.12, 0.08)  # tokens a prompt is padded to


class Model(Protocol):
    """What is asked of a trainer. `predict` takes a batch of "shape", "noisy", "noised", "t" and prompts as `read` gives them."""

    vae: AutoencoderKLWan

    def read(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]: ...

    def predict(self, b: dict[str, Any], text: Tensor, bias: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class OwnClips:
    """Of one shape. `lengths` (clips,): tokens that prompts are padded to. `visited` (clips, steps, channels, frames, rows,
    columns): the latents that the model was asked about, noise first, at `times` (steps,). `latents`, `silhouettes`: of the
    mended `motions`, as `encode_motions` gives them."""

    texts: list[str]
    lengths: Tensor
    motions: list[Motion]
    times: Tensor
    visited: Tensor
    latents: Tensor
    silhouettes: Tensor


def make_own(model: Model, scheduler: UniPCMultistepScheduler, count: int) -> dict[Shape, OwnClips]:
    """At least `count` clips made and mended, minus those that cannot be."""
    parts: dict[Shape, list[OwnClips]] = {}
    made, batch = 0, 0
    while made < count:
        rng = random.Random(f"own {batch}")
        shape = rng.choices(list(SHARES), list(SHARES.values()))[0]
        width, height, frames = shape
        size = TOKENS // (frames * (width // PATCH) * (height // PATCH))
        motions = [sample_motion(rng, width / height) for _ in range(size)]
        captions = [describe(motion, rng, full=rng.random() < FULL) for motion in motions]
        length = rng.choices(LENGTHS, LENGTH_WEIGHTS)[0]
        sampled = sample(model, scheduler, shape, [caption.text for caption in captions], length)
        parts.setdefault(shape, []).append(pair(model.vae, shape, captions, length, sampled))
        made, batch = made + size, batch + 1
        if batch % 20 == 0:
            print(f"{made} own clips made, {sum(len(p.texts) for own in parts.values() for p in own)} mended", flush=True)
    return {shape: join(own) for shape, own in parts.items()}


@torch.no_grad()
def sample(
    model: Model, scheduler: UniPCMultistepScheduler, shape: Shape, texts: list[str], length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The times of the steps, the latents visited at each, bfloat16, and the latents made; noise from torch's generator."""
    width, height, frames = shape
    text, bias = model.read(texts, length)
    x = torch.randn(len(texts), model.vae.config.z_dim, frames, height // 4, width // 4)
    scheduler.set_timesteps(STEPS)
    visited = []
    for step in scheduler.timesteps:
        visited.append(x.bfloat16())
        b = {"shape": shape, "noisy": x, "noised": torch.ones(1, 1, frames, 1, 1), "t": torch.full((len(x),), float(step) / 1000)}
        x = scheduler.step(model.predict(b, text, bias), step, x, return_dict=False)[0]
    return scheduler.sigmas[:-1].clone(), torch.stack(visited, 1), x


def pair(
    vae: AutoencoderKLWan, shape: Shape, captions: list[Caption], length: int, sampled: tuple[Tensor, Tensor, Tensor]
) -> OwnClips:
    """What `sample` made of the captions, with the mended clips; clips that cannot be mended are left out."""
    times, visited, latents = sampled
    mended = [mend(clip, caption) for clip, caption in zip(decode_latents(vae, latents), captions, strict=True)]
    kept = [number for number, motion in enumerate(mended) if motion is not None]
    motions = [motion for motion in mended if motion is not None]
    targets, silhouettes = encode_motions(vae, motions, shape)
    return OwnClips(
        texts=[captions[number].text for number in kept],
        lengths=torch.full((len(kept),), length),
        motions=motions,
        times=times,
        visited=visited[kept],
        latents=targets,
        silhouettes=silhouettes,
    )


def join(parts: list[OwnClips]) -> OwnClips:
    """All in one"""
    return OwnClips(
        [text for part in parts for text in part.texts],
        torch.cat([part.lengths for part in parts]),
        [motion for part in parts for motion in part.motions],
        parts[0].times,
        torch.cat([part.visited for part in parts]),
        torch.cat([part.latents for part in parts]),
        torch.cat([part.silhouettes for part in parts]),
    )
