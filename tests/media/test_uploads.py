"""Uploaded pictures: good ones come out plain, hostile ones are refused, and the decoder outlives them all."""

from __future__ import annotations

import ast
import io
import os
import random
import signal
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from stepwell.errors import EngineClosed, InvalidRequest, StepwellError
from stepwell.media import uploads
from stepwell.media.uploads import Picture, PictureDecoder, TooLarge, UploadLimits, sniff

PNG = b"\x89PNG\r\n\x1a\n"


def noise(size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, random.Random(5).randbytes(size[0] * size[1] * bands))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG made by hand, so that it can promise what it likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def riff(kind: bytes, body: bytes) -> bytes:
    inner = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


def huge_jpeg() -> bytes:
    """A JPEG whose frame header promises 65500 x 65500."""
    data = bytearray(encoded(noise(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)


def good_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png": encoded(noise(), "PNG"),
        "png-alpha": encoded(noise(mode="RGBA"), "PNG", exif=exif),
        "png-palette": encoded(noise().quantize(16), "PNG", transparency=3),
        "png-16": png(8, 8, b"".join(b"\0" + bytes(range(16)) for _ in range(8)), 16, 0),
        "png-grey-alpha": encoded(noise(mode="LA"), "PNG"),
        "apng": animated("PNG"),
        "jpeg": encoded(noise(), "JPEG", exif=exif),
        "jpeg-progressive": encoded(noise(), "JPEG", progressive=True),
        "jpeg-cmyk": encoded(noise(mode="CMYK"), "JPEG"),
        "jpeg-grey": encoded(noise(mode="L"), "JPEG"),
        "webp": encoded(noise(), "WEBP"),
        "webp-lossless": encoded(noise(mode="RGBA"), "WEBP", lossless=True, exif=exif),
        "webp-animated": animated("WEBP"),
    }


def damaged(rng: random.Random, data: bytes) -> bytes:
    """One of the ways in which files break or are broken."""
    out, how = bytearray(data), rng.randrange(6)
    if how == 0:
        return bytes(out[: rng.randrange(len(out))])
    if how == 1:
        for _ in range(rng.choice((1, 3, 30))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif how == 2:
        at = rng.randrange(8, len(out))
        out[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
    elif how == 3:
        at = rng.randrange(8, len(out))
        out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
    elif how == 4:
        start, end = sorted(rng.randrange(len(out)) for _ in range(2))
        out[end:end] = out[start:end] * 3
    else:
        out[:16] = rng.choice((PNG, b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\xffWEBP")) + out[16:32]
    return bytes(out)


def refused_formats() -> dict[str, bytes]:
    small = noise((8, 8))
    return {
        "empty": b"",
        "one byte": b"\x89",
        "text": b"hello, I am a picture",
        "gif": encoded(small, "GIF"),
        "bmp": encoded(small, "BMP"),
        "tiff": encoded(small, "TIFF"),
        "eps": encoded(small, "EPS"),
        "pdf": encoded(small, "PDF"),
        "ico": encoded(small, "ICO"),
        "ppm": encoded(small, "PPM"),
        "tga": encoded(small, "TGA"),
        "psd": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(64),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "xml": b'\xef\xbb\xbf<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
        "html": b"\n\n<html><script>alert(1)</script></html>",
        "msl": b'<?xml version="1.0"?><image><read filename="/etc/passwd"/></image>',
        "mvg": b"push graphic-context\nviewbox 0 0 640 480\nimage over 0,0 0,0 '|id'\npop graphic-context",
        "zip": b"PK\x03\x04" + bytes(64),
        "heic": b"\0\0\0\x18ftypheic" + bytes(64),
        "riff, not webp": b"RIFF\x24\0\0\0WAVEfmt " + bytes(64),
        "pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x93.",
    }


def bombs() -> dict[str, bytes]:
    """Few bytes that want to become many."""
    zeros = zlib.compress(bytes(100_000_000), 9)
    exact = b"".join(b"\0" + bytes(30) for _ in range(10))
    return {
        "png header": png(60_000, 60_000, bytes(100)),
        "png header, widest": png(2**31 - 1, 2**31 - 1, bytes(100)),
        "png one bit": png(60_000, 60_000, bytes(60_000 // 8 * 1000), 1, 0),
        "png just too large": png(8001, 8000, bytes(100)),
        "png largest allowed, truncated": png(8000, 8000, bytes(100)),
        "png idat": PNG + png(10, 10, b"")[8:33] + chunk(b"IDAT", zeros) + chunk(b"IEND", b""),
        "png ztxt": png(10, 10, exact, extra=chunk(b"zTXt", b"k\0\0" + zeros)),
        "png itxt": png(10, 10, exact, extra=chunk(b"iTXt", b"k\0\1\0\0\0" + zeros)),
        "png iccp": png(10, 10, exact, extra=chunk(b"iCCP", b"k\0\0" + zeros)),
        "png many texts": png(10, 10, exact, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000))) * 90),
        "png no size": png(0, 0, bytes(10)),
        "jpeg header": huge_jpeg(),
        "webp vp8x": riff(b"VP8X", bytes(4) + b"\xff\x3f\0" * 2),
        "webp vp8x, widest": riff(b"VP8X", bytes(4) + b"\xff\xff\xff" * 2),
        "webp vp8l": riff(b"VP8L", b"\x2f" + struct.pack("<I", 0x0FFFFFFF) + bytes(64)),
        "webp vp8": riff(b"VP8 ", b"\x10\x02\0\x9d\x01\x2a" + struct.pack("<HH", 0x3FFF, 0x3FFF) + bytes(64)),
    }


@pytest.fixture(scope="module")
def decoder() -> Iterator[PictureDecoder]:
    decoder = PictureDecoder()
    yield decoder
    decoder.close()


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[PictureDecoder]:
    """A decoder to be mistreated, with half a second per picture unless the test says otherwise."""
    decoder = PictureDecoder(UploadLimits(decode_s=getattr(request, "param", 0.5)))
    yield decoder
    decoder.close()


def pid(decoder: PictureDecoder) -> int:
    assert decoder._worker is not None
    return decoder._worker.process.pid


def opened(picture: Picture) -> Image.Image:
    mode = {3: "RGB", 4: "RGBA"}[picture.channels]
    return Image.frombytes(mode, (picture.width, picture.height), picture.data)


def outcome(decoder: PictureDecoder, data: bytes, keep_alpha: bool = False) -> Picture | InvalidRequest:
    """A picture whose numbers agree, or a refusal that can be shown; anything else is a failure."""
    try:
        picture = decoder.decode(data, "image", keep_alpha=keep_alpha)
    except InvalidRequest as error:
        assert error.param == "image" and error.message.startswith("image: ") and len(error.message) < 300
        assert error.status in (400, 413) and error.message.isprintable() and " at 0x" not in error.message
        return error
    assert picture.channels == (4 if keep_alpha else 3)
    assert len(picture.data) == picture.width * picture.height * picture.channels > 0
    return picture


def test_sniffs_content_and_nothing_else() -> None:
    for name, data in good_files().items():
        assert sniff(data) == {"png": "PNG", "apn": "PNG", "jpe": "JPEG", "web": "WEBP"}[name[:3]]
    assert [name for name, data in refused_formats().items() if sniff(data)] == []


def test_what_is_good_comes_out_exactly(decoder: PictureDecoder) -> None:
    image = noise()
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        picture = decoder.decode(encoded(image, kind, **options), "image")
        assert picture == Picture(image.tobytes(), 48, 32, 3)
    jpeg = encoded(image, "JPEG")
    assert decoder.decode(jpeg, "image").data == Image.open(io.BytesIO(jpeg)).tobytes()
    assert opened(decoder.decode(encoded(image, "PNG"), "image", keep_alpha=True)).getchannel("A").getextrema() == (255, 255)


def test_transparency_lies_on_white_or_is_kept(decoder: PictureDecoder) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True, exact=True)):
        assert decoder.decode(data, "image").data == bytes([255, 255, 255, 127, 127, 127])
        assert decoder.decode(data, "image", keep_alpha=True).data == image.tobytes()
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    assert decoder.decode(encoded(palette, "PNG", transparency=1), "image").data == bytes([255, 0, 0, 255, 255, 255, 0, 0, 255])
    veiled = decoder.decode(encoded(palette, "PNG", transparency=bytes([0, 128, 255])), "image", keep_alpha=True)
    assert veiled.data == bytes([255, 0, 0, 0, 0, 255, 0, 128, 0, 0, 255, 255])


def test_sixteen_bits_are_scaled_not_clipped(decoder: PictureDecoder) -> None:
    values = (0, 257, 32896, 65535, 256)
    grey = b"\0" + struct.pack(">5H", *values)
    assert decoder.decode(png(5, 1, grey, 16, 0), "image").data[::3] == bytes([0, 1, 128, 255, 1])
    keyed = decoder.decode(png(5, 1, grey, 16, 0, chunk(b"tRNS", struct.pack(">H", 256))), "image", keep_alpha=True)
    assert keyed.data[3::4] == bytes([255, 255, 255, 255, 0])
    colour = b"\0" + struct.pack(">6H", 65535, 32896, 0, 0x0180, 0x0290, 0x03A0)
    assert decoder.decode(png(2, 1, colour, 16, 2), "image").data == bytes([255, 128, 0, 1, 2, 3])
    key = chunk(b"tRNS", struct.pack(">3H", 0x0180, 0x0290, 0x03A0))
    assert decoder.decode(png(2, 1, colour, 16, 2, key), "image").data == bytes([255, 128, 0, 255, 255, 255])


def test_cmyk_grey_and_bilevel_become_rgb(decoder: PictureDecoder) -> None:
    picture = decoder.decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), "image")
    assert all(abs(a - b) < 8 for a, b in zip(picture.data[:3], (255, 0, 0), strict=True))
    assert decoder.decode(encoded(Image.new("L", (1, 1), 77), "PNG"), "image").data == bytes([77, 77, 77])
    assert decoder.decode(encoded(Image.new("1", (1, 1), 1), "PNG"), "image").data == bytes([255, 255, 255])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_orientation_is_applied(decoder: PictureDecoder, kind: str) -> None:
    image = noise((24, 16))
    for orientation in (*range(1, 9), 0, 9, 777):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        assert decoder.decode(data, "image") == Picture(wanted.tobytes(), wanted.width, wanted.height, 3)


def test_broken_exif_does_not_spoil_a_picture(decoder: PictureDecoder) -> None:
    rng = random.Random(3)
    for _ in range(10):
        data = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0" + rng.randbytes(40))
        assert isinstance(outcome(decoder, data), Picture)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame(decoder: PictureDecoder, kind: str) -> None:
    picture = decoder.decode(animated(kind), "image")
    assert (picture.width, picture.height, picture.data[:3]) == (20, 10, bytes([255, 0, 0]))


def test_tails_and_metadata_are_gone(decoder: PictureDecoder) -> None:
    php = b"<?php system($_GET['c']); ?>"
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(noise(), kind, icc_profile=php * 5, exif=b"Exif\0\0" + php) + php
        picture = outcome(decoder, data)
        assert isinstance(picture, Picture) and b"php" not in picture.data


@pytest.mark.parametrize("name", refused_formats())
def test_other_formats_are_refused(decoder: PictureDecoder, name: str) -> None:
    error = outcome(decoder, refused_formats()[name])
    assert isinstance(error, InvalidRequest) and error.message.endswith("must be a PNG, JPEG or WebP picture")
    assert {"gif": "GIF", "empty": "empty", "svg": "SVG", "heic": "HEIC"}.get(name, "") in error.message


def test_other_formats_behind_a_good_name_are_refused(decoder: PictureDecoder) -> None:
    for data in refused_formats().values():
        for magic in (PNG, b"\xff\xd8\xff\xe0", b"RIFF\0\1\0\0WEBP", b"RIFF\0\1\0\0WEBPVP8X"):
            assert isinstance(outcome(decoder, magic + data), InvalidRequest)


def test_bombs_do_not_go_off(decoder: PictureDecoder) -> None:
    fine = {"png idat", "png many texts"}
    for name, data in bombs().items():
        began = time.monotonic()
        result = outcome(decoder, data)
        assert time.monotonic() - began < 5, name
        assert isinstance(result, InvalidRequest) or name in fine, name
        header = "header" in name or "just" in name or "bit" in name or name.startswith("webp")
        assert isinstance(result, TooLarge) or not header, (name, result)


def test_hundreds_of_damaged_files_and_a_good_one_after(decoder: PictureDecoder) -> None:
    rng, pictures, refusals = random.Random(20), 0, 0
    before = pid(decoder) if decoder._worker else None
    for data in good_files().values():
        for number in range(30):
            result = outcome(decoder, damaged(rng, data), keep_alpha=number % 2 == 0)
            pictures, refusals = pictures + isinstance(result, Picture), refusals + isinstance(result, InvalidRequest)
    assert pictures + refusals >= 390 and pictures > 20 and refusals > 150
    assert decoder.decode(encoded(noise(), "PNG"), "image").data == noise().tobytes()
    assert pid(decoder) != before  # it is replaced now and then


def test_truncated_everywhere(decoder: PictureDecoder) -> None:
    for data in (encoded(noise((8, 8)), "PNG"), encoded(noise((8, 8)), "WEBP")):
        for end in range(0, len(data) - 24, 3):  # what is cut off from the very end may not be missed
            assert isinstance(outcome(decoder, data[:end]), InvalidRequest)


def test_limits_on_bytes_and_pixels() -> None:
    decoder = PictureDecoder(UploadLimits(max_bytes=5000, max_pixels=48 * 32))
    try:
        assert decoder.decode(encoded(noise((48, 32)), "PNG"), "image").width == 48
        for data, number in ((PNG + bytes(4993), "5000"), (encoded(noise((48, 33), "L"), "PNG"), "1536")):
            with pytest.raises(TooLarge, match=number) as caught:
                decoder.decode(data, "mask")
            assert (caught.value.status, caught.value.code, caught.value.param) == (413, "too_large", "mask")
            assert caught.value.kind == "invalid_request_error"
    finally:
        decoder.close()


def test_memory_is_limited() -> None:
    decoder = PictureDecoder(UploadLimits(decode_memory_bytes=100 * 1024**2))
    try:
        with pytest.raises(TooLarge, match="100 MiB"):
            decoder.decode(encoded(Image.new("RGB", (6000, 6000)), "PNG", compress_level=1), "image")
        assert decoder.decode(encoded(noise(), "PNG"), "image").data == noise().tobytes()
    finally:
        decoder.close()


def test_the_process_is_alone_and_limited(decoder: PictureDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_SECRET", "1")
    own = PictureDecoder()
    try:
        own.decode(encoded(noise(), "PNG"), "image")
        proc = Path(f"/proc/{pid(own)}")
        lines = [line.rsplit(maxsplit=3) for line in (proc / "limits").read_text().splitlines()]
        limits = {line[0].strip(): line[2] for line in lines}
        assert limits["Max address space"] == str(2 * 1024**3)
        assert limits["Max file size"] == "0" and limits["Max core file size"] == "0"
        assert int(limits["Max open files"]) <= 8 and int(limits["Max cpu time"]) < 2000
        assert (proc / "environ").read_bytes() == b""
        assert sorted(os.listdir(proc / "fd")) == ["0", "1", "2", "3"]
        assert b"-I\0" in (proc / "cmdline").read_bytes()
        assert os.getsid(pid(own)) != os.getsid(0)
    finally:
        own.close()
    assert not proc.exists()


def test_the_process_imports_the_standard_library_and_pillow_only() -> None:
    tree = ast.parse(uploads.CHILD.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    roots = {(name or "").split(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) == {"PIL"} and "pickle" not in roots


def test_one_process_serves_many_pictures_and_then_retires(own: PictureDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LIFETIME", 3)
    pids = []
    for _ in range(7):
        own.decode(encoded(noise(), "PNG"), "image")
        pids.append(pid(own))
    assert [pids.count(one) for one in dict.fromkeys(pids)] == [3, 3, 1]


def test_a_process_that_hangs_is_replaced(own: PictureDecoder) -> None:
    data = encoded(noise((300, 300)), "PNG")  # more than a pipe holds
    own.decode(data, "image")
    first, files = pid(own), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        os.kill(pid(own), signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(InvalidRequest, match="more than 0.5 s to decode") as caught:
            own.decode(data, "image")
        assert caught.value.param == "image" and time.monotonic() - began < 5
        assert own.decode(data, "image").width == 300
    assert pid(own) != first and not Path(f"/proc/{first}").exists()
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_picture_that_takes_too_long_is_refused() -> None:
    decoder = PictureDecoder(UploadLimits(decode_s=0.05))
    try:
        with pytest.raises(InvalidRequest, match="0.05 s"):
            decoder.decode(encoded(Image.new("RGB", (7000, 7000)), "PNG", compress_level=1), "image")
    finally:
        decoder.close()


def test_a_process_killed_between_pictures_is_replaced(own: PictureDecoder) -> None:
    for _ in range(2):
        own.decode(encoded(noise(), "PNG"), "image")
        os.kill(pid(own), signal.SIGKILL)
    assert own.decode(encoded(noise(), "PNG"), "image").data == noise().tobytes()


@pytest.mark.parametrize("own", [30.0], indirect=True)
def test_a_process_killed_while_decoding_is_replaced(own: PictureDecoder) -> None:
    own.decode(encoded(noise(), "PNG"), "image")
    first = pid(own)
    os.kill(first, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (first, signal.SIGKILL))
    killer.start()
    assert own.decode(encoded(noise(), "PNG"), "image").data == noise().tobytes()
    assert pid(own) != first


READY = """
import json, os, signal, struct, sys
def say(header, tail=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    os.write(1, struct.pack(">I", len(text)) + text + tail)
say({"ready": True, "bytes": 0})
os.read(0, 4)
"""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("os._exit(1)", "crashes the decoder"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes the decoder"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", "more than 0.5 s"),
        ("say({'width': 10**6, 'height': 10**6, 'channels': 3, 'bytes': 3 * 10**12})", "crashes the decoder"),
        ("say({'width': 2, 'height': 2, 'channels': 3, 'bytes': 2**40})", "crashes the decoder"),
        ("say({'width': 2, 'height': 2, 'channels': 4, 'bytes': 16}, bytes(16))", "crashes the decoder"),
        ("say({'width': -2, 'height': -2, 'channels': 3, 'bytes': 12}, bytes(12))", "crashes the decoder"),
        ("say({'width': 'x', 'height': 2, 'channels': 3, 'bytes': 12}, bytes(12))", "crashes the decoder"),
        ("say({'error': 'nonsense', 'bytes': 0})", "crashes the decoder"),
        ("say({'error': ['pixels'], 'bytes': 0})", "crashes the decoder"),
        ("say([1, 2])", "crashes the decoder"),
        ("say(b'not json')", "crashes the decoder"),
        ("say(b'[' * 60000)", "crashes the decoder"),
        ("os.write(1, b'\\xff\\xff\\xff\\xff')", "crashes the decoder"),
        ("say({'width': 2, 'height': 2, 'channels': 3, 'bytes': 12}, b'short')", "crashes the decoder"),
        ("while True: pass", "more than 0.5 s"),
    ],
)
def test_a_process_that_was_taken_over_is_not_believed(
    own: PictureDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    (tmp_path / "child.py").write_text(READY + script)
    monkeypatch.setattr(uploads, "CHILD", tmp_path / "child.py")
    with pytest.raises(InvalidRequest, match=message):
        own.decode(encoded(noise(), "PNG"), "image")
    monkeypatch.undo()
    assert own.decode(encoded(noise(), "PNG"), "image").data == noise().tobytes()


def test_a_process_that_does_not_start_is_the_servers_fault(own: PictureDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(), "PNG")
    for name, value in (("CHILD", Path("/no/such/file.py")), ("_folder_of_pillow", lambda: "/no/such/folder")):
        with monkeypatch.context() as patch, pytest.raises(StepwellError, match="did not start") as caught:
            patch.setattr(uploads, name, value)
            own.decode(data, "image")
        assert caught.value.status == 500
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(StepwellError, match="did not start"):
        own.decode(data, "image")


def test_many_threads_share_one_decoder(own: PictureDecoder) -> None:
    images = [noise((20 + number, 20)) for number in range(8)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            if own.decode(encoded(images[number], "PNG"), "image").data != images[number].tobytes():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("own", [60.0], indirect=True)
def test_close_does_not_wait_for_a_slow_picture(own: PictureDecoder) -> None:
    own.decode(encoded(noise(), "PNG"), "image")
    os.kill(pid(own), signal.SIGSTOP)
    closer = threading.Timer(0.2, own.close)
    closer.start()
    began = time.monotonic()
    with pytest.raises(EngineClosed):
        own.decode(encoded(noise(), "PNG"), "image")
    assert time.monotonic() - began < 10
    closer.join()
    with pytest.raises(EngineClosed):
        own.decode(encoded(noise(), "PNG"), "image")
    own.close()
