"""Quantised linears on this CPU: time, error and memory against the plain ones.

    python -m benchmarks.quant [--output FOLDER]

One thread, interleaved, thread CPU time (see `benchmarks.timing`), on random weights: timing does not depend on them.
Writes results/<cpu>-quant.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from torch import nn

from benchmarks.timing import compare
from stepwell import DiffGenerator
from stepwell.config.hardware import host_memory
from stepwell.engine.measure import detect
from stepwell.ops.linear import Linear, LinearGelu, PackedLinear
from stepwell.quant.int8 import Int8Dynamic, Int8WeightOnly

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = ((128, 512), (256, 1024), (1024, 4096), (4096, 1024))
ROWS = (96, 320, 1560)
PROMPTS = ("a small red circle on a white background", "two green triangles on a black background", "a purple star at the top")
SEEDS = (1, 2)
KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": lambda layer: layer,
    "int8_weight_only": Int8WeightOnly,
    "int8_dynamic": Int8Dynamic,
}
SCHEMES = ("int8_weight_only", "int8_dynamic")


def candidates(kind: type[Linear], width: int, out: int, rows: int) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Each layer with its input; packed bf16 is the first, which ratios are to."""
    torch.manual_seed(0)
    plain, x = kind(width, out).requires_grad_(False), torch.randn(rows, width)
    made: dict[str, tuple[nn.Module, torch.Tensor]] = {}
    for precision in ("bf16", "fp32"):
        layer, rows_ = plain.to(DTYPES[precision]), x.to(DTYPES[precision])
        for name, convert in (("packed", PackedLinear), ("int8_weight_only", Int8WeightOnly), ("int8_dynamic", Int8Dynamic)):
            made[f"{name} {precision}"] = (convert(layer), rows_)
        plain = kind(width, out).requires_grad_(False)
    return made


def one_layer(kind: type[Linear], width: int, out: int, rows: int, rounds: int) -> dict[str, Any]:
    made = candidates(kind, width, out, rows)
    calls: dict[str, Callable[[], object]] = {name: lambda layer=layer, x=x: layer(x) for name, (layer, x) in made.items()}  # type: ignore[misc]
    timings = [asdict(timing) for timing in compare(calls, rounds)]
    return {"in": width, "out": out, "rows": rows, "gelu": kind is LinearGelu, "timings": timings}


def memory(precisions: Sequence[str] = tuple(DTYPES), kinds: Sequence[str] = tuple(KINDS)) -> dict[str, dict[str, float]]:
    """MiB a process of its own grows by for 24 layers of 1024 -> 4096, by precision and kind.

    The allocator's threshold is fixed so that what is freed goes back at once and holes are not counted.
    """
    made: dict[str, dict[str, float]] = {precision: {} for precision in precisions}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    for precision in precisions:
        for kind in kinds:
            command = [sys.executable, "-m", "benchmarks.quant", "--memory-of", kind, "--precision", precision]
            made[precision][kind] = float(
                subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            )
    return made


def grown_mib(kind: str, precision: str) -> float:
    before = host_memory().resident_bytes
    layers = [KINDS[kind](Linear(1024, 4096).to(DTYPES[precision])) for _ in range(24)]
    return (host_memory().resident_bytes - before) / 2**20 if layers else 0.0


def pictures(prompts: Sequence[str] = PROMPTS, seeds: Sequence[int] = SEEDS) -> dict[str, list[float]]:
    """PSNR in dB of the bundled model's pictures against fp32, VAE and text encoders in fp32."""
    made: dict[str, list[np.ndarray]] = {}
    for precision in DTYPES:
        for quantization in ("none", *SCHEMES):
            with DiffGenerator.from_pretrained(
                "stepwell/tiny-flux", threads=1, quantization=quantization, dit_precision=precision,
                vae_precision="fp32", text_encoder_precisions="fp32",
            ) as g:  # fmt: skip
                made[f"{quantization} {precision}"] = [
                    g.generate(prompt, seed=seed)[0].frames.astype(float) for prompt in prompts for seed in seeds
                ]
    exact = made.pop("none fp32")
    return {
        name: [float(10 * np.log10(255**2 / np.square(a - b).mean())) for a, b in zip(frames, exact, strict=True)]
        for name, frames in made.items()
    }


def markdown(report: dict[str, Any]) -> str:
    names = [timing["name"] for timing in report["layers"][0]["timings"]]
    kinds = next(iter(report["memory"].values()))
    how_many = "one picture" if len(next(iter(report["pictures"].values()))) == 1 else "three prompts and two seeds"
    lines = [
        f"# {report['cpu']}: quantised linears",
        "",
        f"`{report['command']}`, torch {report['torch']}, {report['cores']} cores. Least CPU milliseconds on one thread, "
        "interleaved; in brackets the speed against packed bf16.",
        "",
        "| layer | rows | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for layer in report["layers"]:
        cells = [f"{t['least_ms']:.2f} ({t['speedup']:.2f}×)" for t in layer["timings"]]
        kind = " + GELU" if layer["gelu"] else ""
        lines.append(f"| {layer['in']} → {layer['out']}{kind} | {layer['rows']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Resident memory of 24 layers 1024 → 4096, MiB:",
        "",
        f"| | {' | '.join(kinds)} |",
        "|---|" + "---|" * len(kinds),
    ]
    lines += [
        f"| {precision} | " + " | ".join(f"{mib:.0f}" for mib in grown.values()) + " |"
        for precision, grown in report["memory"].items()
    ]
    lines += [
        "",
        f"Pictures of stepwell/tiny-flux against fp32, PSNR in dB over {how_many}:",
        "",
        "| | least | mean |",
    ]
    lines += ["|---|---|---|"]
    lines += [f"| {name} | {min(db):.1f} | {sum(db) / len(db):.1f} |" for name, db in report["pictures"].items()]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="one small layer, once; memory in fp32 only; one picture")
    parser.add_argument("--memory-of", choices=list(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory_of:
        print(grown_mib(args.memory_of, args.precision))
        return {}
    torch.set_num_threads(1)
    layers, rows, rounds = (LAYERS[:1], ROWS[:1], 1) if args.quick else (LAYERS, ROWS, 9)
    cases = [
        one_layer(kind, width, out, count, rounds)
        for width, out in layers
        for kind in ((LinearGelu, Linear) if out > width else (Linear,))
        for count in rows
    ]
    hardware = detect()
    report = {
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "torch": torch.__version__,
        "command": "python -m benchmarks.quant" + (" --quick" if args.quick else ""),
        "layers": cases,
        "memory": memory(["fp32"], ["plain", "int8_dynamic"]) if args.quick else memory(),
        "pictures": pictures(PROMPTS[:1], SEEDS[:1]) if args.quick else pictures(),
    }
    stem = re.sub(r"[^a-z0-9]+", "-", hardware.cpu.lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{stem}-quant.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.output / f"{stem}-quant.md").write_text(markdown(report))
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
