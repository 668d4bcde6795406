"""Times this CPU's kernels on a model's own shapes, so that choices among them are measured and not guessed.

A few dozen milliseconds, once per model load. Ratios are speed of the challenger over the default.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata

import torch
from torch import nn

from stepwell.config.attention import MODULES
from stepwell.config.hardware import Hardware, detect_cpu, installed
from stepwell.ops.backends import blocked, sdpa
from stepwell.ops.linear import LinearGelu, PackedLinear
from stepwell.ops.packing import Segments

ROWS = 256  # tokens of a small picture and its prompt
WIDTH = 1024  # no layer is probed wider than this: ratios stay, time doesn't
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def detect() -> Hardware:
    """This machine, its GPU included, nothing measured."""
    hardware = replace(detect_cpu(), threads=torch.get_num_threads(), packages=installed(MODULES), triton=_triton_version())
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        hardware = replace(hardware, gpu=properties.name, capability=capability, rocm=torch.version.hip is not None)
    return hardware


def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


@torch.no_grad()
def measure_cpu(hardware: Hardware, precision: str, width: int, heads: int, head_dim: int) -> Hardware:
    """The same hardware with rates for one model's layers in one precision."""
    if precision not in DTYPES:
        return hardware
    dtype = DTYPES[precision]
    generator = torch.Generator().manual_seed(0)
    width = min(width, WIDTH)
    plain = LinearGelu(width, 4 * width)
    nn.init.normal_(plain.weight, std=width**-0.5, generator=generator)
    plain = plain.to(dtype)
    packed = PackedLinear(plain)
    x = torch.randn(ROWS, width, generator=generator).to(dtype)
    torch_s, packed_s = _fastest((lambda: plain(x), lambda: packed(x)))
    q, k, v = torch.randn(3, ROWS, heads, head_dim, generator=generator).to(dtype)
    segments = Segments([ROWS])
    sdpa_s, blocked_s = _fastest((lambda: sdpa.attend(q, k, v, segments), lambda: blocked.attend(q, k, v, segments)))
    flops = 2 * ROWS * width * 4 * width
    return replace(
        hardware,
        measured={
            **hardware.measured,
            f"packed_linear_{precision}": torch_s / packed_s,
            f"blocked_attention_{precision}": sdpa_s / blocked_s,
            f"gflops_{precision}": flops / min(torch_s, packed_s) / 1e9,
        },
    )


def _fastest(calls: tuple[Callable[[], object], ...], rounds: int = 3) -> list[float]:
    """The least process-time seconds of each call, interleaved."""
    for call in calls:
        call()
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            began = time.thread_time()
            call()
            best[index] = min(best[index], time.thread_time() - began)
    return [max(seconds, 1e-9) for seconds in best]
