"""Video files, decoded again by libav: every frame there, in its colours, on time, with what it was made from inside."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from stepwell.errors import InvalidRequest
from stepwell.media.video import (
    VideoInfo,
    encode_gif,
    encode_mp4,
    encode_webp_animation,
    probe,
    read_metadata,
    spritesheet,
    thumbnail,
)
from stepwell.types import Frames

Pixels = np.ndarray  # uint8, count × height × width × 3


def moving_square(count: int, height: int, width: int) -> Frames:
    """A bright square that crosses a gradient: motion, edges and smooth parts, but no edge in colour, which 4:2:0 blurs."""
    rows, columns = np.mgrid[0:height, 0:width]
    background = np.stack([70 + rows * 50 // height, 60 + columns * 70 // width, 110 - rows * 40 // height], axis=-1)
    pixels = np.repeat(background[None].astype(np.uint8), count, axis=0)
    side = max(1, min(height, width) // 3)
    for index in range(count):
        left = (width - side) * index // max(1, count - 1)
        pixels[index, height // 3 : height // 3 + side, left : left + side] = (230, 220, 225)
    return Frames(pixels.tobytes(), count, height, width)


def plain(colour: tuple[int, int, int], count: int = 3, height: int = 64, width: int = 64) -> Frames:
    return Frames(bytes(colour) * (count * height * width), count, height, width)


def array(frames: Frames) -> Pixels:
    return np.frombuffer(frames.data, np.uint8).reshape(frames.count, frames.height, frames.width, 3)


def decode(data: bytes) -> Pixels:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other.astype(float)) ** 2))))


def boxes(data: bytes) -> list[str]:
    """The names of an MP4's outermost boxes, in order."""
    names, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        names.append(data[at + 4 : at + 8].decode("ascii"))
        assert size >= 8
        at += size
    assert at == len(data)
    return names


# --- MP4 ---

RATES = {8: Fraction(8), 24: Fraction(24), 29.97: Fraction(30000, 1001), 23.976: Fraction(24000, 1001), 12.5: Fraction(25, 2)}


@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize(
    ("count", "height", "width"), [(1, 64, 64), (17, 64, 96), (5, 63, 65), (4, 64, 65), (4, 63, 64), (81, 48, 48)]
)
def test_an_mp4_decodes_to_the_same_frames_on_time(fps: float, count: int, height: int, width: int) -> None:
    frames = moving_square(count, height, width)
    data = encode_mp4(frames, fps)
    assert boxes(data)[0] == "ftyp" and boxes(data).index("moov") < boxes(data).index("mdat")
    with av.open(io.BytesIO(data)) as container:
        (stream,) = container.streams
        assert isinstance(stream, av.VideoStream)
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.profile) == ("h264", "yuv420p", "High")
        assert (stream.frames, stream.average_rate, stream.guessed_rate) == (count, RATES[fps], RATES[fps])
        assert (codec.color_range, codec.color_primaries, codec.color_trc, codec.colorspace) == (1, 1, 1, 1)
        decoded = list(container.decode(video=0))
        times = [frame.pts * frame.time_base for frame in decoded if frame.pts is not None and frame.time_base is not None]
    assert times == [index / RATES[fps] for index in range(count)]
    even_height, even_width = height + height % 2, width + width % 2
    shown = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert shown.shape == (count, even_height, even_width, 3)
    assert psnr(shown[:, :height, :width], array(frames)) > 30
    assert probe(data) == VideoInfo(even_width, even_height, count, float(RATES[fps]), pytest.approx(count / float(RATES[fps])))


def test_odd_sizes_repeat_the_last_row_and_column() -> None:
    frames = moving_square(3, 63, 65)
    shown = decode(encode_mp4(frames, 24, quality=5)).astype(int)
    assert np.abs(shown[:, 63] - shown[:, 62]).mean() < 4 and np.abs(shown[:, :, 65] - shown[:, :, 64]).mean() < 4
    assert psnr(shown[:, :63, :65], array(frames)) > 38


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (1, 200), (16, 16)])
def test_small_frames(height: int, width: int) -> None:
    frames = moving_square(2, height, width)
    info = probe(encode_mp4(frames, 24))
    assert (info.height, info.width, info.frames) == (height + height % 2, width + width % 2, 2)


@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 60), (90, 90, 90)]
)
def test_colours_are_bt709_in_video_range(colour: tuple[int, int, int]) -> None:
    data = encode_mp4(plain(colour), 24, quality=1)
    red, green, blue = (value / 255 for value in colour)
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = [16 + 219 * light, 128 + 224 * (blue - light) / 1.8556, 128 + 224 * (red - light) / 1.5748]
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        yuv = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[8, 8] for plane in frame.planes]
    assert np.abs(np.array(yuv, float) - expected).max() <= 1.5
    assert np.abs(decode(data).astype(int) - colour).max() <= 4


def test_quality_is_a_crf() -> None:
    frames = moving_square(9, 96, 96)
    sizes = [len(encode_mp4(frames, 24, quality=quality)) for quality in (1, 23, 40)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[2]


def test_an_mp4_plays_from_its_first_bytes() -> None:
    """The index is at the front and points right: half of the file gives the first frames."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8)
    frames = Frames(noise.tobytes(), 24, 64, 64)
    data = encode_mp4(frames, 24)
    whole, half = decode(data), []
    with av.open(io.BytesIO(data[: len(data) // 2])) as container, contextlib.suppress(av.FFmpegError):  # where the half ends
        half.extend(frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    assert len(half) >= 4 and (half[0] == whole[0]).all()


def test_the_same_frames_make_the_same_bytes() -> None:
    """Whatever was in the memory that an encoder takes: glibc fills it with another byte in each process."""
    code = """
import hashlib, sys
from tests.media.test_video import moving_square
from stepwell.media.video import encode_mp4
for size in ((25, 240, 416), (9, 63, 97)):
    print(hashlib.sha256(encode_mp4(moving_square(*size), 24, {"seed": "7"})).hexdigest())
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"MALLOC_PERTURB_": fill}, capture_output=True, text=True, check=True
        ).stdout
        for fill in ("", "85", "255")
    ]
    assert len(runs[0].split()) == 2 and len(set(runs)) == 1
    here = hashlib.sha256(encode_mp4(moving_square(25, 240, 416), 24, {"seed": "7"})).hexdigest()
    assert here == runs[0].split()[0]


# --- what is wrong ---


@pytest.mark.parametrize("fps", [0, -1, 0.0, float("nan"), float("inf"), 241, -0.5])
def test_a_wrong_rate(fps: float) -> None:
    frames = plain((1, 2, 3))
    for encode in (encode_mp4, encode_gif, encode_webp_animation):
        with pytest.raises(InvalidRequest) as caught:
            encode(frames, fps)
        assert caught.value.param == "fps" and str(fps) in caught.value.message


@pytest.mark.parametrize("quality", [0, -1, 52])
def test_a_wrong_quality(quality: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode_mp4(plain((1, 2, 3)), 24, quality=quality)
    assert caught.value.param == "quality"


@pytest.mark.parametrize(
    "frames", [Frames(b"", 0, 64, 64), Frames(bytes(10), 1, 2, 2), Frames(b"", 1, 0, 5), Frames(bytes(24), 1, 2, 2)]
)
def test_frames_that_are_none(frames: Frames) -> None:
    for call in (
        lambda: encode_mp4(frames, 24),
        lambda: encode_gif(frames, 24),
        lambda: thumbnail(frames),
        lambda: spritesheet(frames),
    ):
        with pytest.raises(ValueError, match="bytes are not"):
            call()


# --- metadata ---


@pytest.mark.parametrize(
    "metadata",
    [
        {"prompt": "a red circle", "seed": "7"},
        {"prompt": "Ein Käse 日本語 🎉 مرحبا \u202e\u200d", "seed": "7"},
        {"prompt": "quotes \" ' \\ and\nlines\r\n\t\0 nul <xml> &amp; %s {}"},
        {"prompt": "a lone surrogate \ud800 and \udfff"},
        {"prompt": "long " * 6_400, "ключ": "значение"},
        {"prompt": "", "": ""},
        {"seed": 7, "scale": 1.5, "nothing": None, "list": [1, 2]},
    ],
)
def test_metadata_round_trip(metadata: dict[str, object]) -> None:
    data = encode_mp4(plain((9, 9, 9)), 24, metadata)
    assert read_metadata(data) == metadata
    assert boxes(data).index("moov") < boxes(data).index("mdat") and len(decode(data)) == 3


def test_metadata_is_where_other_tools_look() -> None:
    with av.open(io.BytesIO(encode_mp4(plain((9, 9, 9)), 24, {"prompt": "Käse"}))) as container:
        assert json.loads(container.metadata["comment"]) == {"prompt": "Käse"}
        assert not {"creation_time", "encoder", "date"} & set(container.metadata)


def with_comment(text: str) -> bytes:
    """An MP4 of somebody else's, with any text as its comment."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        container.metadata["comment"] = text
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("text", ["", "shot on my phone", "[1, 2]", "null", '"text"', "{", "[" * 100_000, '{"a": ' * 100_000])
def test_other_peoples_comments_are_no_metadata(text: str) -> None:
    with pytest.raises(InvalidRequest, match="no parameters of Stepwell"):
        read_metadata(with_comment(text))


def test_metadata_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match="no parameters of Stepwell"):
        read_metadata(with_comment(json.dumps({"a": "b" * (1 << 20)})))


def test_no_metadata() -> None:
    with pytest.raises(InvalidRequest, match="no parameters of Stepwell"):
        read_metadata(encode_mp4(plain((9, 9, 9)), 24))


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_what_is_no_video_is_refused() -> None:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    wrong = [
        b"",
        b"\0",
        b"\0" * 1000,
        b"ftyp" * 100,
        os.urandom(5000),
        png.getvalue(),
        encode_gif(plain((1, 2, 3)), 8),
        audio_only(),
    ]
    wrong += [b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n"]
    for data, (call, param) in itertools.product(wrong, [(read_metadata, "from"), (probe, "video")]):
        with pytest.raises(InvalidRequest) as caught:
            call(data)
        assert caught.value.param == param


def test_broken_files_are_read_or_refused_and_nothing_else() -> None:
    good, chance = encode_mp4(moving_square(5, 48, 48), 24, {"prompt": "x"}), random.Random(0)
    read = refused = 0
    for round in range(600):
        broken = bytearray(good[: chance.randrange(len(good))] if round % 3 == 0 else good)
        for _ in range(chance.randrange(1, 8)):
            if broken:
                broken[chance.randrange(min(len(broken), 1200))] = chance.randrange(256)
        for call in (read_metadata, probe):
            try:
                call(bytes(broken))
                read += 1
            except InvalidRequest:
                refused += 1
    assert read > 100 and refused > 100


# --- GIF, WebP, pictures of a video ---


@pytest.mark.parametrize("fps", [8, 24, 29.97])
@pytest.mark.parametrize(("count", "height", "width"), [(1, 64, 64), (17, 63, 65)])
def test_a_gif(fps: float, count: int, height: int, width: int) -> None:
    frames = moving_square(count, height, width)
    with Image.open(io.BytesIO(encode_gif(frames, fps))) as image:
        assert (image.format, image.size, getattr(image, "n_frames", 1)) == ("GIF", (width, height), count)
        assert image.info["loop"] == 0
        total = 0
        for index in range(count):
            image.seek(index)
            assert psnr(np.asarray(image.convert("RGB")), array(frames)[index]) > 28
            total += image.info["duration"]
    assert abs(total - 1000 * count / fps) <= 5.1


@pytest.mark.parametrize("fps", [8, 24, 29.97])
@pytest.mark.parametrize(("count", "height", "width"), [(1, 64, 64), (17, 63, 65)])
def test_a_webp(fps: float, count: int, height: int, width: int) -> None:
    frames = moving_square(count, height, width)
    with Image.open(io.BytesIO(encode_webp_animation(frames, fps))) as image:
        assert (image.format, image.size, getattr(image, "n_frames", 1)) == ("WEBP", (width, height), count)
        total = 0
        for index in range(count):
            image.seek(index)
            image.load()
            assert psnr(np.asarray(image.convert("RGB")), array(frames)[index]) > 28
            total += image.info["duration"]
        assert count == 1 or (abs(total - 1000 * count / fps) <= 1 and image.info["loop"] == 0)


def test_a_gif_is_never_faster_than_viewers_play() -> None:
    with Image.open(io.BytesIO(encode_gif(moving_square(5, 32, 32), 120))) as image:
        assert image.info["duration"] == 20


@pytest.mark.parametrize("encode", [encode_mp4, encode_gif, encode_webp_animation])
def test_a_still_video(encode: object) -> None:
    assert callable(encode) and len(encode(plain((9, 99, 199), count=10), 10)) > 50


@pytest.mark.parametrize(
    ("height", "width", "side", "size"),
    [
        (480, 832, 256, (256, 148)),
        (832, 480, 256, (148, 256)),
        (100, 100, 256, (100, 100)),
        (64, 64, 16, (16, 16)),
        (1, 999, 9, (9, 1)),
    ],
)
def test_a_thumbnail_is_the_first_frame(height: int, width: int, side: int, size: tuple[int, int]) -> None:
    pixels = np.zeros((2, height, width, 3), np.uint8)
    pixels[0], pixels[1] = (200, 40, 40), (40, 40, 200)
    with Image.open(io.BytesIO(thumbnail(Frames(pixels.tobytes(), 2, height, width), side))) as image:
        assert (image.format, image.size) == ("WEBP", size)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - (200, 40, 40)).max() < 12


@pytest.mark.parametrize(
    ("count", "options", "size", "shown"),
    [
        (81, {}, (512, 296), [round(i * 80 / 15) for i in range(16)]),
        (16, {}, (512, 296), list(range(16))),
        (5, {}, (512, 148), [0, 1, 2, 3, 4]),
        (1, {}, (128, 74), [0]),
        (81, {"columns": 2, "max_tiles": 3, "tile_side": 64}, (128, 74), [0, 40, 80]),
        (9, {"max_tiles": 1}, (128, 74), [0]),
    ],
)
def test_a_spritesheet(count: int, options: dict[str, int], size: tuple[int, int], shown: list[int]) -> None:
    pixels = np.zeros((count, 120, 208, 3), np.uint8)
    for index in range(count):
        pixels[index] = 3 * index
    with Image.open(io.BytesIO(spritesheet(Frames(pixels.tobytes(), count, 120, 208), **options))) as image:
        assert (image.format, image.size) == ("JPEG", size)
        sheet = np.asarray(image.convert("L")).astype(int)
    columns = min(options.get("columns", 4), len(shown))
    side = options.get("tile_side", 128)
    height = round(120 * side / 208)
    for tile, index in enumerate(shown):
        top, left = tile // columns * height, tile % columns * side
        assert abs(sheet[top + height // 2, left + side // 2] - 3 * index) <= 3, (tile, index)


def test_a_spritesheet_needs_room() -> None:
    for options in ({"columns": 0}, {"max_tiles": 0}, {"tile_side": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            spritesheet(plain((1, 2, 3)), **options)
