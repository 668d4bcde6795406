"""Grade a trained Wan-layout model of the moving shapes through diffusers' own pipelines.

    python -m training.evaluate_wan path/to/pipeline [--count 100]

Prompts state every attribute, hold colour × shape × direction triples never seen in training, and use seeds of their own. For
image-to-video the first frame is that of a true clip. Prints the Markdown table of the model card.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from training.moving import ATTRIBUTES, FRAMES, describe, draw, grade, sample_motion


def image_pipeline(pipe: WanPipeline) -> WanImageToVideoPipeline:
    """The same parts, for clips that continue a picture."""
    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    return WanImageToVideoPipeline(**parts, expand_timesteps=True)


@torch.no_grad()
def accuracy(
    pipe: WanPipeline | WanImageToVideoPipeline,
    *,
    count: int,
    size: tuple[int, int] = (64, 64),
    frames: int = FRAMES,
    steps: int = 12,
    guidance: float = 1.0,
    full: bool = True,
) -> dict[str, float]:
    """The share of held-out prompts whose clip shows each attribute they state; given a first frame, also its PSNR in dB."""
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(77)
    marks: dict[str, list[float]] = defaultdict(list)
    continues = isinstance(pipe, WanImageToVideoPipeline)
    for _ in range(0, count, 1 if continues else 10):
        motions = [sample_motion(rng, size[0] / size[1], held_out=True) for _ in range(1 if continues else 10)]
        captions = [describe(motion, rng, full=full) for motion in motions]
        begun = draw(motions[0], 1, *size)[0]
        clips = pipe(
            **({"image": Image.fromarray(begun)} if continues else {}),
            prompt=[caption.text for caption in captions],
            width=size[0],
            height=size[1],
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(rng.randrange(2**31)) for _ in captions],
        ).frames
        for clip, caption in zip((np.asarray(clips) * 255).round().astype(np.uint8), captions, strict=True):
            for name, right in grade(clip, caption).items():
                marks[name].append(right)
            if continues:
                marks["psnr"].append(10 * np.log10(255**2 / np.square(clip[0].astype(float) - begun).mean()))
    return {name: round(float(np.mean(values)), 3) for name, values in marks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(args.pipeline)
    from_image = image_pipeline(pipe)
    cases = {
        "text to video, 17 frames": {},
        "text to video, guidance 2": {"guidance": 2.0},
        "text to video, guidance 5": {"guidance": 5.0},
        "text to video, 24 steps": {"steps": 24},
        "text to video, 9 frames": {"frames": 9},
        "text to video, 96 × 64": {"size": (96, 64)},
        "text to video, underspecified": {"full": False},
        "image to video, 17 frames": {},
        "image to video, 9 frames": {"frames": 9},
    }
    names = (*ATTRIBUTES, "all", "psnr")
    print("| held-out prompts | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for label, options in cases.items():
        if args.only in label:
            scores = accuracy(from_image if label.startswith("image") else pipe, count=args.count, **options)
            print(f"| {label} ({args.count}) | " + " | ".join(str(scores.get(name, "")) for name in names) + " |", flush=True)


if __name__ == "__main__":
    main()
