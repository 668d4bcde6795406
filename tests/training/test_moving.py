"""The world of moving shapes and its grader: what is drawn is read rightly, and what is not drawn is not read."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from training.moving import (
    ATTRIBUTES,
    DIRECTIONS,
    FRAMES,
    RADII,
    SHAPES,
    SPEEDS,
    Caption,
    Motion,
    describe,
    draw,
    grade,
    observe,
    sample_motion,
    silhouette,
    vocabulary,
)
from training.shapes import is_held_out

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def motions(count: int, seed: int = 5) -> list[Motion]:
    rng = random.Random(seed)
    return [sample_motion(rng) for _ in range(count)]


def facts(motion: Motion) -> dict[str, str]:
    return {name: getattr(motion, name) for name in ATTRIBUTES}


@pytest.mark.parametrize(("frames", "size"), [(FRAMES, (64, 64)), (9, (64, 64)), (FRAMES, (96, 64)), (FRAMES, (64, 96))])
def test_true_clips_are_read_rightly(frames: int, size: tuple[int, int]) -> None:
    rng = random.Random(11)
    found = [sample_motion(rng, size[0] / size[1], held_out=number % 2 == 0) for number in range(30)]
    right = [observe(draw(motion, frames, *size)) == facts(motion) for motion in found]
    assert sum(right) >= 29


def test_every_value_of_every_attribute_turns_up_and_is_told_apart() -> None:
    """Mutate one fact of a drawn clip at a time: only that mark may fall."""
    seen = {name: set() for name in ATTRIBUTES}
    for motion in motions(40):
        clip = draw(motion, FRAMES, 64, 64)
        for name, values in ATTRIBUTES.items():
            seen[name].add(getattr(motion, name))
            other = next(value for value in values if value != getattr(motion, name))
            marks = grade(clip, Caption("", **{**facts(motion), name: other}))
            assert not marks[name] and not marks["all"]
            assert all(right for mark, right in marks.items() if mark not in (name, "all")), (motion, marks)
    assert seen["direction"] == set(DIRECTIONS) and seen["shape"] == set(SHAPES)
    assert seen["speed"] == set(SPEEDS) and seen["size"] == set(RADII)


def test_time_matters() -> None:
    """Backwards it moves the other way, every second frame of a slow clip is fast, one frame again and again stands still."""
    for motion in motions(24):
        clip = draw(motion, FRAMES, 64, 64)
        assert observe(clip[::-1])["direction"] == OPPOSITE[motion.direction]
        assert observe(np.repeat(clip[:1], FRAMES, 0))["direction"] == "still"
        if motion.speed == "slow":
            assert observe(clip[::2])["speed"] == "fast"


def test_nothing_noise_and_oblique_motion_pass_no_grade() -> None:
    caption = describe(motions(1)[0], random.Random(1), full=True)
    assert observe(np.full((FRAMES, 64, 64, 3), 250, np.uint8))["shape"] == "nothing"
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 64, 3), np.uint8)
    assert not grade(noise, caption)["all"]
    right = replace(motions(1)[0], direction="right", x=0.2, y=0.5, pace=0.03)
    clip = draw(right, FRAMES, 64, 64)
    oblique = np.stack([np.roll(frame, number, axis=0) for number, frame in enumerate(clip[:9])])
    assert observe(oblique)["direction"] == "askew"


def test_objects_stay_inside_and_short_clips_begin_long_ones() -> None:
    for motion in motions(30):
        mask = silhouette(motion, FRAMES, 64, 64)
        assert max(mask[:, 0].max(), mask[:, -1].max(), mask[:, :, 0].max(), mask[:, :, -1].max()) == 0
        assert mask.reshape(FRAMES, -1).max(1).min() == 255
        assert (draw(motion, 9, 64, 64) == draw(motion, FRAMES, 64, 64)[:9]).all()


def test_prompts_use_known_words_and_say_only_what_is_true() -> None:
    rng, words = random.Random(3), set(vocabulary())
    for motion in motions(300):
        caption = describe(motion, rng)
        assert set(caption.text.lower().replace(",", " ").replace(".", " ").split()) <= words, caption.text
        assert all(getattr(caption, name) in (None, value) for name, value in facts(motion).items())
        full = describe(motion, rng, full=True)
        assert {name: getattr(full, name) for name in ATTRIBUTES} == facts(motion)
        assert f"moving {motion.direction}" in full.text


def test_held_out_triples_are_kept_out() -> None:
    rng = random.Random(4)
    for held_out in (True, False):
        for _ in range(60):
            motion = sample_motion(rng, held_out=held_out)
            assert is_held_out(motion.color, motion.shape, motion.direction) is held_out
