"""Pictures as packed latents and back, and what the latents a model has painted should have been."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from torch import Tensor

from training.mending import mend
from training.shapes import Caption


def token_cells(cells: Tensor, side: int) -> Tensor:
    """(pictures, rows, columns) of cells -> (pictures, tokens, cells of a token), `side` × `side` for each token."""
    grid = cells.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (pictures, rows, side, columns, side)
    return grid.transpose(2, 3).flatten(3).flatten(1, 2).contiguous()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: list[np.ndarray]) -> Tensor:
    """RGB pictures of one size -> normalised latents (pictures, tokens, channels), packed as FLUX.1 does."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae.encode(x).latent_dist.mean.float()
    z = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(z, *z.shape)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, width: int, height: int) -> list[Image.Image]:
    """The inverse of `encode`, rougher than what ships: in bfloat16."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    z = FluxPipeline._unpack_latents(latents, height, width, factor)
    with torch.autocast("cpu", torch.bfloat16):
        pictures = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample.float()
    pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def mended(
    vae: AutoencoderKL, latents: Tensor, captions: list[Caption], size: tuple[int, int], cell: int
) -> tuple[list[int], Tensor, Tensor]:
    """Painted latents (pictures, tokens, channels) -> which of them can be mended, their mended latents, and silhouettes as of
    `token_cells` in 0 … 1, of cells `cell` pixels wide. What it returns is empty if none can."""
    width, height = size
    fits = [mend(image, caption) for image, caption in zip(decode(vae, latents, width, height), captions, strict=True)]
    found = [(index, fit) for index, fit in enumerate(fits) if fit is not None]
    if not found:
        return [], latents[:0], latents[:0]
    clean = encode(vae, [np.asarray(fit.draw(width, height)) for _, fit in found])
    cells = [np.asarray(fit.silhouette(width // cell, height // cell)) for _, fit in found]
    side = 2 ** len(vae.config.block_out_channels) // cell
    return [index for index, _ in found], clean, token_cells(torch.from_numpy(np.stack(cells)), side).float() / 255
