"""Says what a picture of the shapes world shows, from its contours, and whether that is what the prompt asked for."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from training.shapes import COLORS, RADII, Caption

UPSCALE = 4
MIN_AREA = 0.003  # of the picture; smaller blobs are noise
MAX_COLOR_DISTANCE = 26.0  # CIE Lab; a colour farther from every name is "other"


@dataclass(frozen=True)
class Blob:
    """One object found: its colour and shape by name, its centre and radius as fractions."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str
    blobs: tuple[Blob, ...]


def _lab(rgb: np.ndarray) -> np.ndarray:
    pixels = np.asarray(rgb, np.float32).reshape(-1, 1, 3) / 255
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).reshape(-1, 3)


_NAMES = list(COLORS)
_PALETTE = _lab(np.array(list(COLORS.values())))


def name_color(rgb: np.ndarray) -> str:
    """The nearest colour name in CIE Lab, or "other" if none is near."""
    distance = np.linalg.norm(_PALETTE - _lab(rgb), axis=1)
    nearest = int(distance.argmin())
    return _NAMES[nearest] if distance[nearest] <= MAX_COLOR_DISTANCE else "other"


def name_shape(contour: np.ndarray) -> str:
    """Name a contour by how it fills its hull, its smallest circle, rectangle and triangle; "other" if none fits."""
    area = cv2.contourArea(contour)
    hull = cv2.convexHull(contour)
    hull_area = cv2.contourArea(hull)
    if area <= 0 or hull_area <= 0:
        return "other"
    solidity = area / hull_area
    if solidity < 0.82:
        corners = len(cv2.approxPolyDP(hull, 0.06 * cv2.arcLength(hull, True), True))
        return "star" if solidity > 0.4 and corners in (4, 5, 6) else "other"
    if solidity < 0.92:
        return "other"
    _, radius = cv2.minEnclosingCircle(contour)
    in_circle = area / (np.pi * radius**2)
    (_, _), (width, height), _ = cv2.minAreaRect(contour)
    in_rectangle = area / (width * height)
    in_triangle = area / max(cv2.minEnclosingTriangle(contour)[0], 1e-6)
    if max(width, height) > 1.3 * min(width, height):
        return "other"
    if in_triangle > 0.82 and in_rectangle < 0.68:
        return "triangle"
    if in_rectangle > 0.9 and in_circle < 0.77:
        return "square"
    if in_circle > 0.87 and in_rectangle < 0.87:
        return "circle"
    return "other"


def read(image: Image.Image) -> Reading:
    """Find the background's colour and every object of a picture."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    height, width, _ = pixels.shape
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    large = cv2.resize(pixels, (width * UPSCALE, height * UPSCALE), interpolation=cv2.INTER_CUBIC)
    distance = np.linalg.norm(large - background, axis=2)
    found, labels = cv2.connectedComponents((distance > 30).astype(np.uint8))
    blobs = []
    for label in range(1, found):
        mask = labels == label
        if mask.sum() < MIN_AREA * mask.size:
            continue
        core = np.median(large[mask], axis=0)
        mask &= distance > 0.5 * np.linalg.norm(core - background)
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        for contour in contours:
            if cv2.contourArea(contour) < MIN_AREA * mask.size:
                continue
            x, y, w, h = cv2.boundingRect(contour)
            inside = np.zeros(mask.shape, np.uint8)
            cv2.drawContours(inside, [contour], -1, 1, cv2.FILLED)
            color = np.median(large[cv2.erode(inside, np.ones((5, 5), np.uint8)) > 0], axis=0)
            blobs.append(
                Blob(
                    name_color(color),
                    name_shape(contour),
                    (x + w / 2) / mask.shape[1],
                    (y + h / 2) / mask.shape[0],
                    (w + h) / 4 / min(mask.shape),
                )
            )
    return Reading(name_color(background), tuple(blobs))


def _place(blobs: tuple[Blob, ...]) -> str:
    x, y = float(np.mean([b.x for b in blobs])), float(np.mean([b.y for b in blobs]))
    dx, dy = x - 0.5, y - 0.5
    if max(abs(dx), abs(dy)) < 0.09:
        return "center"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _size(blobs: tuple[Blob, ...]) -> str:
    to_radius = {"circle": 1.0, "square": 0.86, "triangle": 0.925, "star": 1.0}
    radius = float(np.mean([b.radius / to_radius.get(b.shape, 1.0) for b in blobs]))
    sizes = RADII[min(len(blobs), 3)]
    return min(sizes, key=lambda name: abs(sizes[name] - radius))


def grade(image: Image.Image, caption: Caption) -> dict[str, bool]:
    """Whether each attribute the caption states is true of the picture. Attributes left open are not graded."""
    reading = read(image)
    blobs = reading.blobs
    marks: dict[str, bool] = {}
    if caption.count is not None:
        marks["count"] = len(blobs) == caption.count
    if caption.color is not None:
        marks["color"] = bool(blobs) and all(b.color == caption.color for b in blobs)
    if caption.shape is not None:
        marks["shape"] = bool(blobs) and all(b.shape == caption.shape for b in blobs)
    if caption.background is not None:
        marks["background"] = reading.background == caption.background
    if caption.place is not None:
        marks["place"] = bool(blobs) and _place(blobs) == caption.place
    if caption.size is not None:
        marks["size"] = bool(blobs) and _size(blobs) == caption.size
    marks["all"] = all(marks.values())
    return marks
