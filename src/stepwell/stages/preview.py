"""A picture of unfinished latents for the price of one small matrix product.

The map from latent channels to RGB is fitted once to the VAE at hand, on blocks of random latents it decodes, so it
needs no table per model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.stages.latents import Latents
from stepwell.types import Frames

SIDE, BLOCK = 32, 4  # of the random latents the map is fitted on


class LatentPreview:
    """Linear latent → RGB. Fitted at the first preview."""

    def __init__(self, vae: Any, latents: Latents):
        self.vae, self.latents = vae, latents
        self._map: Tensor | None = None  # (channels + 1, 3)

    @property
    def is_fitted(self) -> bool:
        """Whether the VAE is needed no more."""
        return self._map is not None

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Frames:
        """(channels, frames, height, width) normalised latents -> a frame for each but those that lead, of that size"""
        if self._map is None:
            self._map = self._fit()
        latents = latents[:, self.latents.lead :]
        channels, frames, height, width = latents.shape
        flat = latents.float().cpu().reshape(channels, -1).T  # (pixels, channels)
        rgb = flat @ self._map[:-1] + self._map[-1]
        pixels = ((rgb / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return Frames(pixels.numpy().tobytes(), frames, height, width)

    def _fit(self) -> Tensor:
        """Least squares of decoded colours, averaged per latent pixel, on the latents they came from."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(1, self.latents.channels, SIDE // BLOCK, SIDE // BLOCK, generator=generator)
        latents = F.interpolate(coarse, scale_factor=BLOCK)  # (1, channels, side, side)
        parameter = next(self.vae.parameters())
        still = self.latents.to_vae(latents[0, :, None])  # (channels, 1 frame, side, side)
        is_video = self.latents.frame_factor > 1
        raw = (still if is_video else still[:, 0]).to(parameter.device, parameter.dtype)[None]
        decoded = self.vae.decode(raw, return_dict=False)[0].float().cpu()
        rgb = F.adaptive_avg_pool2d(decoded[:, :, 0] if is_video else decoded, SIDE)[0].reshape(3, -1).T  # (pixels, 3)
        flat = latents[0].reshape(self.latents.channels, -1).T
        ones = torch.ones(len(flat), 1)
        return torch.linalg.lstsq(torch.cat((flat, ones), dim=1), rgb).solution
