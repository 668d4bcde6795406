"""Decode: latents to pixels through the VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.stages.base import Item, Stage
from stepwell.stages.latents import Latents
from stepwell.types import Frames, Request

DECODE_COST = 8  # tokens of denoising one latent token's decoding is worth, roughly; it only orders the queue


class DecodeImage(Stage):
    """Pictures of equal size are decoded as one batch on a GPU; on a CPU one by one, which costs the same there and
    keeps a picture's bits independent of its neighbours (convolutions change algorithm with the batch size)."""

    name = "decode"
    is_shared = False
    kinds = ("vae",)

    def __init__(self, vae: Any, latents: Latents):
        self.vae = vae
        self.latents = latents

    def tokens(self, request: Request) -> int:
        return DECODE_COST * self.latents.tokens(request)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        parameter = next(self.vae.parameters())
        by_size: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for place, (state, _) in enumerate(items):
            assert state.latents is not None
            latents = self.latents.to_vae(self.latents.unpack(state.latents, self.latents.grid(state.request))[:, 0])
            key = (*latents.shape, place if parameter.device.type == "cpu" else -1)
            by_size.setdefault(key, []).append((place, latents.to(parameter.device, parameter.dtype)))
        frames: dict[int, Frames] = {}
        for group in by_size.values():
            decoded = self.vae.decode(torch.stack([latents for _, latents in group]), return_dict=False)[0]
            for (place, _), pixels in zip(group, decoded, strict=True):
                frames[place] = to_frames(pixels[:, None])
        for place, (state, _) in enumerate(items):
            state.frames = frames[place]
        return [True] * len(items)


def to_frames(pixels: Tensor) -> Frames:
    """(3, frames, height, width) in [-1, 1] -> uint8 frames, rounded as diffusers' VaeImageProcessor does"""
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).float().permute(1, 2, 3, 0)
    rounded = (unit * 255).round().to(torch.uint8).cpu().contiguous()
    return Frames(rounded.numpy().tobytes(), *rounded.shape[:3])
