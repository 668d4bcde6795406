"""Train the autoencoder of the moving shapes: AutoencoderKLWan in the plain layout of Wan 2.1, 4× in time and 4× in space.

    python -m training.train_video_vae --output runs/video-vae --steps 1400
    python -m training.train_video_vae --refine runs/video-vae --output runs/video-vae-refined --steps 1400

The encoder sees motion in whole clips here, not in chunks of four frames: the result is the same (`encode`, `decode`), the time
is not. `latents_mean` and `latents_std` are measured on clips. Prints what the grader reads in encoded and decoded clips: the
ceiling of whatever is trained on the latents. `--refine` trains the decoder alone, so latents stay valid.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanDecoder3d,
    WanEncoder3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from PIL import Image, ImageDraw
from torch import Tensor, nn

from training.moving import FRAMES, describe, draw, grade, sample_motion
from training.optimizer import Optimizers
from training.shapes import COLORS

CHANNELS = 12
NOISE = 0.06  # of the latents' deviation while training, so that small errors of the denoiser decode cleanly
CROP = 24


def build() -> AutoencoderKLWan:
    """A new autoencoder that starts as an almost linear one: residual branches at zero."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    with torch.no_grad():
        for module in vae.modules():
            if type(module).__name__ == "WanResidualBlock":
                module.conv2.weight.zero_()
            if type(module).__name__ == "WanAttentionBlock":
                module.proj.weight.zero_()
    return vae


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    """What the layer's cached passes over chunks of a clip make of the whole clip: the first frame is not mixed in time."""
    first, rest = x[:, :, :1], x[:, :, 1:]
    if layer.mode == "upsample3d" and rest.shape[2]:
        both = layer.time_conv(rest).unflatten(1, (2, -1))  # (batch, 2, channels, frames, height, width)
        x = torch.cat([first, both.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    if layer.mode == "downsample3d" and rest.shape[2]:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def _norm(layer: WanRMS_norm, x: Tensor) -> Tensor:
    """The layer in half of its time."""
    return x * torch.rsqrt((x * x).mean(1, keepdim=True, dtype=torch.float32) + 1e-12).to(x.dtype) * layer.gamma.to(x.dtype)


def _block(layer: WanResidualBlock, x: Tensor) -> Tensor:
    y = layer.conv1(nn.functional.silu(_norm(layer.norm1, x)))
    return layer.conv_shortcut(x) + layer.conv2(nn.functional.silu(_norm(layer.norm2, y)))


def _run(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, WanResidualBlock):
            x = _block(layer, x)
        elif isinstance(layer, WanResample):
            x = _resample(layer, x)
        else:
            x = layer(x)
    return x


def _middle(block: WanMidBlock, x: Tensor) -> Tensor:
    return _run((block.resnets[0], block.attentions[0], block.resnets[1]), x)


def _end(coder: WanEncoder3d | WanDecoder3d, x: Tensor) -> Tensor:
    return coder.conv_out(nn.functional.silu(_norm(coder.norm_out, x)))


def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """(batch, 3, 1 + 4·n, height, width) in -1 … 1 -> the mean latents (batch, channels, 1 + n, height / 4, width / 4)"""
    coder = vae.encoder
    x = _middle(coder.mid_block, _run(coder.down_blocks, coder.conv_in(clips)))
    return vae.quant_conv(_end(coder, x))[:, : vae.config.z_dim]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The other way round; not clamped."""
    coder = vae.decoder
    x = _middle(coder.mid_block, coder.conv_in(vae.post_quant_conv(latents)))
    for block in coder.up_blocks:
        x = _run((*block.resnets, *(block.upsamplers or ())), x)
    return _end(coder, x)


def clutter(rng: random.Random, frames: int, size: int) -> np.ndarray:
    """Things the moving shapes' world does not hold, so that the autoencoder is not narrower than it must be."""
    side = size * 3
    background = rng.choice(list(COLORS.values()))
    things = []
    for _ in range(rng.randint(1, 3)):
        color = rng.choice(list(COLORS.values())) if rng.random() < 0.6 else tuple(rng.randrange(256) for _ in range(3))
        way, pace = rng.random() * 7, rng.uniform(0, 0.035) * side
        things.append(
            (color, rng.random() * side, rng.random() * side, rng.uniform(0.06, 0.3) * side, way, pace, rng.randrange(5))
        )
    pictures = []
    for frame in range(frames):
        image = Image.new("RGB", (side, side), background)
        canvas = ImageDraw.Draw(image)
        for color, x, y, r, way, pace, corners in things:
            cx, cy = x + frame * pace * math.cos(way), y + frame * pace * math.sin(way)
            if corners < 3:
                canvas.ellipse([cx - r, cy - r, cx + r, cy + r], fill=color)
            else:
                angles = [way + 2 * math.pi * i / corners for i in range(corners)]
                canvas.polygon([(cx + r * math.cos(a), cy + r * math.sin(a)) for a in angles], fill=color)
        pictures.append(np.asarray(image.resize((size, size), Image.Resampling.BOX)))
    return np.stack(pictures)


def make_clips(rng: random.Random, count: int, odd: float) -> Tensor:
    """(count, 3, FRAMES, 64, 64) uint8, a share `odd` of them clutter"""
    clips = [
        clutter(rng, FRAMES, 64) if rng.random() < odd else draw(sample_motion(rng), FRAMES, 64, 64, 3) for _ in range(count)
    ]
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()


def to_unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def window(picture: Tensor, rng: random.Random) -> tuple[int, int]:
    """Top and left of a crop of a picture (3, height, width), mostly near something."""
    height, width = picture.shape[1:]
    things = (picture != picture[:, :1, :1]).any(0).nonzero()
    if len(things) == 0 or rng.random() < 0.2:
        return rng.randrange(height - CROP + 1), rng.randrange(width - CROP + 1)
    y, x = things[rng.randrange(len(things))].tolist()
    top, left = y - CROP // 2 + rng.randint(-8, 8), x - CROP // 2 + rng.randint(-8, 8)
    return min(max(top, 0), height - CROP), min(max(left, 0), width - CROP)


def crops(clips: Tensor, step: int, batch: int, share: float) -> Tensor:
    """About `batch` pieces of a clip's length, by turns shorter, or, in a `share` of the steps, whole clips."""
    rng = random.Random(step)
    if rng.random() < share:
        return to_unit(clips[torch.randint(len(clips), (max(1, batch // 4),))])
    frames = rng.choice((5, 9, 17, 17, 17, 17, 1))
    pieces = []
    for _ in range(max(1, batch * FRAMES // max(frames, 5))):
        clip, begin = clips[rng.randrange(len(clips))], rng.randrange(FRAMES - frames + 1)
        top, left = window(clip[:, begin + frames // 2], rng)
        pieces.append(clip[:, begin : begin + frames, top : top + CROP, left : left + CROP])
    return to_unit(torch.stack(pieces))


def fit(vae: AutoencoderKLWan, clips: Tensor, args: argparse.Namespace) -> None:
    """Train both halves, or the decoder alone."""
    steps, refine = args.steps, args.refine is not None
    std = torch.tensor(vae.config.latents_std)[:, None, None, None] if refine else None
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not refine)
    rate = 1.0 if args.initial is None and not refine else 0.5
    adam_only = ("conv_in", "conv_out", "quant_conv")
    optimizers = Optimizers(vae, steps, muon_lr=0.02 * rate, adam_lr=3e-3 * rate, adam_only=adam_only)
    began = time.time()
    for step in range(steps):
        x = crops(clips, step, args.batch, 0.0 if step < 0.7 * steps else 0.4)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not refine):
                z = encode(vae, x).float()
            spread = z.detach().std((0, 2, 3, 4), keepdim=True) if std is None else std
            y = decode(vae, z + NOISE * spread * torch.randn_like(z)).float()
        error = y - x
        loss = error.abs().mean() + 3 * error.square().mean() + 1e-3 * (z.square().mean() - 1).relu()
        loss.backward()
        optimizers.step(step)
        if step % 50 == 0:
            psnr = 10 * math.log10(4 / error.square().mean().item())
            print(f"{step} {time.time() - began:.0f} s {list(x.shape)} loss {loss.item():.4f} psnr {psnr:.2f}", flush=True)
        if step % 300 == 299:
            vae.save_pretrained(args.output / "partial")


@torch.no_grad()
def measure(vae: AutoencoderKLWan, rng: random.Random) -> tuple[Tensor, Tensor]:
    """The mean and deviation of each latent channel, over clips."""
    z = torch.cat([encode(vae, to_unit(chunk)) for chunk in make_clips(rng, 96, 0.0).split(8)])
    return z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))


@torch.no_grad()
def ceiling(vae: AutoencoderKLWan, rng: random.Random, count: int = 100) -> dict[str, float]:
    """The share of attributes read rightly in decoded clips, and their PSNR in dB, through the model's own chunked passes."""
    marks: dict[str, list[float]] = defaultdict(list)
    for number in range(count):
        motion, frames = sample_motion(rng), (FRAMES, FRAMES, 9)[number % 3]
        clip = draw(motion, frames, 64, 64)
        x = to_unit(torch.from_numpy(clip).permute(3, 0, 1, 2)[None])
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
        marks["psnr"].append(10 * math.log10(4 / (y - x).square().mean().item()))
        shown = ((y[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        for name, right in grade(shown, describe(motion, rng, full=True)).items():
            marks[name].append(right)
    return {name: round(sum(values) / len(values), 3) for name, values in marks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--refine", type=Path, help="train only the decoder of this autoencoder further")
    parser.add_argument("--initial", type=Path, help="train both halves of this autoencoder further")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clips", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    begun = args.refine or args.initial
    vae = build() if begun is None else AutoencoderKLWan.from_pretrained(begun)
    print("parameters", sum(p.numel() for p in vae.parameters()), flush=True)
    odd = 0.25 if args.refine is None else 0.1
    fit(vae, make_clips(random.Random(1 if begun is None else args.clips), args.clips, odd), args)
    vae.eval()
    if args.refine is None:
        mean, std = measure(vae, random.Random(4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(args.output)
    print("latents", vae.config.latents_mean, vae.config.latents_std)
    print("ceiling", ceiling(vae, random.Random(9)), flush=True)


if __name__ == "__main__":
    main()
