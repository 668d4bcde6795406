"""The bundled video model: its size, its parity with diffusers, and whether its clips show and do what the prompt says."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from stepwell import DiffGenerator
from training.moving import describe, draw, grade, observe, sample_motion

ZOO = Path(str(resources.files("stepwell.zoo") / "tiny-wan"))


@pytest.fixture(scope="module")
def generator() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("stepwell/tiny-wan", threads=1) as made:
        yield made


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file()) <= 8_000_000


def test_videos_follow_held_out_prompts(generator: DiffGenerator) -> None:
    """A quick sample of what the model card measures on more prompts."""
    rng = random.Random(2026)
    captions = [describe(sample_motion(rng, held_out=True), rng, full=True) for _ in range(10)]
    clips = generator.generate([caption.text for caption in captions], seed=50)
    marks: dict[str, list[bool]] = defaultdict(list)
    for caption, clip in zip(captions, clips, strict=True):
        for name, is_right in grade(clip.frames, caption).items():
            marks[name].append(is_right)
    scores = {name: float(np.mean(values)) for name, values in marks.items()}
    floor = {"shape": 0.7, "color": 0.85, "background": 0.85, "size": 0.85, "direction": 0.8, "speed": 0.8}
    assert all(scores[name] >= least for name, least in floor.items()), scores


def test_what_a_prompt_leaves_open_differs_by_seed(generator: DiffGenerator) -> None:
    clips = generator.generate("a shape moving", seed=100, num_outputs_per_prompt=8, num_frames=9)
    seen = [observe(clip.frames) for clip in clips]
    assert len({(each["color"], each["background"]) for each in seen}) >= 4, seen


def test_a_picture_is_set_in_motion(generator: DiffGenerator, tmp_path: Path) -> None:
    """The first frame is the picture's, and what it shows goes where the prompt says."""
    rng, right = random.Random(7), 0
    for seed in range(4):
        motion = sample_motion(rng, held_out=True)
        caption = describe(motion, rng, full=True)
        begun = draw(motion, 1, 64, 64)[0]
        Image.fromarray(begun).save(tmp_path / "begun.png")
        (clip,) = generator.generate(caption.text, image=tmp_path / "begun.png", seed=seed)
        assert 10 * np.log10(255**2 / np.square(clip.frames[0].astype(float) - begun).mean()) > 20
        marks = grade(clip.frames, caption)
        right += marks["color"] and marks["direction"] and marks["shape"]
    assert right >= 3


def test_diffusers_makes_the_same_video(generator: DiffGenerator) -> None:
    pipe = WanPipeline.from_pretrained(ZOO)
    pipe.set_progress_bar_config(disable=True)
    options = {"width": 64, "height": 48, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 4.0}
    prompt = "a small green circle moving up on a white background"
    theirs = pipe(prompt, generator=torch.Generator().manual_seed(4), **options).frames[0]
    ours = generator.generate(prompt, seed=4, **options)[0].frames  # type: ignore[arg-type]
    assert np.abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1
