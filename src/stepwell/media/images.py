"""Pictures to files and back: PNG, JPEG and WebP that carry the parameters they were made with."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.cache.params import as_options
from stepwell.config.paths import reason
from stepwell.errors import InvalidRequest
from stepwell.types import CacheParams, Frames, ModelInfo, Output, Request

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
METADATA_KEY = "stepwell"
USER_COMMENT = 0x9286  # the EXIF tag for free text
EXIF_BYTES = 60_000  # a JPEG segment ends at 64 KiB
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What repeats one picture. Names are those of the flags."""

    model_path: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    true_cfg_scale: float
    seed: int
    max_sequence_length: int
    num_frames: int
    fps: int
    strength: float | None
    cache: CacheParams | None
    dit_precision: str
    vae_precision: str
    text_encoder_precisions: tuple[str, ...]

    @classmethod
    def of(cls, request: Request, output: Output, model: ModelInfo) -> Parameters:
        s = request.sampling
        assert s.width and s.height and s.num_inference_steps and s.max_sequence_length
        assert s.guidance_scale is not None and s.true_cfg_scale is not None
        return cls(
            model_path=model.id,
            prompt=request.prompt,
            negative_prompt=s.negative_prompt,
            width=s.width,
            height=s.height,
            num_inference_steps=s.num_inference_steps,
            guidance_scale=s.guidance_scale,
            guidance_scale_2=s.guidance_scale_2,
            true_cfg_scale=s.true_cfg_scale,
            seed=output.seed,
            max_sequence_length=s.max_sequence_length,
            num_frames=s.num_frames or 1,
            fps=s.fps or 1,
            strength=None if request.image is None else s.strength,
            cache=s.cache,
            dit_precision=model.dit_precision,
            vae_precision=model.vae_precision,
            text_encoder_precisions=model.text_encoder_precisions,
        )


def to_image(frames: Frames) -> Image:
    """The first frame as a Pillow picture."""
    from PIL import Image

    return Image.frombytes("RGB", (frames.width, frames.height), frames.data[: frames.width * frames.height * 3])


def encode_image(frames: Frames, parameters: Parameters, format: str = "PNG", quality: int = 95) -> bytes:
    """A picture file's bytes, parameters inside: a PNG text chunk, or an EXIF comment. `quality` is for JPEG and WebP."""
    from PIL.PngImagePlugin import PngInfo

    image, buffer = to_image(frames), io.BytesIO()
    if format == "PNG":
        info = PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(asdict(parameters), ensure_ascii=False))
        image.save(buffer, "PNG", pnginfo=info)
    else:
        image.save(buffer, format, quality=quality, exif=exif_of(asdict(parameters), format))
    return buffer.getvalue()


def exif_of(parameters: Mapping[str, object], format: str) -> Exif:
    """Parameters as an EXIF comment, empty where there are none, or more than it holds."""
    from PIL import Image

    exif, text = Image.Exif(), json.dumps(dict(parameters))  # EXIF text is ASCII
    if len(text) >= EXIF_BYTES:
        logger.warning("the prompt is too long for a %s file's metadata; a PNG would carry it", format)
    elif parameters:
        exif[USER_COMMENT] = text
    return exif


def encode_png(frames: Frames) -> bytes:
    """The first frame as a PNG file, without parameters."""
    buffer = io.BytesIO()
    to_image(frames).save(buffer, "PNG")
    return buffer.getvalue()


def decode_image(content: bytes, name: str = "") -> Frames:
    """A PNG, JPEG or WebP file from a source that is trusted, upright, as one RGB frame. Raises InvalidRequest naming `image`,
    and the file by its `name`.

    What strangers send goes through `media.uploads` instead."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP"]) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        which = f"image = {name!r}" if name else "image"
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"  # it would name a buffer in memory
        raise InvalidRequest(f"{which}: not a PNG, JPEG or WebP picture{why}", param="image") from None
    rgb = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return Frames(rgb.tobytes(), 1, rgb.height, rgb.width)


def load_image(source: str | Path) -> Frames:
    """A picture from a file, or from its URL, as one RGB frame. Raises InvalidRequest naming `image`."""
    if isinstance(source, str) and source.split(":", 1)[0].lower() in ("http", "https", "data"):
        from stepwell.media.fetch import FetchPolicy, read_url

        return decode_image(read_url(source, FetchPolicy(allow_http=True), "image"))
    try:
        content = Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"image = {str(source)!r} can't be read: {reason(error)}", param="image") from None
    return decode_image(content, str(source))


def save_image(frames: Frames, parameters: Parameters, path: Path) -> Path:
    """Write a picture; the suffix decides the format. The file appears whole or not at all; returns its path."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InvalidRequest(
            f"output_file_name = {path.name!r}: a picture's name ends in {', '.join(FORMATS)}", param="output_file_name"
        )
    write_whole(path, encode_image(frames, parameters, kind))
    return path


def write_whole(path: Path, content: bytes, param: str = "output_path") -> None:
    """Write through a temporary file in the same folder, so that nobody ever sees half a file. `param` is who asked for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial-{uuid.uuid4().hex}")
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be written: {reason(error)}", param=param) from None


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters a picture, an animated one too, carries, for `--from`."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP", "GIF"]) as image:
            text = image.info.get(METADATA_KEY) or image.info.get("comment") or image.getexif().get(USER_COMMENT)
    except FileNotFoundError:
        raise InvalidRequest(f"from = {str(path)!r}: no such file", param="from") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"from = {str(path)!r}: not a PNG, JPEG, WebP or GIF picture ({error})", param="from") from None
    try:
        values = json.loads(text) if isinstance(text, str | bytes) else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InvalidRequest(f"from = {str(path)!r}: this picture carries no parameters of Stepwell", param="from")
    return as_given(values)


def as_given(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters out of a file, by the names of their options."""
    known = {field.name for field in fields(Parameters)}
    cache = values.get("cache")
    options = as_options(cache) if isinstance(cache, dict) else {}
    return {**{name: value for name, value in values.items() if name in known - {"cache"} and value is not None}, **options}


def file_stem(parameters: Parameters) -> str:
    """A file name that says what is inside: the prompt's words and the seed."""
    words = "-".join(re.findall(r"\w+", parameters.prompt.lower()))[:60].strip("-")
    return f"{words or 'picture'}-{parameters.seed}"


def unused(path: Path) -> Path:
    """`path`, or the same with a number where a file is there already: made-up names never replace a picture."""
    numbered, number = path, 2
    while numbered.exists():
        numbered = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return numbered
