"""What fits: how large a picture this machine's free memory can make, told before anything is tried."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from stepwell.config.hardware import available_bytes, host_memory
from stepwell.stages.latents import Latents
from stepwell.types import Limits

SHARE = 0.8  # of the memory that is free once the model is loaded
DECODE_FACTOR = 4.5  # full-size copies of the decoder's widest layer near the pixels: measured 3.0 to 4.0, 128 to 512 px
CHUNK_FACTOR = 60  # the same for a video decoder's chunk: four frames, and two that every convolution keeps of the last
TILE_FACTOR = 6  # the same for each frame of HunyuanVideo's tiles along time: measured 5.6 to 6.1, 256 to 448 px
PAIR_BYTES = 8  # of the mask its decoder's attention is given, per pair of latents in a tile: measured 5 in float32 on a CPU
TOKEN_FACTOR = 20  # widths of activations per token of the transformer: counted from its blocks, and small beside decoding


def fitting(limits: Limits, vae: Any, latents: Latents, width: int, *, tiled: bool, device: str) -> Limits:
    """The same limits, with no more pixels than fit, in a picture or in all frames. `width` is the transformer's."""
    free = SHARE * free_bytes(device)
    decoding, token = decoder_bytes(vae, tiled=tiled), TOKEN_FACTOR * width * next(vae.parameters()).element_size()
    stepping = token / (latents.factor**2 * math.prod(latents.patch) * latents.frame_factor)
    if latents.frame_factor > 1:
        frame, video = int(free / 2 / decoding) if decoding else limits.max_pixels, int(free / 2 / stepping)
        if decoding and vae.config.get("mid_block_add_attention"):
            tile = vae.tile_sample_min_num_frames // latents.frame_factor + 1
            frame = min(frame, int(math.sqrt(free / 2 / PAIR_BYTES) / tile) * latents.factor**2)
    else:
        frame, video = int(free / (decoding + stepping)), limits.max_pixels * limits.max_frames
    reason = " fit into the memory that is free here" + (" without vae_tiling" if latents.frame_factor > 1 else "")
    if frame < limits.max_pixels:
        limits = replace(limits, max_pixels=frame, max_pixels_reason=reason)
    return limits if limits.max_frames == 1 else replace(limits, max_video_pixels=video)


def decoder_bytes(vae: Any, *, tiled: bool) -> float:
    """Memory that decoding takes at its peak, per pixel of a picture or of a frame; nothing with tiles."""
    config, size = vae.config, next(vae.parameters()).element_size()
    if tiled:
        return 0.0
    if "z_dim" in config:
        return float(CHUNK_FACTOR * (config.decoder_base_dim or config.base_dim) * size) / (config.patch_size or 1) ** 2
    channels = config.get("block_out_channels") or config["decoder_block_out_channels"]
    if "temporal_compression_ratio" in config:
        return float(TILE_FACTOR * (vae.tile_sample_min_num_frames + 1) * max(channels[:2]) * size)
    return DECODE_FACTOR * max(channels[:2]) * size


def free_bytes(device: str) -> int:
    """Memory that is free on a device."""
    return available_bytes() if device == "cpu" else int(torch.cuda.mem_get_info()[0])


def memory_mb(device: str) -> dict[str, float]:
    """What this process holds, in MiB, under the names that `Output.memory_mb` explains."""
    host = host_memory()
    held = {"host_resident": host.resident_bytes, "host_anon": host.anonymous_bytes, "peak_host_resident": host.peak_bytes}
    if device != "cpu":
        held["allocated"] = torch.cuda.memory_allocated()
        held["reserved"] = torch.cuda.memory_reserved()
        held["peak_allocated"] = torch.cuda.max_memory_allocated()
        held["peak_reserved"] = torch.cuda.max_memory_reserved()
    return {name: round(amount / 2**20, 3) for name, amount in held.items()}
