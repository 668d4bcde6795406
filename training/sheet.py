"""Paint the contact sheets of the README with the bundled models.

python -m training.sheet docs/tiny-flux.png docs/tiny-wan.png
"""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from stepwell import DiffGenerator

PROMPTS = (
    "a small red circle on a white background",
    "two green triangles on a black background",
    "a purple star at the top",
    "a large blue square on a gray background",
    "three orange circles on the left on a cyan background",
    "a black triangle on the right on a pink background",
    "three white stars at the bottom on a purple background",
    "a yellow shape",
)
TILE, COLUMNS, LABEL = 128, 4, 16
CLIPS = (
    "a large red circle moving right on a white background",
    "a large blue square moving up slowly on a yellow background",
    "a small green triangle moving left on a black background",
)
FRAME, EVERY = 64, 4


def paint_pictures(path: str) -> None:
    rows = -(-len(PROMPTS) // 2)
    width = 2 * (COLUMNS * (TILE + 4) + 12)
    sheet = Image.new("RGB", (width, rows * (TILE + LABEL + 8)), (232, 232, 238))
    canvas = ImageDraw.Draw(sheet)
    with DiffGenerator.from_pretrained("stepwell/tiny-flux") as g:
        for number, prompt in enumerate(PROMPTS):
            left, top = (number % 2) * (width // 2) + 6, (number // 2) * (TILE + LABEL + 8)
            canvas.text((left, top + 2), prompt, fill=(30, 30, 50))
            for column, output in enumerate(g.generate(prompt, seed=10 * number, num_outputs_per_prompt=COLUMNS)):
                sheet.paste(output.image.resize((TILE, TILE)), (left + column * (TILE + 4), top + LABEL))
    sheet.save(path, optimize=True)


def paint_clips(path: str) -> None:
    """Every fourth frame of a clip in a row."""
    with DiffGenerator.from_pretrained("stepwell/tiny-wan") as g:
        rows = [g.generate(prompt, seed=number)[0].frames[::EVERY] for number, prompt in enumerate(CLIPS)]
    sheet = Image.new("RGB", (len(rows[0]) * (FRAME + 4), len(rows) * (FRAME + 4)), (232, 232, 238))
    for row, frames in enumerate(rows):
        for column, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (2 + column * (FRAME + 4), 2 + row * (FRAME + 4)))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    paint_pictures(sys.argv[1])
    paint_clips(sys.argv[2])
