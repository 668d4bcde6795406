"""Mends a picture the model has drawn: finds the layout it has in mind and says how the world of shapes draws that.

A model that has learnt colours and places still draws edges that wave. Its picture and the mended one agree in where
things are, so the noise the picture began from can be paired with what should have come of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.shapes import COLORS, RADII, SHAPES, Caption, is_held_out, nominal_layouts, render

AREAS = {
    "circle": math.pi,
    "square": (2 * 0.86) ** 2,
    "triangle": 0.5 * 1.9 * 1.8,
    "star": 5 * 1.08 * 0.45 * math.sin(math.pi / 5),
}  # of the outlines of radius 1
CENTROID = {"triangle": 0.2}  # radii by which a shape's centre of mass is below its centre
RADIUS_JITTER = 0.03  # of a size's radius: half of the world's, so that sizes can be told apart
CENTRE_JITTER = {1: 0.03, 2: 0.015, 3: 0.012}
MIN_OVERLAP = 0.4  # intersection over union; below it a picture is not laid out like any of the world


@dataclass(frozen=True)
class Mended:
    """What a picture should have been: `where` is as of `shapes.layout`, `overlap` how well the picture's silhouette fits it."""

    shape: str
    color: str
    background: str
    where: tuple[float, list[tuple[float, float]]]
    overlap: float

    def draw(self, width: int, height: int) -> Image.Image:
        return render("RGB", self.shape, self.where, (width, height), 4, COLORS[self.background], COLORS[self.color])

    def silhouette(self, width: int, height: int) -> Image.Image:
        """255 inside, 8-bit."""
        return render("L", self.shape, self.where, (width, height), 4, 0, 255)


def mend(image: Image.Image, caption: Caption) -> Mended | None:
    """The ideal picture of a prompt that is laid out as `image` is; what the prompt leaves open is what fits the image best.

    None if its layout can't be read, or if what it shows is held out from training."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    seen_background, seen_color, mask = _parts(pixels)
    background = caption.background or _nearest(seen_background, caption.color)
    color = caption.color or _nearest(seen_color, background)
    count = caption.count or 1
    fits = [
        Mended(shape, color, background, where, _overlap(mask, shape, where))
        for shape in ((caption.shape,) if caption.shape else SHAPES)
        for where in _layouts(mask, shape, count, caption.size, caption.place or "center")
    ]
    best = max(fits, key=lambda fit: fit.overlap)
    if best.overlap < MIN_OVERLAP or is_held_out(best.color, best.shape, best.background):
        return None
    return best


def _nearest(rgb: np.ndarray, other: str | None) -> str:
    """The name of the nearest colour but `other`."""
    names = [name for name in COLORS if name != other]
    return min(names, key=lambda name: float(np.linalg.norm(np.array(COLORS[name]) - rgb)))


def _parts(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(height, width, 3) -> the background's colour, the objects' colour, where the objects are (height, width) in 0 … 1."""
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    distance = np.linalg.norm(pixels - background, axis=2)
    inside = distance > 0.5 * np.quantile(distance, 0.985)  # the smallest object covers 3 % of a picture
    color = np.median(pixels[inside], axis=0) if inside.any() else background
    ratio = distance / max(float(np.linalg.norm(color - background)), 1.0)
    return background, color, np.clip((ratio - 0.25) / 0.5, 0, 1)


def _layouts(
    mask: np.ndarray, shape: str, count: int, size: str | None, place: str
) -> Iterator[tuple[float, list[tuple[float, float]]]]:
    """Every layout the world has for some objects, moved to where the mask has them: each to the centre of the mass that
    is nearer to it than to the others, with a radius that covers as much as the mask does."""
    height, width = mask.shape
    side = min(width, height)
    radius = math.sqrt(float(mask.sum()) / side**2 / (count * AREAS[shape]))
    sizes = RADII[count]
    nominal = sizes[size] if size else min(sizes.values(), key=lambda r: abs(r - radius))
    radius = min(max(radius, nominal * (1 - RADIUS_JITTER)), nominal * (1 + RADIUS_JITTER))
    ys, xs = np.mgrid[:height, :width] + 0.5
    jitter = CENTRE_JITTER[count]
    for centres in nominal_layouts(count, place, radius):
        owner = np.argmin([np.hypot(xs - x * width, ys - y * height) for x, y in centres], axis=0)
        moved = []
        for index, (x, y) in enumerate(centres):
            mass = mask * (owner == index)
            total = max(float(mass.sum()), 1e-6)
            seen_x = float((mass * xs).sum()) / total / width
            seen_y = (float((mass * ys).sum()) / total - CENTROID.get(shape, 0.0) * radius * side) / height
            moved.append((float(np.clip(seen_x, x - jitter, x + jitter)), float(np.clip(seen_y, y - jitter, y + jitter))))
        yield radius, moved


def _overlap(mask: np.ndarray, shape: str, where: tuple[float, list[tuple[float, float]]]) -> float:
    """Intersection over union of a mask and an ideal silhouette."""
    height, width = mask.shape
    ideal = np.asarray(render("L", shape, where, (width, height), 2, 0, 255)) / 255
    return float(np.minimum(mask, ideal).sum() / np.maximum(mask, ideal).sum())
