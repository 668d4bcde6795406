"""Frames to files people can play, and their pictures: H.264 in MP4 by PyAV, GIF, WebP and JPEG by Pillow, in this process."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.errors import InvalidRequest
from stepwell.media.images import (
    FORMATS,
    Parameters,
    as_given,
    encode_image,
    exif_of,
    read_parameters,
    save_image,
    to_image,
    write_whole,
)
from stepwell.types import Frames

if TYPE_CHECKING:
    import numpy as np
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from PIL.Image import Image

VIDEO_SUFFIXES = (".mp4", ".gif", ".webp", ".png")  # .png is a folder of frames
MAX_FPS = 240
# browsers take a frame of less than 2 hundredths of a second in a GIF, or of 10 ms or less in any picture, for one of 100 ms
FASTEST = {".gif": 50, ".webp": 90}
MAX_METADATA_CHARS = 1 << 20
# x264's bytes depend on how many threads share the work, so it is told, whatever the machine has.
THREADS = 4
NTSC = {rate: Fraction(rate * 1000, 1001) for rate in (24, 30, 48, 60, 120)}
BT709 = 1  # of primaries, of transfer and of matrix: all three are number 1 in ITU-T H.273
VIDEO_RANGE, FULL_RANGE = 1, 2  # libav's numbers for 16 to 235 and for 0 to 255


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file holds: sizes in pixels, `fps` in frames per second."""

    width: int
    height: int
    frames: int
    fps: float
    seconds: float


def encode_mp4(frames: Frames, fps: float, metadata: Mapping[str, object] = {}, quality: int = 23) -> bytes:
    """An MP4 file: H.264, yuv420p, BT.709, constant rate, and its index first so that it plays while it loads.

    yuv420p has even sizes only: an odd last column or row is repeated. `metadata` goes into the comment tag as JSON.
    `quality` is x264's CRF, 1 (best) to 51. The same input gives the same bytes. Raises InvalidRequest.
    """
    import av

    _check(frames)
    rate = _rate(fps)
    if not 1 <= quality <= 51:
        raise InvalidRequest(f"quality = {quality}: must be a CRF from 1 (best) to 51", param="quality")
    file = io.BytesIO()
    # to move the index to the front, the muxer opens what it has written a second time, to read it
    container = av.open(
        file,
        "w",
        format="mp4",
        container_options={"movflags": "+faststart", "fflags": "+bitexact"},  # bitexact: no dates, no version
        io_open=lambda url, flags, options: io.BytesIO(file.getvalue()),
    )
    with container:
        if metadata:
            # json.dumps leaves lone surrogates as they are; backslashreplace writes them as JSON does
            text = json.dumps(dict(metadata), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
            container.metadata["comment"] = text
        stream = container.add_stream(
            "libx264", rate=rate, options={"crf": str(quality), "x264-params": f"asm={_instructions()}"}
        )
        stream.width, stream.height = _even(frames.width), _even(frames.height)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = 1 / rate
        codec.thread_count, codec.thread_type = THREADS, "FRAME"
        codec.color_range = VIDEO_RANGE
        codec.color_primaries = codec.color_trc = codec.colorspace = BT709
        for index, frame in enumerate(_yuv(frames)):
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def encode_gif(frames: Frames, fps: float, metadata: Mapping[str, object] = {}) -> bytes:
    """A GIF that repeats for ever. GIF counts hundredths of a second, and viewers slow down what is shorter than two.

    `metadata` goes into its comment as JSON."""
    _check(frames)
    comment = {"comment": json.dumps(dict(metadata)).encode()} if metadata else {}
    durations_ms = _durations_ms(frames.count, _rate(fps), unit_ms=10, shortest_ms=20)
    return _animation(_pictures(frames), "GIF", durations_ms, **comment)


def encode_webp_animation(frames: Frames, fps: float, metadata: Mapping[str, object] = {}, quality: int = 80) -> bytes:
    """A lossy animated WebP that repeats for ever; `quality` is 0 to 100. `metadata` goes into its EXIF comment as JSON."""
    _check(frames)
    durations_ms = _durations_ms(frames.count, _rate(fps), unit_ms=1, shortest_ms=1)
    return _animation(_pictures(frames), "WEBP", durations_ms, quality=quality, exif=exif_of(metadata, "WEBP"))


def preview(frames: Frames, seconds: float, max_frames: int = 32, max_side: int = 256) -> bytes:
    """A small animated WebP that takes `seconds` to show evenly spaced frames of at most `max_side` pixels each way."""
    _check(frames)
    pictures = _thumbnails(frames, max_frames, max_side)
    rate = Fraction(len(pictures)) / Fraction(seconds)
    return _animation(iter(pictures), "WEBP", _durations_ms(len(pictures), rate, unit_ms=1, shortest_ms=1), quality=60)


def save(frames: Frames, parameters: Parameters, path: Path) -> Path:
    """Write a picture or a video, parameters inside; the suffix decides the format. Returns where it is.

    The frames of `clip.png` are `clip/0000.png`, `clip/0001.png` and so on, in place of those of an earlier clip. Files
    appear whole or not at all. Raises InvalidRequest.
    """
    suffix, about = path.suffix.lower(), asdict(parameters)
    check_name(path.name, frames.count, parameters.fps)
    if suffix == ".mp4":
        write_whole(path, encode_mp4(frames, parameters.fps, about))
    elif suffix == ".gif":
        write_whole(path, encode_gif(frames, parameters.fps, about))
    elif frames.count == 1:
        save_image(frames, parameters, path)
    elif suffix == ".webp":
        write_whole(path, encode_webp_animation(frames, parameters.fps, about))
    else:
        return _save_frames(frames, parameters, path.with_suffix(""))
    return path


def check_name(name: str, count: int = 1, fps: float = 0, *, is_video: bool = True) -> None:
    """Raise InvalidRequest for a file name that says no format which so many frames, of a video or a picture, can have, or
    none that is ever shown at so many frames a second."""
    suffix, of_pictures = Path(name).suffix.lower(), (*FORMATS,) if count == 1 else ()
    of_videos = VIDEO_SUFFIXES if is_video else ()
    if suffix not in (*of_pictures, *of_videos):
        ways = {"a picture's": of_pictures, "a video's": of_videos}
        ends = "; ".join(f"{whose} name ends in {', '.join(known)}" for whose, known in ways.items() if known)
        raise InvalidRequest(f"output_file_name = {name!r}: {ends}", param="output_file_name")
    if count > 1 and fps > (most := FASTEST.get(suffix, MAX_FPS)):
        raise InvalidRequest(
            f"fps = {fps}: viewers show {suffix} at up to {most} frames a second; give fewer, or a name in .mp4", param="fps"
        )


def _save_frames(frames: Frames, parameters: Parameters, folder: Path) -> Path:
    for index in range(frames.count):
        write_whole(folder / f"{index:04}.png", encode_image(_frame(frames, index), parameters))
    last = frames.count
    while (stale := folder / f"{last:04}.png").exists():  # of an earlier and longer clip
        stale.unlink()
        last += 1
    return folder


def parameters_in(path: Path) -> dict[str, Any]:
    """The parameters a picture or a video carries, for `--from`."""
    try:
        with path.open("rb") as file:
            if file.read(12)[4:8] != b"ftyp":
                return read_parameters(path)
            file.seek(0)
            return as_given(read_metadata(file.read()))
    except OSError as error:
        raise InvalidRequest(f"from = {str(path)!r} can't be read: {error.strerror}", param="from") from None


def thumbnail(frames: Frames, max_side: int = 256) -> bytes:
    """The first frame as a WebP of at most `max_side` pixels each way; smaller frames keep their size."""
    _check(frames)
    image, buffer = to_image(frames), io.BytesIO()
    image.thumbnail((max_side, max_side))
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def spritesheet(frames: Frames, columns: int = 4, max_tiles: int = 16, tile_side: int = 128) -> bytes:
    """A JPEG of evenly spaced frames, first and last among them, row by row.

    A tile's longer side is `tile_side` pixels, or the frame's own where that is less.
    """
    from PIL import Image

    _check(frames)
    if min(columns, max_tiles, tile_side) < 1:
        raise ValueError(f"columns = {columns}, max_tiles = {max_tiles}, tile_side = {tile_side}: must be positive")
    tiles = _thumbnails(frames, max_tiles, tile_side)
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def read_metadata(data: bytes) -> dict[str, Any]:
    """What `encode_mp4` was given as `metadata`. Raises InvalidRequest for what is no MP4 or carries none."""
    with _opened(data, "from") as container:
        text = container.metadata.get("comment", "")
    try:
        values = json.loads(text) if len(text) <= MAX_METADATA_CHARS else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InvalidRequest("from: this video carries no parameters of Stepwell", param="from")
    return values


def probe(data: bytes) -> VideoInfo:
    """What an MP4 file holds. Raises InvalidRequest for anything else."""
    with _opened(data, "video") as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        # a fragmented file has no count in its index
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        fps = float(stream.average_rate or 0) or (count / seconds if seconds else 0.0)
        return VideoInfo(width=codec.width, height=codec.height, frames=count, fps=fps, seconds=seconds)


@contextmanager
def _opened(data: bytes, param: str) -> Iterator[InputContainer]:
    """An MP4 with a video stream, and nothing that libav would guess to be something else."""
    import av

    try:
        with av.open(io.BytesIO(data), "r", format="mp4", metadata_errors="replace") as container:
            streams = container.streams.video
            if not streams or streams[0].codec_context is None:
                raise InvalidRequest(f"{param}: this MP4 holds no video, or one that nothing here can play", param=param)
            yield container
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{param}: not an MP4 video ({reason})", param=param) from None


def _check(frames: Frames) -> None:
    """Frames come from the engine: what is wrong here is a bug and nobody's request."""
    expected = frames.count * frames.height * frames.width * 3
    if min(frames.count, frames.height, frames.width) < 1 or len(frames.data) != expected:
        shape = f"{frames.count} × {frames.height} × {frames.width} × 3"
        raise ValueError(f"{len(frames.data)} bytes are not {shape} pixels")


def _rate(fps: float) -> Fraction:
    """Frames per second as the fraction that is meant: 29.97 is 30000/1001."""
    if not 0 < fps <= MAX_FPS:  # false for nan too
        raise InvalidRequest(f"fps = {fps}: must be above 0 and at most {MAX_FPS}", param="fps")
    near = NTSC.get(round(fps))
    if near is not None and abs(fps - near) < 0.001:
        return near
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))


def _instructions() -> str:
    """The instruction sets x264 may use: not AVX-512, whose macroblock tree reads memory that nobody has written.

    The same frames would give files of other bytes, and now and then of twice the size. AVX2 gives the right ones.
    """
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read(8192)  # the first processor's; making the text of hundreds takes the kernel a while
    except OSError:
        flags = ""
    return "avx2" if "avx512" in flags and "avx2" in flags else "auto"


def _even(side: int) -> int:
    return side + side % 2


def _array(frames: Frames) -> np.ndarray[Any, np.dtype[np.uint8]]:
    import numpy as np

    return np.frombuffer(frames.data, np.uint8).reshape(frames.count, frames.height, frames.width, 3)


def _yuv(frames: Frames) -> Iterator[VideoFrame]:
    """The frames as x264 takes them: full-range RGB to BT.709 yuv420p in video range."""
    import numpy as np
    from av.video.frame import VideoFrame
    from av.video.reformatter import Interpolation

    # swscale's quick paths round coarsely and differ from one processor to the next
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.BITEXACT
    padding = ((0, frames.height % 2), (0, frames.width % 2), (0, 0))
    for pixels in _array(frames):
        even = np.pad(pixels, padding, mode="edge") if frames.height % 2 or frames.width % 2 else pixels
        yield VideoFrame.from_ndarray(even, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=BT709,
            src_color_range=FULL_RANGE,
            dst_color_range=VIDEO_RANGE,
            interpolation=exact,
        )


def _frame(frames: Frames, index: int) -> Frames:
    size = frames.height * frames.width * 3
    return Frames(frames.data[index * size : (index + 1) * size], 1, frames.height, frames.width)


def _pictures(frames: Frames) -> Iterator[Image]:
    return (to_image(_frame(frames, index)) for index in range(frames.count))


def _thumbnails(frames: Frames, most: int, side: int) -> list[Image]:
    """Evenly spaced frames, first and last among them, of at most `side` pixels each way."""
    count = min(frames.count, most)
    pictures = [to_image(_frame(frames, round(i * (frames.count - 1) / max(1, count - 1)))) for i in range(count)]
    for picture in pictures:
        picture.thumbnail((side, side))
    return pictures


def _durations_ms(count: int, rate: Fraction, unit_ms: int, shortest_ms: int) -> list[int]:
    """How long each frame shows, in whole units, so that rounding never adds up."""
    ends = [round(i * 1000 / rate / unit_ms) * unit_ms for i in range(count + 1)]
    return [max(shortest_ms, stop - start) for start, stop in pairwise(ends)]


def _animation(pictures: Iterator[Image], format: str, durations_ms: list[int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    first = next(pictures)
    first.save(buffer, format, save_all=True, append_images=pictures, duration=durations_ms, loop=0, **options)
    return buffer.getvalue()
