"""The process that opens strangers' pictures: alone, with hard limits on memory, processor time and files.

`uploads.PictureDecoder` runs this file by its path, so it imports the standard library and Pillow and nothing of Stepwell.
Both ways a message is 4 bytes of length (big-endian), that much JSON, and then the `bytes` bytes which the JSON announces.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import resource
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # the EXIF tag
STRIP_BYTES = 4 * 1024 * 1024
EIGHT_BITS = 1 / 257  # 65535 becomes 255


class TooManyPixels(Exception):
    """The header promises more pixels than allowed: width, height."""


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height a WebP header promises: libwebp allocates two canvases as soon as a file is opened."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 30:
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def upright(image: Image, orientation: object) -> Image:
    """The picture as its EXIF orientation (1 to 8) says it is to be seen; any other value says nothing."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Image) -> Image:
    """16-bit grey as 8-bit grey, for Pillow's own conversion clips; the value that means transparent becomes alpha."""
    from PIL import Image, ImageChops

    key, wide = image.info.get("transparency"), image.convert("I")
    grey = wide.point(lambda value: value * EIGHT_BITS + 0.5).convert("L")
    if not isinstance(key, int):
        return grey
    # two ramps, clipped to 0 ... 255: one is above 0 for all that is below the key, one for all that is above it
    below = wide.point(lambda value: value * -255 + key * 255).convert("L")
    above = wide.point(lambda value: value * 255 - key * 255).convert("L")
    return Image.merge("LA", (grey, ImageChops.lighter(below, above)))


def plain(image: Image, keep_alpha: bool) -> Image:
    """Any mode as RGB on white, or as RGBA."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = eight_bits(image)
    elif image.mode == "RGB" and isinstance(key := image.info.get("transparency"), tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # the key keeps the 16 bits which the pixels lost
    if not keep_alpha and not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    whole = image if image.mode == "RGBA" else image.convert("RGBA")
    if keep_alpha:
        return whole
    white = Image.new("RGB", whole.size, "white")
    white.paste(whole, (0, 0), whole)
    return white


def first_frame(data: bytes, kind: str, keep_alpha: bool, max_pixels: int) -> tuple[Image, object]:
    """The first frame of a file of format `kind` as RGB or RGBA, and its EXIF orientation."""
    from PIL import Image

    promised = webp_size(data) if kind == "WEBP" else None
    if promised and promised[0] * promised[1] > max_pixels:
        raise TooManyPixels(*promised)
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        if image.width * image.height > max_pixels:
            raise TooManyPixels(image.width, image.height)
        image.load()
        try:
            orientation = image.getexif().get(ORIENTATION)
        except Exception:
            orientation = None  # cameras write broken EXIF into good pictures
        flat = plain(image, keep_alpha)
        return flat.copy() if flat is image else flat, orientation  # a copy lets go of the file and libwebp's canvases


def decode(data: bytes, kind: str, keep_alpha: bool, max_pixels: int) -> Image:
    """The first frame, upright, with nothing else that the file carried."""
    return upright(*first_frame(data, kind, keep_alpha, max_pixels))


def detail(error: BaseException) -> str:
    """What Pillow says, without the addresses and bytes it likes to quote."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "its header is broken"
    text = re.sub(r"\([^()]*\)|<[^>]*>|b'[^']*'|b\"[^\"]*\"", "", str(error))
    text = "".join(letter for letter in text if letter.isascii() and letter.isprintable())
    return " ".join(text.split())[:120] or "its content is broken"


def answer(job: dict[str, Any], data: bytes, max_pixels: int) -> tuple[dict[str, Any], Image | None]:
    """The header of the reply, and the picture where there is one."""
    try:
        image = decode(data, job["kind"], job["keep_alpha"], max_pixels)
    except TooManyPixels as error:
        width, height = error.args
        return {"error": "pixels", "width": width, "height": height, "bytes": 0}, None
    except MemoryError:
        return {"error": "memory", "bytes": 0}, None
    except Exception as error:
        return {"error": "broken", "detail": detail(error), "bytes": 0}, None
    channels = len(image.getbands())
    size = image.width * image.height * channels
    return {"width": image.width, "height": image.height, "channels": channels, "bytes": size}, image


def send(out: int, header: dict[str, Any], image: Image | None = None) -> None:
    """Write a message; the pixels go in strips, for a second whole copy might not fit."""
    text = json.dumps(header).encode()
    write(out, len(text).to_bytes(4, "big") + text)
    if image is None:
        return
    rows = max(1, STRIP_BYTES // (image.width * 4))
    for top in range(0, image.height, rows):
        write(out, image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())


def write(out: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def read(count: int) -> bytes:
    """Exactly so many bytes from standard input; EOFError when the server is gone."""
    data = bytearray()
    while len(data) < count:
        piece = os.read(0, min(count - len(data), 1024 * 1024))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def warm_up(max_pixels: int) -> None:
    """Decode one picture of each format and a broken one: what Pillow imports late, it can't once no file can be opened."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # `decode` checks, with a limit of its own
    sample, exif = Image.new("RGB", (8, 8)), Image.Exif()
    exif[ORIENTATION] = 6
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        sample.save(buffer, kind, exif=exif)
        decode(buffer.getvalue(), kind, True, max_pixels)
        answer({"kind": kind, "keep_alpha": False}, buffer.getvalue()[:40], max_pixels)
    grey = Image.new("I;16", (8, 8))
    grey.info["transparency"] = 0
    plain(grey, False)


def confine(memory_bytes: int, cpu_s: int, files: int) -> None:
    """Give up, for good: memory, processor time, new files, written files, new processes, core dumps."""
    wanted = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def allow_cpu(seconds: float) -> None:
    """Let the next picture use so much processor time from now, within what this process has left in all."""
    usage, hard = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (min(soft, hard), hard))


def main() -> int:
    limits = json.loads(sys.argv[1])
    out = os.dup(1)
    os.dup2(2, 1)  # nothing that a library prints gets between the messages
    warnings.simplefilter("ignore")
    try:
        sys.path.append(limits["pillow"])
        warm_up(limits["max_pixels"])
        confine(limits["memory_bytes"], limits["cpu_s"], out + 1)
    except Exception as error:
        send(out, {"error": "start", "detail": f"{type(error).__name__}: {error}", "bytes": 0})
        return 1
    send(out, {"ready": True, "bytes": 0})
    while True:
        try:
            job = json.loads(read(int.from_bytes(read(4), "big")))
            data = read(job["bytes"])
        except EOFError:
            return 0
        allow_cpu(limits["decode_s"])
        send(out, *answer(job, data, limits["max_pixels"]))
        del data


if __name__ == "__main__":
    sys.exit(main())
