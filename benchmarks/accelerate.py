"""What each accelerator gives and costs on the bundled model: time, blocks computed, likeness, and what the picture shows.

    python -m benchmarks.accelerate [--count 40] [--output FOLDER]

Every row makes the same held-out prompts from the same seeds, 28 steps at 128 px. Likeness is PSNR against fp32 with nothing
switched on, over all pictures; "right" is the share of pictures in which the grader finds everything the prompt says. Then the
time of denoising with step masks against the share of blocks computed, on this model and on one of 145 M random parameters:
what is lost to bookkeeping. CPU time of one thread, interleaved. Writes results/<cpu>-accelerate.json, and the tables into .md
and between the marks in README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch

from benchmarks.run import CASES, lean, reference_inputs, reference_model
from stepwell import DiffGenerator
from stepwell.cache import runner
from stepwell.cache.memory import CacheMemory
from stepwell.cache.params import DEFAULTS
from stepwell.engine.measure import detect
from stepwell.ops.packing import Lane
from stepwell.stages.text import Conditioning
from training.grader import grade
from training.shapes import describe, sample_scene

STEPS, SIDE = 28, 128
TAYLOR = {"method": "dbcache", "taylorseer": True}
CACHES: dict[str, dict[str, Any]] = {
    "DBCache": {"method": "dbcache"},
    "DBCache + TaylorSeer": TAYLOR,
    "DBCache + TaylorSeer, order 2": {**TAYLOR, "ts_order": 2},
    **{f"TaylorSeer, SCM {preset}": {**TAYLOR, "scm_preset": preset} for preset in ("slow", "medium", "fast", "ultra")},
    "SCM fast, static": {"method": "dbcache", "scm_preset": "fast", "scm_policy": "static"},
    "first-block cache": {"method": "first_block"},
    "TeaCache": {"method": "teacache"},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dit_precision": "bf16", "vae_precision": "fp32"},
    "int8 weights": {"quantization": "int8_weight_only"},
    "int8 dynamic": {"quantization": "int8_dynamic"},
}
MARKS = "<!-- accelerators -->", "<!-- /accelerators -->"


def pictures(g: DiffGenerator, count: int, cache: dict[str, Any] | None) -> tuple[list[Any], list[Any], float]:
    """The captions, what was made of them, and the CPU milliseconds of one picture."""
    rng = random.Random(2026)
    captions = [describe(sample_scene(rng, held_out=True), rng, full=True) for _ in range(count)]
    options: dict[str, Any] = {"seed": 9, "width": SIDE, "height": SIDE, "num_inference_steps": STEPS, "cache": cache}
    g.generate(captions[0].text, **options)  # warm-up
    began = time.process_time()
    made = g.generate([caption.text for caption in captions], **options)
    return captions, made, (time.process_time() - began) * 1e3 / count


def row(name: str, g: DiffGenerator, count: int, base: np.ndarray | None, cache: dict[str, Any] | None) -> dict[str, Any]:
    captions, made, took_ms = pictures(g, count, cache)
    frames = np.stack([output.frames[0] for output in made])
    marks = [grade(output.image, caption) for output, caption in zip(made, captions, strict=True)]
    error = 0.0 if base is None else float(np.square(frames.astype(float) - base).mean())
    ratios = [1.0 if output.cache is None else output.cache.computed_ratio for output in made]
    return {
        "name": name,
        "computed_ratio": float(np.mean(ratios)),
        "ms_per_picture": took_ms,
        "psnr_db": None if error == 0 else 10 * math.log10(255**2 / error),
        "right": float(np.mean([mark["all"] for mark in marks])),
        "shape": float(np.mean([mark["shape"] for mark in marks])),
        "frames": frames,
    }


def quality(count: int) -> list[dict[str, Any]]:
    with DiffGenerator.from_pretrained("stepwell/tiny-flux", threads=1) as g:
        rows = [row("fp32", g, count, None, None)]
        base = rows[0]["frames"]
        rows += [row(name, g, count, base, cache) for name, cache in CACHES.items()]
    for name, options in PRECISIONS.items():
        with DiffGenerator.from_pretrained("stepwell/tiny-flux", threads=1, **options) as g:
            rows.append(row(name, g, count, base, None))
            rows.append(row(f"{name} + DBCache + TaylorSeer", g, count, base, TAYLOR))
    return [{key: value for key, value in each.items() if key != "frames"} for each in rows]


@torch.no_grad()
def bookkeeping(case_name: str, rounds: int) -> list[dict[str, Any]]:
    """Time of a whole denoising loop under static masks over that of one without, and the share of blocks computed."""
    case = CASES[case_name]
    torch.manual_seed(0)
    model, _ = lean(reference_model(case, "fp32"), case, "fp32")
    runner.attach(model)
    inputs = reference_inputs(case, "fp32")
    conditioning = Conditioning(inputs["encoder_hidden_states"][0], inputs["pooled_projections"][0])
    prepared = model.prepare(conditioning, torch.linspace(1000, 40, STEPS), (1, case.grid, case.grid), 0.0)
    x = inputs["hidden_states"][0]

    def loop(cache: Any) -> tuple[float, float]:
        memory = CacheMemory.of(cache, STEPS, ())
        lane = Lane(prepared, STEPS, case.text_tokens, (1, case.grid, case.grid), cache=memory)
        packed = model.pack([lane])
        began = time.process_time()
        for lane.step in range(STEPS):
            model(x, packed)
        took = time.process_time() - began
        return took, 1.0 if memory is None else memory.known.blocks_run / (STEPS * len(model.blocks))

    caches = {"none": DEFAULTS["none"]}
    for preset in ("slow", "medium", "fast", "ultra"):
        static = replace(DEFAULTS["dbcache"], scm_preset=preset, scm_policy="static")
        caches[preset] = static
        caches[f"{preset} + TaylorSeer"] = replace(static, taylorseer=True)
    best = dict.fromkeys(caches, math.inf)
    ratios = {}
    for _ in range(rounds):
        for name, cache in caches.items():
            took, ratios[name] = loop(cache)
            best[name] = min(best[name], took)
    return [
        {"case": case.name, "mask": name, "computed_ratio": ratios[name], "time_ratio": best[name] / best["none"]}
        for name in caches
        if name != "none"
    ]


def tables(report: dict[str, Any]) -> tuple[str, str]:
    lines = ["| tiny-flux, 28 steps, 128 px | blocks computed | time | PSNR to fp32 | pictures right |", "|---|---|---|---|---|"]
    whole = report["quality"][0]["ms_per_picture"]
    for each in report["quality"]:
        psnr = "∞" if each["psnr_db"] is None else f"{each['psnr_db']:.1f} dB"
        cells = (
            each["name"],
            f"{each['computed_ratio']:.0%}",
            f"{each['ms_per_picture'] / whole:.0%}",
            psnr,
            f"{each['right']:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    loops = ["| model, static mask | blocks computed | denoising time | lost |", "|---|---|---|---|"]
    for each in report["bookkeeping"]:
        lost = each["time_ratio"] / each["computed_ratio"] - 1
        loops.append(
            f"| {each['case']}, {each['mask']} | {each['computed_ratio']:.1%} | {each['time_ratio']:.1%} | {lost:+.1%} |"
        )
    return "\n".join(lines), "\n".join(loops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    hardware = detect()
    report: dict[str, Any] = {"cpu": hardware.cpu, "torch": torch.__version__, "count": args.count, "steps": STEPS}
    report["quality"] = quality(args.count)
    report["bookkeeping"] = [*bookkeeping("T", 5 * args.rounds), *bookkeeping("S", args.rounds)]
    write(report, args.output)


def write(report: dict[str, Any], output: Path) -> None:
    """The results, and the first table into the README."""
    first, second = tables(report)
    command = f"`python -m benchmarks.accelerate --count {report['count']}`, {report['cpu']}, one thread, torch {report['torch']}"
    stem = re.sub(r"[^a-z0-9]+", "-", report["cpu"].lower()).strip("-")
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{stem}-accelerate.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / f"{stem}-accelerate.md").write_text(f"# Accelerators\n\n{command}\n\n{first}\n\n{second}\n")
    if output == Path("benchmarks/results"):
        into_readme(f"{first}\n\n{command}\n")
    print(f"{first}\n\n{second}")


def into_readme(table: str) -> None:
    path = Path("README.md")
    before, rest = path.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n{table}{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
