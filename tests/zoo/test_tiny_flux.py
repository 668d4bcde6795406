"""The bundled FLUX-layout model: its size, its parity with diffusers, and whether its pictures show what the prompt says."""

from __future__ import annotations

import random
from collections import defaultdict
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from stepwell import DiffGenerator
from training.grader import grade, read
from training.shapes import describe, draw, sample_scene

ZOO = Path(str(resources.files("stepwell.zoo") / "tiny-flux"))


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file()) <= 8_000_000


def test_the_grader_reads_drawings() -> None:
    """The ruler first: pictures drawn to a caption must be graded right, and wrong captions must not pass."""
    rng = random.Random(8)
    right = wrong = 0
    for _ in range(150):
        scene, other = sample_scene(rng), sample_scene(rng)
        picture = draw(scene, rng, 128, 128)
        right += grade(picture, describe(scene, rng, full=True))["all"]
        if (scene.color, scene.shape, scene.count, scene.place) != (other.color, other.shape, other.count, other.place):
            wrong += grade(picture, describe(other, rng, full=True))["all"]
    assert right >= 147
    assert wrong == 0


@pytest.mark.parametrize("size", [64, 128])
def test_pictures_follow_held_out_prompts(tiny: DiffGenerator, size: int) -> None:
    """A quick sample of what the model card measures on more prompts."""
    rng = random.Random(2024)
    captions = [describe(sample_scene(rng, held_out=True), rng, full=True) for _ in range(60)]
    pictures = tiny.generate([caption.text for caption in captions], seed=100, width=size, height=size)
    marks: dict[str, list[bool]] = defaultdict(list)
    for caption, picture in zip(captions, pictures, strict=True):
        for name, is_right in grade(picture.image, caption).items():
            marks[name].append(is_right)
    scores = {name: float(np.mean(values)) for name, values in marks.items()}
    floor = {"color": 0.95, "shape": 0.8, "background": 0.97, "place": 0.95, "count": 0.9}
    assert all(scores[name] >= least for name, least in floor.items()), scores


def test_what_a_prompt_leaves_open_differs_by_seed(tiny: DiffGenerator) -> None:
    pictures = tiny.generate("a shape", seed=300, num_outputs_per_prompt=10, width=64, height=64)
    readings = [read(picture.image) for picture in pictures]
    seen = {(reading.blobs[0].color, reading.background) for reading in readings if reading.blobs}
    assert len(seen) >= 5, seen


def test_diffusers_makes_the_same_picture(tiny: DiffGenerator) -> None:
    pipe = FluxPipeline.from_pretrained(ZOO)
    pipe.set_progress_bar_config(disable=True)
    options = {"width": 128, "height": 96, "num_inference_steps": 8, "max_sequence_length": 32}
    prompt = "three blue stars on a yellow background"
    theirs = pipe(prompt, generator=torch.Generator().manual_seed(4), **options).images[0]
    ours = tiny.generate(prompt, seed=4, **options)[0].image  # type: ignore[arg-type]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_previews_look_like_the_picture(tiny: DiffGenerator) -> None:
    from stepwell.types import Event, Preview

    events: list[Event] = []
    options = {"width": 128, "height": 128, "seed": 1}
    (output,) = tiny.generate("a large blue square on a yellow background", on_event=events.append, preview_every=1, **options)  # type: ignore[arg-type]
    last = [event for event in events if isinstance(event, Preview)][-1].frames
    small = output.image.resize((last.width, last.height), Image.Resampling.BOX)
    preview = np.frombuffer(last.data, np.uint8).reshape(last.height, last.width, 3)
    correlation = np.corrcoef(preview.ravel(), np.asarray(small).ravel())[0, 1]
    assert correlation > 0.8
