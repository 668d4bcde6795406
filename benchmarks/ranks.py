"""One model on one process and on several that share the work, interleaved: wall time of a video's denoising, and of texts.

    python -m benchmarks.ranks [--model-path MODEL] [--ranks 2] [--rounds 5] [--output FOLDER]

Every process has one thread, so that as many cores as ranks are at work; one process with as many threads is there to compare
with. The frames of all ranks have to be the same bits. Guided steps have two branches, others one, which a ring or a swap of
heads cuts. Texts are made by a model of random weights, 131 M parameters, which the ranks split. Writes results/<cpu>-ranks.json
and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from benchmarks.text import RANDOM, random_model
from stepwell import DiffGenerator
from stepwell.config.hardware import detect_cpu

SIZES = (64, 128)  # of a square, 17 frames: 320 and 1280 tokens in each branch
STEPS = 6
TEXTS = (1, 8)  # at once
ALIKE = {"linear_backend": "packed", "attention_backend": "torch_sdpa"}  # chosen by measurement, some would round otherwise
Generators = Mapping[str, DiffGenerator]


def ask(generator: DiffGenerator, size: int, guidance: float) -> tuple[float, np.ndarray]:
    """Milliseconds of denoising, and the frames."""
    made = generator.generate(prompt="a red circle moving right", width=size, height=size, num_frames=17, seed=1,
                              num_inference_steps=STEPS, guidance_scale=guidance)[0]  # fmt: skip
    return made.timings["denoise"], made.frames


def ask_texts(generator: DiffGenerator, count: int) -> tuple[float, np.ndarray]:
    """Milliseconds until so many texts of 64 tokens are there, and how many forwards each took."""
    prompts = [f"{number}: Once upon a time" for number in range(count)]
    began = time.perf_counter()
    made = generator.generate(prompts, raw=True, max_tokens=64, ignore_eos=True, diffusion={"threshold": 1.0, "max_steps": 8})
    return 1e3 * (time.perf_counter() - began), np.array([one.usage.forwards for one in made])


def measure(
    generators: Generators, once: Callable[[DiffGenerator], tuple[float, np.ndarray]], rounds: int
) -> tuple[dict[str, float], list[np.ndarray]]:
    """The least milliseconds each way took, and what it made."""
    taken: dict[str, list[float]] = {name: [] for name in generators}
    results = {}
    for number in range(rounds + 1):
        for name, generator in list(generators.items())[:: 1 if number % 2 else -1]:
            ms, results[name] = once(generator)
            if number:  # the first warms up
                taken[name].append(ms)
    return {name: min(times) for name, times in taken.items()}, [results[name] for name in generators]


def videos(generators: Generators, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by case and way."""
    found = {}
    for size, guidance in itertools.product(SIZES, (3.0, 1.0)):
        least, (one, _, *of_ranks) = measure(generators, partial(ask, size=size, guidance=guidance), rounds)
        largest = max(int(np.abs(one.astype(int) - other.astype(int)).max()) for other in of_ranks)
        assert largest <= 1 and all(np.array_equal(one, other) for other in of_ranks[:2])  # a ring rounds otherwise
        found[f"17 frames, {size} px, {'guided' if guidance > 1 else 'one branch'}"] = least
    return found


def texts(generators: Generators, rounds: int) -> dict[str, dict[str, float]]:
    """The same."""
    found = {}
    for count in TEXTS:
        least, made = measure(generators, partial(ask_texts, count=count), rounds)
        assert all(np.array_equal(made[0], other) for other in made)
        found["one text of 64 tokens" if count == 1 else f"{count} texts of 64 tokens at once"] = least
    return found


def run(ways: Mapping[str, Mapping[str, Any]], part: Any, model: str, rounds: int) -> dict[str, dict[str, float]]:
    """A part's cases, with a generator for each way."""
    with ExitStack() as stack:
        generators = {
            name: stack.enter_context(DiffGenerator.from_pretrained(model, **how)) for name, how in ways.items()
        }  # fmt: skip
        found: dict[str, dict[str, float]] = part(generators, rounds)
    for case, least in found.items():
        first = next(iter(least.values()))
        print(*(f"{case}, {name}: {ms:.0f} ms, {first / ms:.2f}×" for name, ms in least.items()), sep="\n", flush=True)
    return found


def table(found: dict[str, dict[str, float]]) -> list[str]:
    ways = next(iter(found.values()))
    lines = ["| | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for case, least in found.items():
        first = next(iter(least.values()))
        lines.append(f"| {case} | " + " | ".join(f"{ms:.0f} ms, {first / ms:.2f}×" for ms in least.values()) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default="stepwell/tiny-wan")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    alone: dict[str, dict[str, Any]] = {
        "one process, one thread": {"threads": 1},
        f"one process, {args.ranks} threads": {"threads": args.ranks},
    }
    many: dict[str, Any] = {"threads": 1, "num_gpus": args.ranks}
    ways = {
        **alone,
        f"{args.ranks} ranks, branches spread": {**many, "enable_cfg_parallel": True},
        f"{args.ranks} ranks, heads swapped": {**many, "ulysses_degree": args.ranks},
        f"{args.ranks} ranks, a ring": {**many, "ring_degree": args.ranks},
    }
    of_videos = run({name: {**how, **ALIKE} for name, how in ways.items()}, videos, args.model_path, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        split = {**alone, f"{args.ranks} ranks, weights split": {**many, "tp_size": args.ranks}}
        of_texts = run(split, texts, random_model(Path(folder), RANDOM), args.rounds)
    cpu, load = detect_cpu(), os.getloadavg()
    result = {"cpu": cpu.cpu, "cores": cpu.cores, "model": args.model_path, "steps": STEPS, "load": load,
              "denoise_ms": of_videos, "texts_ms": of_texts}  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"{re.sub(r'[^a-z0-9]+', '-', cpu.cpu.lower()).strip('-')}-ranks"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    said = f"{args.model_path}, {STEPS} steps, and 131 M random parameters; {cpu.cpu}, {cpu.cores} cores, load {load[0]:.1f}."
    stem.with_suffix(".md").write_text("\n".join([said, "", *table(of_videos), *table(of_texts)]))


if __name__ == "__main__":
    main()
