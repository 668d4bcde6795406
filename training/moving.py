"""The world of moving shapes the bundled video model is trained on, and what says whether a clip shows what a prompt asks for.

A `Motion` is the full truth of a clip: one object that moves at an even pace. `describe` says some of it in words and leaves
the rest open; `draw` renders it. Lengths and speeds are fractions of the picture's shorter side; speeds are per frame, so a
shorter clip is the beginning of a longer one.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training import shapes
from training.grader import Blob, read
from training.shapes import COLORS, background_words, is_held_out, render, write

FRAMES = 17  # an object stays inside the picture for so long
SHAPES = ("circle", "square", "triangle")
RADII = {"small": 0.15, "large": 0.24}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slow": 0.012, "fast": 0.028}  # per frame
LEAST_SPEED = 0.004  # per frame; what moves less stands still
SPEED_LIMIT = 0.0185  # between slow and fast
SAMPLED_FRAMES = 7  # of a clip, read by the grader
TO_RADIUS = {"circle": 1.0, "square": 0.86, "triangle": 0.925}  # half of a shape's mean width and height, over its radius

SPEED_WORDS = {"slow": ("slowly",), "fast": ("fast", "quickly")}
EXTRA_WORDS = "to going quickly upwards downwards leftwards rightwards flying sliding video clip".split()


@dataclass(frozen=True)
class Motion:
    """Everything about one clip. `x`, `y`: the centre in the first frame, as fractions of width and height."""

    shape: str
    color: str
    background: str
    size: str
    direction: str
    speed: str
    x: float
    y: float
    radius: float
    pace: float  # per frame


@dataclass(frozen=True)
class Caption:
    """A prompt and the attributes it states; an attribute left out is None."""

    text: str
    shape: str | None = None
    color: str | None = None
    background: str | None = None
    size: str | None = None
    direction: str | None = None
    speed: str | None = None


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "background": tuple(COLORS),
    "size": tuple(RADII),
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
}


def vocabulary() -> list[str]:
    """Every word a prompt of this world may hold, and those of the still shapes' world."""
    return list(dict.fromkeys([*shapes.vocabulary(), *EXTRA_WORDS]))


def sample_motion(rng: random.Random, aspect: float = 1.0, *, held_out: bool = False) -> Motion:
    """A random clip for a picture of `aspect` = width / height. A tenth of colour × shape × direction is held out."""
    while True:
        color, shape, direction = rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(DIRECTIONS))
        background = rng.choice(("white", "black", "gray")) if rng.random() < 0.5 else rng.choice(list(COLORS))
        if color != background and is_held_out(color, shape, direction) == held_out:
            break
    size, speed = rng.choice(list(RADII)), rng.choice(list(SPEEDS))
    radius, pace = RADII[size] * rng.uniform(0.94, 1.06), SPEEDS[speed] * rng.uniform(0.92, 1.08)
    path = pace * (FRAMES - 1)
    starts = []
    for extent, way in zip((max(aspect, 1), max(1 / aspect, 1)), DIRECTIONS[direction], strict=True):
        middle = rng.uniform(*inside(extent, radius + 0.02 + abs(way) * path / 2))
        starts.append((middle - way * path / 2) / extent)
    return Motion(shape, color, background, size, direction, speed, *starts, radius, pace)


def inside(extent: float, margin: float) -> tuple[float, float]:
    """The least and the largest coordinate of what stays `margin` away from the borders of a picture's `extent`."""
    return min(margin, extent / 2), max(extent - margin, extent / 2)


def draw(motion: Motion, frames: int, width: int, height: int, oversample: int = 4) -> np.ndarray:
    """(frames, height, width, 3) uint8"""
    inks = COLORS[motion.background], COLORS[motion.color]
    return _render("RGB", motion, frames, (width, height), oversample, inks)


def silhouette(motion: Motion, frames: int, width: int, height: int, oversample: int = 4) -> np.ndarray:
    """Where the object is: (frames, height, width) uint8, 255 inside"""
    return _render("L", motion, frames, (width, height), oversample, (0, 255))


def _render(
    mode: str, motion: Motion, frames: int, size: tuple[int, int], oversample: int, inks: tuple[shapes.Ink, shapes.Ink]
) -> np.ndarray:
    short = min(size)
    dx, dy = (way * motion.pace * short / side for way, side in zip(DIRECTIONS[motion.direction], size, strict=True))
    pictures = []
    for frame in range(frames):
        where = motion.radius, [(motion.x + dx * frame, motion.y + dy * frame)]
        pictures.append(np.asarray(render(mode, motion.shape, where, size, oversample, *inks)))
    return np.stack(pictures)


def describe(motion: Motion, rng: random.Random, *, full: bool = False) -> Caption:
    """Put a clip into words. Unless `full`, any part may be left out."""

    def says(probability: float) -> bool:
        return full or rng.random() < probability

    shape = motion.shape if says(0.92) else None
    color = motion.color if says(0.92) else None
    background = motion.background if says(0.75) else None
    size = motion.size if says(0.6) else None
    direction = motion.direction if says(0.92) else None
    speed = motion.speed if says(0.75) else None
    words = [size or "", color or "", shape or "shape"]
    subject = " ".join(word for word in words if word)
    article = "an" if subject[0] in "aeiou" else "a"
    if not full and rng.random() < 0.1:
        article = rng.choice(("one", ""))
    text = " ".join(part for part in (article, subject, _motion_words(direction, speed, rng, full)) if part)
    if not full and rng.random() < 0.1:
        text = rng.choice((*shapes.STYLE_PREFIXES, "a video of", "a clip of")) + " " + text
    if background is not None:
        text += background_words(background, 0.0 if full else rng.random())
    if not full:
        text = write(text, rng)
    return Caption(text, shape, color, background, size, direction, speed)


def _motion_words(direction: str | None, speed: str | None, rng: random.Random, plain: bool) -> str:
    """ "moving right slowly", and the other ways to say it unless `plain`"""
    if direction is None and speed is None:
        return "" if rng.random() < 0.5 else "moving"
    how = "" if speed is None else SPEED_WORDS[speed][0] if plain else rng.choice(SPEED_WORDS[speed])
    if plain or direction is None:
        return " ".join(word for word in ("moving", direction or "", how) if word)
    verb = rng.choice(("moving", "moving", "moving", "going", "sliding", "flying"))
    forms = [direction, direction, f"{direction}wards"] + ([f"to the {direction}"] * 2 if direction in ("left", "right") else [])
    order = rng.choice(((verb, "{}", how), (verb, "{}", how), (verb, how, "{}"), (how, verb, "{}")))
    return " ".join(word for word in order if word).format(rng.choice(forms))


def _subject(blobs: tuple[Blob, ...]) -> Blob | None:
    """The largest thing in a picture."""
    return max(blobs, key=lambda blob: blob.radius, default=None)


def _most(names: list[str]) -> str:
    """What more than half of the frames show, or "unsteady"."""
    name, count = Counter(names).most_common(1)[0] if names else ("unsteady", 0)
    return name if 2 * count > len(names) else "unsteady"


def observe(clip: np.ndarray) -> dict[str, str]:
    """Read a clip (frames, height, width, 3) uint8: each attribute's value, or "unsteady", "still" or "nothing"."""
    frames, height, width, _ = clip.shape
    picked = sorted({round(i * (frames - 1) / (SAMPLED_FRAMES - 1)) for i in range(SAMPLED_FRAMES)})
    readings = [read(Image.fromarray(clip[frame])) for frame in picked]
    found = [(frame, blob) for frame, reading in zip(picked, readings, strict=True) if (blob := _subject(reading.blobs))]
    out = {"background": _most([reading.background for reading in readings])}
    if 2 * len(found) <= len(picked):
        return out | dict.fromkeys(("shape", "color", "size", "direction", "speed"), "nothing")
    out["shape"] = _most([blob.shape for _, blob in found])
    out["color"] = _most([blob.color for _, blob in found])
    radius = float(np.median([blob.radius / TO_RADIUS.get(blob.shape, 1.0) for _, blob in found]))
    out["size"] = min(RADII, key=lambda name: abs(RADII[name] - radius))
    (first, start), (last, end) = found[0], found[-1]
    short, passed = min(width, height), max(last - first, 1)
    dx, dy = (end.x - start.x) * width / short / passed, (end.y - start.y) * height / short / passed
    if max(abs(dx), abs(dy)) < LEAST_SPEED or min(abs(dx), abs(dy)) > 0.5 * max(abs(dx), abs(dy)):
        return out | {"direction": "still" if max(abs(dx), abs(dy)) < LEAST_SPEED else "askew", "speed": "unsteady"}
    out["direction"] = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")
    out["speed"] = "slow" if max(abs(dx), abs(dy)) < SPEED_LIMIT else "fast"
    return out


def grade(clip: np.ndarray, caption: Caption) -> dict[str, bool]:
    """Whether each attribute the caption states is true of the clip. Attributes left open are not graded."""
    seen = observe(clip)
    stated = {name: getattr(caption, name) for name in ATTRIBUTES}
    marks = {name: seen[name] == value for name, value in stated.items() if value is not None}
    marks["all"] = all(marks.values())
    return marks
