"""Mended pictures: laid out as what the model drew, and as the world of shapes draws that."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter

import stepwell
from training.grader import grade
from training.latents import decode, encode, mended
from training.mending import Mended, mend
from training.shapes import COLORS, Caption, Scene, describe, draw, is_held_out, render, sample_scene


def spoilt(image: Image.Image, rng: random.Random) -> Image.Image:
    """Blurred, with edges that wave and colours that are not even."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2))).astype(np.float32)
    rows = np.arange(pixels.shape[0])
    shift = np.round(1.5 * np.sin(rows / 4 + rng.random() * 6)).astype(int)
    waved = np.stack([np.roll(row, by, axis=0) for row, by in zip(pixels, shift, strict=True)])
    waved += np.random.default_rng(rng.randrange(1000)).normal(0, 6, waved.shape)
    return Image.fromarray(waved.clip(0, 255).astype(np.uint8))


def found(image: Image.Image, caption: Caption) -> Mended:
    fit = mend(image, caption)
    assert fit is not None
    return fit


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (128, 96)])
def test_what_is_right_stays_and_what_is_spoilt_comes_right(size: tuple[int, int]) -> None:
    rng = random.Random(1)
    for _ in range(40):
        scene = sample_scene(rng)
        caption = describe(scene, rng, full=True)
        image = draw(scene, rng, *size)
        for drawn, least in ((image, 0.85), (spoilt(image, rng), 0.6)):
            fit = found(drawn, caption)
            assert (fit.shape, fit.color, fit.background) == (scene.shape, scene.color, scene.background)
            assert fit.overlap > least
            again = fit.draw(*size)
            assert grade(again, caption)["all"] or size == (64, 64)  # the grader can't tell all small stars' sizes
            away = np.abs(np.asarray(again).astype(float) - np.asarray(image)).max(axis=2) > 60
            assert away.mean() < 0.06
            assert np.asarray(fit.silhouette(*size)).mean() > 2


def test_what_a_prompt_leaves_open_is_read_from_the_picture() -> None:
    rng = random.Random(2)
    for _ in range(40):
        scene = sample_scene(rng)
        fit = found(spoilt(draw(scene, rng, 128, 128), rng), Caption("", count=scene.count, place=scene.place))
        assert (fit.color, fit.background) == (scene.color, scene.background)
        assert fit.shape == scene.shape


def test_a_prompt_has_the_last_word() -> None:
    """Ovals that touch, of a size between two: three large circles, apart."""
    pixels = Image.new("RGB", (128, 128), COLORS["white"])
    for x in (22, 64, 106):
        blob = render("L", "circle", (0.19, [(0.5, 0.5)]), (128, 128), 2, 0, 255).resize((128, 90))
        pixels.paste(Image.new("RGB", blob.size, COLORS["orange"]), (x - 64, 19), blob)
    caption = Caption("", 3, "circle", "red", "white", "large", "center")
    assert not grade(pixels, caption)["all"]
    assert grade(found(pixels, caption).draw(128, 128), caption)["all"]


def test_nothing_is_made_of_pictures_without_a_layout_or_held_out() -> None:
    rng = random.Random(3)
    blank = Image.new("RGB", (64, 64), COLORS["gray"])
    corner = render("RGB", "circle", (0.1, [(0.05, 0.05)]), (64, 64), 2, COLORS["gray"], COLORS["red"])
    caption = Caption("", 1, "circle", "red", "gray", None, "center")
    assert not is_held_out("red", "circle", "gray")
    assert mend(blank, caption) is None and mend(corner, caption) is None
    scene: Scene = sample_scene(rng, held_out=True)
    assert mend(draw(scene, rng, 64, 64), Caption("", count=scene.count)) is None


def test_painted_latents_come_back_mended() -> None:
    """Beside what can't be mended: latents of a blank picture."""
    rng = random.Random(4)
    folder = Path(stepwell.__file__).parent / "zoo" / "tiny-flux"
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scenes = [sample_scene(rng) for _ in range(6)]
    captions = [describe(scene, rng, full=True) for scene in scenes]
    images = [spoilt(draw(scene, rng, 128, 96), rng) for scene in scenes]
    images[2] = Image.new("RGB", (128, 96), COLORS["gray"])
    latents = encode(vae, [np.asarray(image) for image in images])
    assert latents.shape == (6, 8 * 6, 64)
    kept, clean, silhouettes = mended(vae, latents, captions, (128, 96), 2)
    assert kept == [0, 1, 3, 4, 5]
    assert clean.shape == silhouettes.shape == (5, 48, 64)
    for image, row in zip(decode(vae, clean, 128, 96), kept, strict=True):
        assert grade(image, captions[row])["all"]
        assert image.size == (128, 96)
    covered = 1 - (silhouettes == 0).float().mean(dim=(1, 2))
    assert (covered > 0.02).all() and (covered < 0.6).all()
    kept, clean, silhouettes = mended(vae, latents[2:3], captions[2:3], (128, 96), 2)
    assert (kept, len(clean), len(silhouettes)) == ([], 0, 0)
