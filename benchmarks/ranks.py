"""One video on one process and on several that share its guidance branches, or its tokens: wall time of denoising, interleaved.

    python -m benchmarks.ranks [--model-path MODEL] [--ranks 2] [--rounds 5] [--output FOLDER]

Every process has one thread, so that as many cores as ranks are at work; one process with as many threads is there to compare
with. The frames of all ranks have to be the same bits. Guided steps have two branches, others one, which a ring or a swap of
heads cuts. Writes results/<cpu>-ranks.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from stepwell import DiffGenerator
from stepwell.config.hardware import detect_cpu

SIZES = (64, 128)  # of a square, 17 frames: 320 and 1280 tokens in each branch
STEPS = 6
ALIKE = {"linear_backend": "packed", "attention_backend": "torch_sdpa"}  # chosen by measurement, some would round otherwise


def ask(generator: DiffGenerator, size: int, guidance: float) -> tuple[float, np.ndarray]:
    """Milliseconds of denoising, and the frames."""
    made = generator.generate(prompt="a red circle moving right", width=size, height=size, num_frames=17, seed=1,
                              num_inference_steps=STEPS, guidance_scale=guidance)[0]  # fmt: skip
    return made.timings["denoise"], made.frames


def measure(generators: dict[str, DiffGenerator], size: int, guidance: float, rounds: int) -> dict[str, float]:
    """The least milliseconds each way took."""
    taken: dict[str, list[float]] = {name: [] for name in generators}
    frames = {}
    for number in range(rounds + 1):
        for name, generator in list(generators.items())[:: 1 if number % 2 else -1]:
            ms, frames[name] = ask(generator, size, guidance)
            if number:  # the first warms up
                taken[name].append(ms)
    one, _, *of_ranks = (frames[name] for name in generators)
    largest = max(int(np.abs(one.astype(int) - other.astype(int)).max()) for other in of_ranks)
    assert largest <= 1 and all(np.array_equal(one, other) for other in of_ranks[:2])  # a ring rounds otherwise
    return {name: min(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default="stepwell/tiny-wan")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    many: dict[str, Any] = {"threads": 1, "num_gpus": args.ranks}
    ways: dict[str, dict[str, Any]] = {
        "one process, one thread": {"threads": 1},
        f"one process, {args.ranks} threads": {"threads": args.ranks},
        f"{args.ranks} ranks, branches spread": {**many, "enable_cfg_parallel": True},
        f"{args.ranks} ranks, heads swapped": {**many, "ulysses_degree": args.ranks},
        f"{args.ranks} ranks, a ring": {**many, "ring_degree": args.ranks},
    }
    rows = []
    with ExitStack() as stack:
        generators = {
            name: stack.enter_context(DiffGenerator.from_pretrained(args.model_path, **ALIKE, **how))
            for name, how in ways.items()
        }
        for size, guidance in itertools.product(SIZES, (3.0, 1.0)):
            least = measure(generators, size, guidance, args.rounds)
            first = next(iter(least.values()))
            case = f"{size} px, {'guided' if guidance > 1 else 'one branch'}"
            rows += [{"case": case, "way": name, "denoise_ms": ms, "speedup": first / ms} for name, ms in least.items()]
            print(*(f"{case}, {name}: {ms:.0f} ms, {first / ms:.2f}×" for name, ms in least.items()), sep="\n", flush=True)
    cpu = detect_cpu()
    result = {"cpu": cpu.cpu, "cores": cpu.cores, "model": args.model_path, "steps": STEPS, "load": os.getloadavg(), "rows": rows}
    stem = args.output / f"{re.sub(r'[^a-z0-9]+', '-', cpu.cpu.lower()).strip('-')}-ranks"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = ["| 17 frames | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [f"{row['denoise_ms']:.0f} ms, {row['speedup']:.2f}×" for row in rows if row["case"] == case]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    said = f"{args.model_path}, {STEPS} steps; {cpu.cpu}, {cpu.cores} cores, load average {os.getloadavg()[0]:.1f}."
    stem.with_suffix(".md").write_text("\n".join([said, "", *lines, ""]))


if __name__ == "__main__":
    main()
