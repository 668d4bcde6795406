"""Moving shapes as the autoencoder's latents and the transformer's tokens see them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.moving import Motion, draw, silhouette
from training.train_video_vae import decode, encode, to_unit

Shape = tuple[int, int, int]  # width, height, latent frames
PATCH, CELL = 8, 2  # pixels per token (4× down and 2×2 to a token), pixels per cell of the silhouettes
FRAMES_PER_LATENT = 4


def frames_of(shape: Shape) -> int:
    """Of a clip"""
    return 1 + FRAMES_PER_LATENT * (shape[2] - 1)


def _scale(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean[:, None, None, None], std[:, None, None, None]


@torch.no_grad()
def encode_motions(vae: AutoencoderKLWan, motions: list[Motion], shape: Shape) -> tuple[Tensor, Tensor]:
    """What clips of `shape` become: latents (clips, channels, frames, rows, columns) of deviation 1, bfloat16, and silhouettes
    (clips, tokens, cells) in 0 … 255."""
    width, height, latent_frames = shape
    frames, chunk = frames_of(shape), 4 if latent_frames > 1 else 40
    mean, std = _scale(vae)
    latents, cells = [], []
    for start in range(0, len(motions), chunk):
        clips = np.stack([draw(m, frames, width, height, 3) for m in motions[start : start + chunk]])
        with torch.autocast("cpu", torch.bfloat16):
            z = encode(vae, to_unit(torch.from_numpy(clips).permute(0, 4, 1, 2, 3))).float()
        latents.append(((z - mean) / std).bfloat16())
        cells += [silhouette(m, frames, width // CELL, height // CELL, 3) for m in motions[start : start + chunk]]
    return torch.cat(latents), per_token(torch.from_numpy(np.stack(cells)))


@torch.no_grad()
def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> np.ndarray:
    """(clips, channels, frames, rows, columns) of deviation 1 -> clips (clips, frames, height, width, 3) uint8"""
    mean, std = _scale(vae)
    with torch.autocast("cpu", torch.bfloat16):
        clips = torch.cat([decode(vae, chunk * std + mean).float() for chunk in latents.split(4)])
    return ((clips.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def per_token(silhouettes: Tensor) -> Tensor:
    """(clips, frames, rows, columns) cells -> (clips, tokens, cells); the first latent frame holds its frame four times"""
    first = silhouettes[:, :1].expand(-1, FRAMES_PER_LATENT, -1, -1)
    side = PATCH // CELL
    grid = torch.cat([first, silhouettes[:, 1:]], 1)
    grid = grid.unflatten(3, (-1, side)).unflatten(2, (-1, side)).unflatten(1, (-1, FRAMES_PER_LATENT))
    return grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3).contiguous()


def tokens_of(latents: Tensor) -> Tensor:
    """(clips, channels, frames, rows, columns) -> (clips, tokens, 4 · channels + 1): what a token covers, and whether that is the
    first frame, which the autoencoder writes in a way of its own"""
    grid = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
    first = torch.zeros(*grid.shape[:-1], 1)
    first[:, 0] = 1
    return torch.cat([grid, first.to(grid)], -1).flatten(1, 3)
