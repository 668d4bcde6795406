"""Train the autoencoder of the shapes world: AutoencoderKL in FLUX layout, 8× down, 16 latent channels.

    python -m training.train_vae --output runs/vae --steps 2800 [--threads 1]
    python -m training.train_vae --refine runs/vae --output runs/vae-refined --steps 2000

Writes a diffusers AutoencoderKL whose scaling and shift factors are measured on the data, so that latents have
mean 0 and deviation 1. Prints the reconstruction's PSNR: the ceiling of whatever is trained on the latents.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor

from training.optimizer import Optimizers
from training.shapes import COLORS, draw, sample_scene

LATENT_CHANNELS = 16
NOISE = 0.1  # on the latents while training, so that small errors of the denoiser decode cleanly


def random_picture(rng: random.Random, size: int) -> Image.Image:
    """A scene, or clutter the scenes do not hold, so that the autoencoder is not narrower than it must be."""
    if rng.random() < 0.7:
        return draw(sample_scene(rng), rng, size, size)
    side = size * 4
    image = Image.new("RGB", (side, side), rng.choice(list(COLORS.values())))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 4)):
        named = rng.random() < 0.6
        color = rng.choice(list(COLORS.values())) if named else tuple(rng.randrange(256) for _ in range(3))
        x, y, r = rng.random() * side, rng.random() * side, rng.uniform(0.06, 0.35) * side
        corners, turn = rng.choice((0, 3, 4, 5)), rng.random() * 7
        if corners == 0:
            canvas.ellipse([x - r, y - r, x + r, y + r], fill=color)
        else:
            angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
            canvas.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a in angles], fill=color)
    return image.resize((size, size), Image.Resampling.BOX)


def pictures(rng: random.Random, count: int, size: int = 64) -> Tensor:
    """(count, 3, size, size) uint8"""
    return torch.from_numpy(np.stack([np.asarray(random_picture(rng, size)) for _ in range(count)])).permute(0, 3, 1, 2)


def to_unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def build() -> AutoencoderKL:
    """A new autoencoder that starts as an almost linear one: residual branches at zero, posterior fixed."""
    channels = (32, 48, 64, 64)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        vae.encoder.conv_out.weight[LATENT_CHANNELS:] = 0
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = 2 * math.log(NOISE)
        for module in vae.modules():
            if type(module).__name__ == "ResnetBlock2D":
                module.conv2.weight.zero_()
            if type(module).__name__ == "Attention":
                module.to_out[0].weight.zero_()
    return vae


def refine(vae: AutoencoderKL, steps: int, rng: random.Random) -> None:
    """Train the decoder alone, on scenes and whole pictures only. Latents stay valid: this can run beside the denoiser."""
    vae.encoder.requires_grad_(False)
    data = torch.from_numpy(np.stack([np.asarray(draw(sample_scene(rng), rng, 64, 64)) for _ in range(8000)]))
    data = data.permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_unit(chunk)).latent_dist.mean for chunk in data.split(100)])
    optimizers = Optimizers(vae, steps, muon_lr=0.005, adam_lr=1e-3, adam_only=("conv_in", "conv_out"))
    for step in range(steps):
        picked = torch.randint(len(data), (16,))
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(latents[picked] + NOISE * torch.randn(16, *latents.shape[1:])).sample
        error = y.float() - to_unit(data[picked])
        loss = error.abs().mean() + 3 * error.square().mean()
        loss.backward()
        optimizers.step(step)
        if step % 100 == 0:
            print(f"{step} loss {loss.item():.4f} psnr {10 * math.log10(4 / error.square().mean().item()):.2f}", flush=True)
    vae.encoder.requires_grad_(True)


def train(vae: AutoencoderKL, steps: int, rng: random.Random) -> None:
    """Train both halves, on crops first: four times cheaper."""
    data = pictures(rng, 8000)
    optimizers = Optimizers(vae, steps, muon_lr=0.02, adam_lr=2e-3, adam_only=("conv_in", "conv_out"))
    for step in range(steps):
        x = to_unit(data[torch.randint(len(data), (16,))])
        if step < 0.6 * steps:
            top, left = rng.randrange(33), rng.randrange(33)
            x = x[:, :, top : top + 32, left : left + 32]
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(x).latent_dist.mean
            y = vae.decode(mean + NOISE * torch.randn(mean.shape)).sample
        error = y.float() - x
        loss = error.abs().mean() + 3 * error.square().mean() + 3e-4 * mean.float().square().mean()
        loss.backward()
        for param in (vae.encoder.conv_out.weight, vae.encoder.conv_out.bias):
            param.grad[LATENT_CHANNELS:] = 0
        optimizers.step(step)
        if step % 100 == 0:
            print(f"{step} loss {loss.item():.4f} psnr {10 * math.log10(4 / error.square().mean().item()):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--refine", type=Path, help="train only the decoder of this autoencoder further")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    held_out = to_unit(pictures(random.Random(9), 128))
    if args.refine is None:
        vae = build()
        print("parameters", sum(p.numel() for p in vae.parameters()), flush=True)
        train(vae, args.steps, random.Random(1))
    else:
        vae = AutoencoderKL.from_pretrained(args.refine)
        refine(vae, args.steps, random.Random(5))

    vae.eval()
    with torch.no_grad():
        mean = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in held_out.split(32)])
        y = torch.cat([vae.decode(chunk).sample.clamp(-1, 1) for chunk in mean.split(32)])
        psnr = 10 * torch.log10(4 / (y - held_out).square().flatten(1).mean(1))
    if args.refine is None:
        vae.register_to_config(scaling_factor=1 / mean.std().item(), shift_factor=mean.mean().item())
    print(f"held-out psnr {psnr.mean():.2f} dB (worst {psnr.min():.2f})")
    print(f"scaling factor {vae.config.scaling_factor:.4f}, shift factor {vae.config.shift_factor:.4f}")
    vae.save_pretrained(args.output)


if __name__ == "__main__":
    main()
