"""Encode image: the picture a request starts from, as latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepwell.stages.base import Item, Stage, State
from stepwell.stages.latents import Latents
from stepwell.types import Request

ENCODE_COST = 4  # tokens of denoising one latent token's encoding is worth, roughly; it only orders the queue


class EncodeImage(Stage):
    """The VAE's encoder over the input picture, scaled to the size asked for; one by one, so that nobody's bits depend
    on neighbours. Reference: diffusers `FluxImg2ImgPipeline.prepare_latents`, whose order of random draws it keeps."""

    name = "encode_image"
    kinds = ("vae",)

    def __init__(self, vae: Any, latents: Latents):
        self.vae = vae
        self.latents = latents

    def steps(self, request: Request) -> int:
        return 0 if request.image is None else 1

    def tokens(self, request: Request) -> int:
        return ENCODE_COST * self.latents.tokens(request)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        made = [self._encode(state) for state, _ in items]
        for (state, _), (generator, latents) in zip(items, made, strict=True):
            state.generator, state.image_latents = generator, latents
        return [True] * len(items)

    def _encode(self, state: State) -> tuple[torch.Generator, Tensor]:
        parameter = next(self.vae.parameters())
        generator = torch.Generator("cpu").manual_seed(state.seed)
        encoded = self.vae.encode(to_pixels(state.request).to(parameter.device, parameter.dtype)[None], return_dict=False)[0]
        sampled = encoded.sample(generator) if hasattr(encoded, "sample") else encoded  # a tiny autoencoder has no variance
        return generator, self.latents.pack(self.latents.from_vae(sampled[0])[:, None])


def to_pixels(request: Request) -> Tensor:
    """The input picture at the output's size: (3, height, width) in [-1, 1], resized as diffusers' VaeImageProcessor does."""
    frames, sampling = request.image, request.sampling
    assert frames is not None and sampling.width is not None and sampling.height is not None
    picture = Image.frombytes("RGB", (frames.width, frames.height), frames.data)
    resized = picture.resize((sampling.width, sampling.height), Image.Resampling.LANCZOS)
    unit = torch.from_numpy(np.asarray(resized).astype(np.float32) / 255.0)
    return 2.0 * unit.permute(2, 0, 1) - 1.0
