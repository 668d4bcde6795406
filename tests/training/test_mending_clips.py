"""Mending a model's own clips: a perfect clip stays as it is, a bad one becomes what its prompt says where the object was."""

from __future__ import annotations

import random
from dataclasses import replace

import cv2
import numpy as np
import pytest

from training.mending_clips import coverage, mend, overlap_of
from training.moving import ATTRIBUTES, FRAMES, RADII, SPEEDS, Caption, Motion, describe, draw, observe, sample_motion, silhouette
from training.shapes import is_held_out


def facts(motion: Motion) -> dict[str, str]:
    return {name: getattr(motion, name) for name in ATTRIBUTES}


@pytest.mark.parametrize(("frames", "size"), [(FRAMES, (64, 64)), (9, (64, 64)), (FRAMES, (96, 64)), (FRAMES, (64, 96))])
def test_true_clips_stay_as_they_are(frames: int, size: tuple[int, int]) -> None:
    rng = random.Random(8)
    for _ in range(12):
        motion = sample_motion(rng, size[0] / size[1])
        mended = mend(draw(motion, frames, *size), describe(motion, rng))
        assert mended is not None and facts(mended) == facts(motion)
        assert abs(mended.x - motion.x) * size[0] < 0.5 and abs(mended.y - motion.y) * size[1] < 0.5  # pixels
        assert abs(mended.radius - motion.radius) * 64 < 0.5 and abs(mended.pace - motion.pace) * 64 < 0.05


def test_an_oval_that_wanders_becomes_what_was_asked_for_in_its_place() -> None:
    clip = np.full((FRAMES, 64, 64, 3), 250, np.uint8)
    for frame in range(FRAMES):
        centre = 20 + frame, 30 + (frame % 3)
        cv2.ellipse(clip[frame], centre, (13, 9), 0, 0, 360, (220, 30, 30), cv2.FILLED)
    mended = mend(clip, Caption("a small red square moving right slowly", "square", "red", None, "small", "right", "slow"))
    assert mended is not None and facts(mended) == {
        **{"shape": "square", "color": "red", "background": "white"},
        **{"size": "small", "direction": "right", "speed": "slow"},
    }
    assert RADII["small"] * 0.94 <= mended.radius <= RADII["small"] * 1.06
    assert SPEEDS["slow"] * 0.92 <= mended.pace <= SPEEDS["slow"] * 1.08
    drawn = draw(mended, FRAMES, 64, 64)
    assert observe(drawn) == facts(mended)
    seen = coverage(drawn.astype(np.float32), np.array([250.0] * 3))
    assert seen is not None
    across = seen.sum((0, 2)) @ (np.arange(64) + 0.5) / seen.sum()
    assert abs(across - 31.5) < 1  # the middle of its ups and downs


def test_what_is_mended_stays_inside_the_picture() -> None:
    rng = random.Random(9)
    for _ in range(20):
        motion = sample_motion(rng)
        strayed = replace(motion, x=motion.x * 0.8, y=motion.y * 0.8)
        mended = mend(draw(strayed, FRAMES, 64, 64), describe(motion, rng, full=True))
        assert mended is not None
        mask = silhouette(mended, FRAMES, 64, 64)
        assert max(mask[:, 0].max(), mask[:, -1].max(), mask[:, :, 0].max(), mask[:, :, -1].max()) == 0


def test_frames_without_the_object_do_not_count_unless_they_are_many() -> None:
    rng = random.Random(10)
    motion = sample_motion(rng)
    clip, caption = draw(motion, FRAMES, 64, 64), describe(motion, rng, full=True)
    some, many = clip.copy(), clip.copy()
    some[:2] = clip[0, 0, 0]
    many[::2] = clip[0, 0, 0]
    mended = mend(some, caption)
    assert mended is not None and abs(mended.pace - motion.pace) * 64 < 0.05 and abs(mended.x - motion.x) * 64 < 0.5
    assert mend(many, caption) is None


def test_nothing_two_things_and_noise_cannot_be_mended() -> None:
    rng = random.Random(11)
    motion = replace(sample_motion(rng), x=0.25, y=0.25, radius=0.15, direction="right", speed="slow", pace=0.012)
    caption = describe(replace(motion, shape="circle"), rng, full=True)
    clip = draw(motion, FRAMES, 64, 64)
    two = clip.copy()
    two[:, 32:] = clip[:, :32]
    assert mend(two, caption) is None
    assert mend(np.full_like(clip, 250), caption) is None
    assert mend(np.random.default_rng(0).integers(0, 256, clip.shape, np.uint8), caption) is None


def test_held_out_triples_do_not_come_back_mended() -> None:
    """What a prompt leaves open is filled from the clip, and that may be what is never trained on."""
    rng = random.Random(12)
    motion = sample_motion(rng, held_out=True)
    caption = Caption("a shape moving", None, motion.color, None, None, motion.direction, None)
    mended = mend(draw(motion, FRAMES, 64, 64), caption)
    assert mended is None or not is_held_out(mended.color, mended.shape, mended.direction)
    assert mend(draw(motion, FRAMES, 64, 64), replace(caption, shape=motion.shape)) is None


def test_overlap_is_shared_area_over_all_area() -> None:
    a, b = np.zeros((1, 4, 4)), np.zeros((1, 4, 4))
    a[0, :, :2], b[0, :, 1:3] = 1, 1
    assert overlap_of(a, b) == pytest.approx(1 / 3) and overlap_of(a, a) == 1
