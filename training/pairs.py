"""The model's own pictures, mended, each beside the noise it began from (X. Liu et al. 2022, "Flow Straight and Fast":
reflow; here with targets better than what the model drew)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from training.mending import Mended, mend
from training.shapes import Caption, describe, sample_scene

# Lengths of what a user may ask for; the default of this model and that of FluxPipeline count most.
LENGTHS = {16: 0.17, 24: 0.1, 32: 0.46, 64: 0.08, 128: 0.06, 256: 0.04, 512: 0.09}
CHUNK = 20
FULL = 0.4  # of the prompts state everything
SEED = 11


@dataclass(frozen=True)
class Group:
    """Pairs of one picture size and one padded length. `noise` and `latents`: (pictures, tokens, channels); `silhouettes` as
    of `token_cells`, in 0 … 255."""

    width: int
    height: int
    length: int
    texts: list[str]
    noise: Tensor
    latents: Tensor
    silhouettes: Tensor


def token_cells(cells: Tensor, side: int) -> Tensor:
    """(pictures, rows, columns) of cells -> (pictures, tokens, cells of a token), `side` × `side` for each token."""
    grid = cells.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (pictures, rows, side, columns, side)
    return grid.transpose(2, 3).flatten(3).flatten(1, 2).contiguous()


def encode(vae: AutoencoderKL, pictures: list[np.ndarray]) -> Tensor:
    """RGB pictures of one size -> normalised latents (pictures, tokens, channels), packed as FLUX.1 does."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mean = vae.encode(x).latent_dist.mean.float()
    z = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(z, *z.shape)


@torch.no_grad()
def paint(pipe: FluxPipeline, captions: list[Caption], noise: Tensor, size: tuple[int, int], length: int) -> list[Mended | None]:
    """What each prompt's picture should have been, of noise (pictures, tokens, channels) and the shipped 4 steps."""
    width, height = size
    texts = [caption.text for caption in captions]
    options = {"width": width, "height": height, "num_inference_steps": 4, "max_sequence_length": length}
    latents = pipe(texts, latents=noise, output_type="latent", **options).images
    z = FluxPipeline._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    with torch.autocast("cpu", torch.bfloat16):  # good enough to find the objects
        pictures = pipe.vae.decode(z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    images = pipe.image_processor.postprocess(pictures.float())
    return [mend(image, caption) for image, caption in zip(images, captions, strict=True)]


def make_groups(pipe: FluxPipeline, total: int, sizes: dict[tuple[int, int], float], cell: int) -> list[Group]:
    """About `total` pairs, of sizes (width, height) with these weights and of every padded length; a cell of the silhouettes
    is `cell` pixels wide. Prompts are those of training, held-out triples apart."""
    pipe.set_progress_bar_config(disable=True)
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    patch, channels = 2 * pipe.vae_scale_factor, pipe.transformer.config.in_channels
    groups = []
    for (width, height), weight in sizes.items():
        for length, share in LENGTHS.items():
            count = round(total * weight / sum(sizes.values()) * share)
            noises: list[Tensor] = []
            texts, pictures, silhouettes = [], [], []
            for start in range(0, count, CHUNK):
                captions = [describe(sample_scene(rng), rng, full=rng.random() < FULL) for _ in range(min(CHUNK, count - start))]
                tokens = (width // patch) * (height // patch)
                noise = torch.randn(len(captions), tokens, channels, generator=generator)
                mended = paint(pipe, captions, noise, (width, height), length)
                for caption, own_noise, fit in zip(captions, noise, mended, strict=True):
                    if fit is not None:
                        texts.append(caption.text)
                        noises.append(own_noise)
                        pictures.append(np.asarray(fit.draw(width, height)))
                        silhouettes.append(np.asarray(fit.silhouette(width // cell, height // cell)))
            if len(texts) < CHUNK // 2:
                continue
            latents = [encode(pipe.vae, pictures[at : at + CHUNK]) for at in range(0, len(pictures), CHUNK)]
            cells = token_cells(torch.from_numpy(np.stack(silhouettes)), patch // cell)
            groups.append(Group(width, height, length, texts, torch.stack(noises).half(), torch.cat(latents).bfloat16(), cells))
            print(f"{width} × {height}, padded to {length}: {len(texts)} of {count} own pictures mended", flush=True)
    return groups
