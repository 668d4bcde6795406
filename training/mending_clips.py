"""Finds the perfect clip nearest to what a model made of a prompt: one shape of one size in one even motion.

A model's own clip is right about where the object is and wrong about its outline: an edge waves, sides differ. `mend` keeps
the first and corrects the second, so that the noise a clip was made from and the mended clip agree about what the prompt leaves
open, and a model can learn to draw the one from the other.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from training.grader import name_color
from training.moving import DIRECTIONS, FRAMES, RADII, SHAPES, SPEEDS, Caption, Motion, inside, silhouette
from training.shapes import is_held_out

LEAST_CONTRAST = 40  # between object and background, of the 255·√3 between black and white; below it there is no object to see
LEAST_PART = 0.8  # of what differs from the background: the largest piece holds as much, or there are several objects
LEAST_FRAMES = 0.7  # of a clip's: as many show one object, or there is no motion to read
LEAST_OVERLAP = 0.25  # of the clip's and the mended object, over their union, or the layout could not be read
RADIUS_REACH, PACE_REACH = 0.06, 0.08  # how far a radius and a pace may be from those that `SPEEDS` and `RADII` name
MARGIN = 0.02  # between an object and the border
# The area of a shape of radius 1, and how far below its centre its mass lies
AREAS = {"circle": math.pi, "square": 4 * 0.86**2, "triangle": 0.95 * 1.8}
MASS_BELOW = {"circle": 0.0, "square": 0.0, "triangle": 0.2}


def mend(clip: np.ndarray, caption: Caption) -> Motion | None:
    """A clip (frames, height, width, 3) uint8 made of a prompt -> the nearest motion of which that is true. None if the clip
    shows no single object, is not near such a motion, or if that would be one kept out of training."""
    frames, height, width, _ = clip.shape
    background = np.median(np.concatenate([clip[:, (0, -1)].reshape(-1, 3), clip[:, :, (0, -1)].reshape(-1, 3)]), 0)
    cover = coverage(clip.astype(np.float32), background)
    if cover is None:
        return None
    core = np.median(clip[cover > 0.9], 0) if (cover > 0.9).any() else background
    color, ground = caption.color or name_color(core), caption.background or name_color(background)
    if "other" in (color, ground) or color == ground:
        return None
    best, best_overlap = None, LEAST_OVERLAP
    for shape in SHAPES if caption.shape is None else (caption.shape,):
        motion = fit_motion(cover, shape, replace(caption, color=color, background=ground))
        overlap = overlap_of(cover, silhouette(motion, frames, width, height) / 255)
        if overlap > best_overlap and not is_held_out(color, shape, motion.direction):
            best, best_overlap = motion, overlap
    return best


def coverage(clip: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    """How much of each pixel the object covers: (frames, height, width) in 0 … 1, nothing in frames that do not show one object.
    None if those are many."""
    away = clip - background
    distance = np.linalg.norm(away, axis=-1)
    strongest = distance > max(LEAST_CONTRAST, 0.6 * np.quantile(distance, 0.99))
    if not strongest.any():
        return None
    ink = np.median(away[strongest], 0)
    cover = np.clip(away @ ink / max(float(ink @ ink), 1.0), 0, 1)
    for frame, picture in enumerate(cover):
        _, labels = cv2.connectedComponents((picture > 0.25).astype(np.uint8))
        masses = np.bincount(labels.ravel(), picture.ravel())[1:]
        alone = len(masses) > 0 and masses.max() > LEAST_PART * masses.sum()
        own = cv2.dilate((labels == masses.argmax() + 1).astype(np.uint8), np.ones((3, 3), np.uint8)) if alone else 0 * labels
        cover[frame] = np.where(own > 0, picture, 0)
    mass = cover.sum((1, 2))
    usual = float(np.median(mass))
    cover[(mass < 0.4 * usual) | (mass > 2.5 * usual)] = 0  # half drawn, or the background is another there
    seen = cover.any((1, 2))
    return cover if usual > 4 and seen.mean() > LEAST_FRAMES else None


def fit_motion(cover: np.ndarray, shape: str, caption: Caption) -> Motion:
    """The even motion of a shape that fits best what is covered, (frames, height, width), within what the prompt states: its size
    by the covered area, its path by least squares over the centres of mass. Colours must be stated."""
    assert caption.color is not None and caption.background is not None
    _, height, width = cover.shape
    short = min(width, height)
    times = np.flatnonzero(cover.any((1, 2)))
    cover = cover[times]
    mass = cover.sum((1, 2))
    radius = float(np.sqrt(np.median(mass) / AREAS[shape])) / short
    along = np.stack([(cover.sum(1) @ (np.arange(width) + 0.5)), (cover.sum(2) @ (np.arange(height) + 0.5))])
    centres = along / mass / short - np.array([[0.0], [MASS_BELOW[shape] * radius]])  # (2, frames), of the shorter side
    size, radius = nearest(RADII, caption.size, radius, RADIUS_REACH)
    spread = times - times.mean()
    velocity = centres @ spread / max(float(spread @ spread), 1.0)
    direction = caption.direction or max(DIRECTIONS, key=lambda name: float(velocity @ DIRECTIONS[name]))
    way = np.array(DIRECTIONS[direction])
    speed, pace = nearest(SPEEDS, caption.speed, float(velocity @ way), PACE_REACH)
    start = centres.mean(1) - way * pace * times.mean()
    end = start + way * pace * (FRAMES - 1)  # where it would be after a clip of full length
    for axis, extent in enumerate((width / short, height / short)):
        low, high = inside(extent, radius + MARGIN + abs(end - start)[axis] / 2)
        middle = (start + end)[axis] / 2
        start[axis] += min(max(middle, low), high) - middle
    x, y = start * short / np.array([width, height])
    return Motion(shape, caption.color, caption.background, size, direction, speed, float(x), float(y), radius, pace)


def nearest(named: dict[str, float], stated: str | None, seen: float, reach: float) -> tuple[str, float]:
    """The stated name, or else the one whose value is nearest to what is seen, and what is seen, kept near what the name says."""
    name = stated or min(named, key=lambda name: abs(named[name] - seen))
    return name, min(max(seen, named[name] * (1 - reach)), named[name] * (1 + reach))


def overlap_of(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two coverages in 0 … 1"""
    return float(np.minimum(a, b).sum() / np.maximum(np.maximum(a, b).sum(), 1.0))
