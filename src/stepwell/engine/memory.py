"""What fits: how large a picture this machine's free memory can make, told before anything is tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from stepwell.config.hardware import available_bytes, host_memory
from stepwell.types import Limits

SHARE = 0.8  # of the memory that is free once the model is loaded
DECODE_FACTOR = 4.5  # full-size copies of the decoder's widest layer near the pixels: measured 3.0 to 4.0, 128 to 512 px
TOKEN_FACTOR = 20  # widths of activations per token of the transformer: counted from its blocks, and small beside decoding


def fitting(limits: Limits, vae: Any, width: int, *, tiled: bool, device: str) -> Limits:
    """The same limits, with no more pixels than fit. `width` is the transformer's."""
    most = int(SHARE * free_bytes(device) / bytes_per_pixel(vae, width, tiled=tiled))
    if most >= limits.max_pixels:
        return limits
    return replace(limits, max_pixels=most, max_pixels_reason=" fit into the memory that is free here")


def bytes_per_pixel(vae: Any, width: int, *, tiled: bool) -> float:
    """Memory that making a picture takes at its peak, per pixel: decoding, or with tiles only the transformer's."""
    config = vae.config
    channels = config.get("block_out_channels") or config["decoder_block_out_channels"]
    size = next(vae.parameters()).element_size()
    decoding = 0.0 if tiled else DECODE_FACTOR * max(channels[:2]) * size
    return decoding + TOKEN_FACTOR * width * size / 256


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
