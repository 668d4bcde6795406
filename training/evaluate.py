"""Grade a trained FLUX-layout model of the shapes world through diffusers' own pipeline.

    python -m training.evaluate path/to/pipeline [--count 400]

Prompts state every attribute, hold colour × shape × background triples never seen in training, and use seeds of
their own. Prints the Markdown table of the model card.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

import torch
from diffusers import FluxPipeline

from training.grader import grade, read
from training.shapes import describe, sample_scene


@torch.no_grad()
def accuracy(
    pipe: FluxPipeline, *, size: int, count: int, steps: int = 4, length: int = 32, full: bool = True, seed: int = 77
) -> dict[str, float]:
    """The share of held-out prompts whose picture shows each attribute they state."""
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(seed)
    marks: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, 20):
        captions = [describe(sample_scene(rng, held_out=True), rng, full=full) for _ in range(min(20, count - start))]
        images = pipe(
            [caption.text for caption in captions],
            height=size,
            width=size,
            num_inference_steps=steps,
            max_sequence_length=length,
            generator=[torch.Generator().manual_seed(rng.randrange(2**31)) for _ in captions],
        ).images
        for image, caption in zip(images, captions, strict=True):
            for name, right in grade(image, caption).items():
                marks[name].append(right)
    return {name: round(sum(values) / len(values), 3) for name, values in marks.items()}


@torch.no_grad()
def variety(pipe: FluxPipeline, *, prompt: str = "a shape", count: int = 40, size: int = 64) -> int:
    """How many pairs of object's and background's colour some seeds show of a prompt that leaves both open. The table can't
    tell that a model makes one picture of every seed."""
    images = pipe(
        [prompt] * count,
        height=size,
        width=size,
        num_inference_steps=4,
        max_sequence_length=32,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
    ).images
    readings = [read(image) for image in images]
    return len({(reading.blobs[0].color, reading.background) for reading in readings if reading.blobs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline")
    parser.add_argument("--count", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = FluxPipeline.from_pretrained(args.pipeline)
    cases = {
        "64 px, 4 steps": {"size": 64},
        "128 px, 4 steps": {"size": 128},
        "128 px, 8 steps": {"size": 128, "steps": 8},
        "128 px, 20 steps": {"size": 128, "steps": 20},
        "128 px, underspecified prompts": {"size": 128, "full": False},
        "128 px, T5 padded to 512": {"size": 128, "length": 512},
    }
    names = ("color", "shape", "background", "place", "count", "size", "all")
    print("| held-out prompts | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for label, options in cases.items():
        count = args.count // 4 if "512" in label or "20" in label else args.count
        scores = accuracy(pipe, count=count, **options)
        print(f"| {label} ({count}) | " + " | ".join(f"{scores[name]:.3f}" for name in names) + " |", flush=True)
    print(f'\n40 seeds of "a shape" show {variety(pipe)} pairs of colours.')


if __name__ == "__main__":
    main()
