"""The world of shapes the bundled models are trained on: scenes, their prompts and their pictures.

A `Scene` is the full truth of a picture. `describe` says some of it in words and leaves the rest open, so a
model trained on the pairs has to invent what the prompt does not say; `draw` renders it with Pillow.
Coordinates and radii are fractions of the picture's width and height (radii of the shorter side).
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (245, 135, 20),
    "yellow": (245, 215, 40),
    "green": (30, 160, 60),
    "cyan": (40, 205, 220),
    "blue": (40, 70, 220),
    "purple": (130, 45, 180),
    "pink": (250, 130, 190),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "black": (8, 8, 8),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "medium", "large")
PLACES = ("left", "right", "top", "bottom", "center")
COUNTS = ("one", "two", "three")
RADII = {
    1: {"small": 0.15, "medium": 0.21, "large": 0.29},
    2: {"small": 0.13, "medium": 0.16, "large": 0.195},
    3: {"small": 0.108, "medium": 0.122, "large": 0.138},
}
STYLE_PREFIXES = ("a photo of", "a drawing of", "a picture of", "a painting of", "an image of", "a sketch of")
SPARE_WORDS = (
    "heart ring cross diamond striped outlined dark light neon style sks photo drawing picture painting sketch image "
    "blurry low high quality moving up down still growing shrinking then brown slowly fast beautiful simple flat bold "
    "soft bright big tiny little huge simple minimal icon logo art pixel cartoon shiny glowing above below and next to "
    "between inside"
).split()


Ink = int | tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Everything about one picture. `place` is where the object, or the group, sits."""

    count: int
    shape: str
    color: str
    background: str
    size: str
    place: str


@dataclass(frozen=True)
class Caption:
    """A prompt and the attributes it states; an attribute left out is None."""

    text: str
    count: int | None = None
    shape: str | None = None
    color: str | None = None
    background: str | None = None
    size: str | None = None
    place: str | None = None


def is_held_out(color: str, shape: str, background: str) -> bool:
    """About a tenth of the colour × shape × background triples, kept out of training."""
    return zlib.crc32(f"{color}|{shape}|{background}".encode()) % 10 == 0


def sample_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """A random scene; the object's colour always differs from the background's."""
    while True:
        count = rng.choices((1, 2, 3), (0.5, 0.27, 0.23))[0]
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        background = rng.choice(("white", "black", "gray")) if rng.random() < 0.35 else rng.choice(list(COLORS))
        if color == background or is_held_out(color, shape, background) != held_out:
            continue
        return Scene(count, shape, color, background, rng.choice(SIZES), rng.choice(PLACES))


def describe(scene: Scene, rng: random.Random, *, full: bool = False) -> Caption:
    """Put a scene into words. Unless `full`, any part may be left out; only a place other than the centre is always said."""

    def says(probability: float) -> bool:
        return full or rng.random() < probability

    shape = scene.shape if says(0.9) else None
    color = scene.color if says(0.88) else None
    background = scene.background if says(0.75) else None
    size = scene.size if says(0.6) and (scene.size != "medium" or rng.random() < 0.2) else None
    place = scene.place if scene.place != "center" or says(0.4) else None  # what is placed nowhere is in the centre

    noun = (shape or "shape") + ("s" if scene.count > 1 else "")
    article = rng.choice(("a", "a", "one", "")) if scene.count == 1 else COUNTS[scene.count - 1]
    if full and scene.count == 1:
        article = "a"
    subject = [article, size or "", color or "", noun, _place_words(place, rng)]
    if not full and rng.random() < 0.07:
        subject.insert(rng.randrange(len(subject)), rng.choice(SPARE_WORDS))
    words = [word for word in subject if word]
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    text = " ".join(words)
    if not full and rng.random() < 0.12:
        text = f"{rng.choice(STYLE_PREFIXES)} {text}"
    if background is not None:
        text += background_words(background, 0.0 if full else rng.random())
    if not full:
        text = write(text, rng)
    return Caption(text, scene.count, shape, color, background, size, place)


def _place_words(place: str | None, rng: random.Random) -> str:
    if place is None:
        return ""
    if place == "center":
        return rng.choice(("in the center", "in the middle"))
    return ("on the " if place in ("left", "right") else "at the ") + place


def background_words(background: str, form: float) -> str:
    """Mostly "on a … background"; `form` in [0, 1) picks the shorter ways to say it."""
    if form < 0.8:
        return f" on {'an' if background[0] in 'aeiou' else 'a'} {background} background"
    return f", {background} background" if form < 0.9 else f" on {background}"


def write(text: str, rng: random.Random) -> str:
    """The same words as people type them: with capitals, with a full stop, or without."""
    style = rng.random()
    text = text.capitalize() if style < 0.12 else text.title() if style < 0.15 else text
    return text + "." if rng.random() < 0.1 else text


def layout(scene: Scene, rng: random.Random) -> tuple[float, list[tuple[float, float]]]:
    """The radius and the centres of a scene's objects, with a little jitter."""

    def jitter(amount: float) -> float:
        return rng.uniform(-amount, amount)

    radius = RADII[scene.count][scene.size] * (1 + jitter(0.06))
    if scene.count == 1:
        ((x, y),) = nominal_layouts(1, scene.place, radius)[0]
        return radius, [(x + jitter(0.02), y + jitter(0.02))]
    is_row = scene.place in ("top", "bottom") or (scene.place == "center" and rng.random() < 0.7)
    centres = nominal_layouts(scene.count, scene.place, radius)[0 if is_row else -1]
    return radius, [(cx + jitter(0.012), cy + jitter(0.012)) for cx, cy in centres]


def nominal_layouts(count: int, place: str, radius: float) -> list[list[tuple[float, float]]]:
    """The centres of a scene's objects without jitter; two ways in the centre, where several are a row or else a column."""
    direction = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}[place]
    reach = min(0.25, 0.5 - radius - 0.03)
    x, y = 0.5 + direction[0] * reach, 0.5 + direction[1] * reach
    if count == 1:
        return [[(x, y)]]
    offsets = (-0.23, 0.23) if count == 2 else (-0.31, 0.0, 0.31)
    row, column = [(0.5 + offset, y) for offset in offsets], [(x, 0.5 + offset) for offset in offsets]
    return {"top": [row], "bottom": [row], "center": [row, column]}.get(place, [column])


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corner points of a polygon shape (not of the circle), in the units of its arguments."""
    if shape == "square":
        half = radius * 0.86
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius * 0.95, y + radius * 0.8), (x - radius * 0.95, y + radius * 0.8)]
    points = []
    for corner in range(10):
        reach = radius * (1.08 if corner % 2 == 0 else 0.45)
        angle = math.pi * corner / 5
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    return points


def draw(scene: Scene, rng: random.Random, width: int, height: int, oversample: int = 4) -> Image.Image:
    """Render a scene as an RGB picture of `width` × `height` pixels."""
    return render(
        "RGB", scene.shape, layout(scene, rng), (width, height), oversample, COLORS[scene.background], COLORS[scene.color]
    )


def silhouette(scene: Scene, rng: random.Random, width: int, height: int, oversample: int = 4) -> Image.Image:
    """Where the objects of `draw` are, whatever their colour: an 8-bit picture, 255 inside. Draws from `rng` as `draw` does."""
    return render("L", scene.shape, layout(scene, rng), (width, height), oversample, 0, 255)


def render(mode: str, shape: str, where: tuple, size: tuple[int, int], oversample: int, back: Ink, fill: Ink) -> Image.Image:
    """Shapes of one radius at some centres (`where`, see `layout`), filled, on an even background."""
    radius, centres = where
    w, h = size[0] * oversample, size[1] * oversample
    image = Image.new(mode, (w, h), back)
    canvas = ImageDraw.Draw(image)
    r = radius * min(w, h)
    for cx, cy in centres:
        x, y = cx * w, cy * h
        if shape == "circle":
            canvas.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        else:
            canvas.polygon(outline(shape, x, y, r), fill=fill)
    return image.resize(size, Image.Resampling.BOX)


def vocabulary() -> list[str]:
    """Every word a prompt of this world may hold, and spare ones for what is trained on top of it."""
    words = "a an one two three on in of the at with background left right top bottom center middle shape shapes".split()
    words += [*COLORS, *SHAPES, *(shape + "s" for shape in SHAPES), *SIZES, *SPARE_WORDS, "hearts", "rings", "grey"]
    return list(dict.fromkeys(words))
