"""Pictures from people: bytes nobody vouches for become plain pixels, in a process that can do no harm."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.errors import EngineClosed, InvalidRequest, StepwellError

CHILD = Path(__file__).with_name("decode_child.py")
START_S = 60.0  # Pillow from a cold disk on a busy machine
LIFETIME = 100  # pictures a process decodes before a fresh one takes over, so that no picture meets many others'
HEADER_BYTES = 64 * 1024
PIECE_BYTES = 1024 * 1024
WANTED = "must be a PNG, JPEG or WebP picture"
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"))
_OTHERS = (
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"8BPS", "a Photoshop file"),
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"%PDF", "a PDF file"),
    (b"<", "an SVG, XML or HTML text"),
    (b"\xef\xbb\xbf<", "an SVG, XML or HTML text"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x00\x00\x00\x0cjP", "a JPEG 2000 picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
)


class TooLarge(InvalidRequest):
    """More bytes or more pixels than the server takes."""

    status = 413
    code = "too_large"


@dataclass(frozen=True, slots=True)
class Picture:
    """Decoded pixels: uint8, height × width × channels, row-major; 3 channels are RGB, 4 are RGBA (not premultiplied)."""

    data: bytes
    width: int
    height: int
    channels: int


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """What one picture may cost. `decode_s` is wall-clock time; the memory includes the interpreter's own 40 MB or so."""

    max_bytes: int = 50 * 1024 * 1024
    max_pixels: int = 64 * 1000 * 1000
    decode_s: float = 10.0
    decode_memory_bytes: int = 2 * 1024**3


def sniff(data: bytes) -> str | None:
    """PNG, JPEG or WEBP by the first bytes, else None: names and MIME types are only what somebody claims."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)


def found(data: bytes) -> str:
    """What bytes that are no picture look like, for a message."""
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp":
        return "an HEIC or AVIF picture or an MP4 video"
    start = data[:64].lstrip()
    return next((name for magic, name in _OTHERS if start.startswith(magic)), f"{len(data)} bytes of an unknown format")


class PictureDecoder:
    """Decodes pictures in a process of its own, which has hard limits and is replaced when it dies or is too slow.

    The process starts with the first picture and serves many. Safe to call from several threads: one picture at a time.
    """

    def __init__(self, limits: UploadLimits | None = None):
        self.limits = limits or UploadLimits()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False

    def decode(self, data: bytes, name: str, *, keep_alpha: bool = False) -> Picture:
        """The first frame, upright: RGB with transparency on white, or always RGBA with `keep_alpha`.

        `name` is the field at fault in errors: `TooLarge`, or `InvalidRequest` for what is no good picture.
        """
        limits = self.limits
        if len(data) > limits.max_bytes:
            raise TooLarge(f"{name}: {len(data)} bytes; must be at most {limits.max_bytes}", param=name)
        kind = sniff(data)
        if kind is None:
            raise InvalidRequest(f"{name}: {found(data)}; {WANTED}", param=name)
        with self._lock:
            reply, pixels = self._ask(kind, data, name, keep_alpha)
        if "error" in reply:
            raise self._refusal(reply, kind, name)
        return Picture(pixels, reply["width"], reply["height"], reply["channels"])

    def close(self) -> None:
        """End the process. A picture being decoded, and every later one, fails with `EngineClosed`."""
        self._closed = True
        if (worker := self._worker) is not None:
            worker.kill()  # without the lock: a slow picture must not hold up the end
        with self._lock:
            self._drop()

    def _ask(self, kind: str, data: bytes, name: str, keep_alpha: bool) -> tuple[dict[str, Any], bytes]:
        job = {"kind": kind, "keep_alpha": keep_alpha, "bytes": len(data)}
        for _ in range(2):  # a process that somebody else ended is not the picture's fault, so each gets a second one
            worker = self._ready_worker()
            try:
                return worker.exchange(job, data, self.limits)
            except TimeoutError:
                self._drop()
                break
            except (OSError, EOFError, ValueError):
                slow = worker.died_of_cpu_limit()
                self._drop()
                if self._closed:
                    raise EngineClosed("the picture decoder is closed") from None
                if slow:
                    break
        else:
            raise InvalidRequest(f"{name}: a {kind} file that crashes the decoder; {WANTED}", param=name)
        took = f"takes more than {self.limits.decode_s:g} s to decode"
        raise InvalidRequest(f"{name}: a {kind} file that {took}; must be a smaller or simpler picture", param=name)

    def _ready_worker(self) -> _Worker:
        if self._worker is not None and self._worker.is_spent():
            self._drop()
        if self._worker is None and not self._closed:
            self._worker = _Worker(self.limits)
        if self._worker is None or self._closed:
            raise EngineClosed("the picture decoder is closed")
        return self._worker

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def _refusal(self, reply: dict[str, Any], kind: str, name: str) -> InvalidRequest:
        limits = self.limits
        if reply["error"] == "pixels":
            size = f"{reply['width']}x{reply['height']} pixels"
            return TooLarge(f"{name}: {size}; must be at most {limits.max_pixels} in all", param=name)
        if reply["error"] == "memory":
            megabytes = limits.decode_memory_bytes // 1024**2
            return TooLarge(f"{name}: a {kind} file that needs more than {megabytes} MiB; must be a smaller one", param=name)
        return InvalidRequest(f"{name}: a damaged {kind} file ({reply['detail']}); {WANTED}", param=name)


class _Worker:
    """One decoding process and its two pipes. What it says is checked: after a hostile picture it may be hostile itself."""

    def __init__(self, limits: UploadLimits):
        self.served = 0
        options = {
            "pillow": _folder_of_pillow(),
            "max_pixels": limits.max_pixels,
            "memory_bytes": limits.decode_memory_bytes,
            "decode_s": limits.decode_s,
            "cpu_s": math.ceil(LIFETIME * (limits.decode_s + 1)),
        }
        try:
            self.process = subprocess.Popen(
                # isolated, without site-packages' start-up code, with nothing of this environment's secrets
                [sys.executable, "-I", "-S", "-B", str(CHILD), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the server
            )
        except OSError as error:
            raise StepwellError(f"the picture decoder did not start: {error}") from None
        assert self.process.stdin and self.process.stdout
        self._input, self._output = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        try:
            hello = self._read_header(time.monotonic() + START_S)
        except (OSError, EOFError, ValueError) as error:
            hello = {"detail": f"{type(error).__name__}: {error}"}
        if hello.get("ready") is not True:
            self.end()
            raise StepwellError(f"the picture decoder did not start: {str(hello.get('detail'))[:500]}")

    def is_spent(self) -> bool:
        return self.served >= LIFETIME or self.process.poll() is not None

    def exchange(self, job: dict[str, Any], data: bytes, limits: UploadLimits) -> tuple[dict[str, Any], bytes]:
        """Send a picture and wait for what comes back; TimeoutError, or EOFError, OSError, ValueError for a dead process."""
        deadline = time.monotonic() + limits.decode_s
        self.served += 1
        text = json.dumps(job).encode()
        self._write(len(text).to_bytes(4, "big") + text, deadline)
        self._write(data, deadline)
        reply = self._read_header(deadline)
        _check(reply, 4 if job["keep_alpha"] else 3, limits.max_pixels)
        return reply, self._read(reply["bytes"], deadline)

    def died_of_cpu_limit(self) -> bool:
        try:
            return self.process.wait(timeout=1.0) == -signal.SIGXCPU
        except subprocess.TimeoutExpired:
            return False

    def kill(self) -> None:
        """End the process at once; harmless when it is over already, and from any thread."""
        self.process.kill()

    def end(self) -> None:
        """End the process and let go of its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()

    def _read_header(self, deadline: float) -> dict[str, Any]:
        length = int.from_bytes(self._read(4, deadline), "big")
        if length > HEADER_BYTES:
            raise ValueError("a header too long")
        try:
            header = json.loads(self._read(length, deadline))
        except RecursionError:
            raise ValueError("a header too deep") from None
        if not isinstance(header, dict):
            raise ValueError("a header that is no object")
        return header

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._input, select.POLLOUT, deadline)
            view = view[os.write(self._input, view[:PIECE_BYTES]) :]

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            _wait(self._output, select.POLLIN, deadline)
            got = os.readv(self._output, [view[done : done + PIECE_BYTES]])
            if not got:
                raise EOFError
            done += got
        return bytes(data)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    left_ms = math.ceil((deadline - time.monotonic()) * 1000)
    if left_ms <= 0 or not poll.poll(left_ms):
        raise TimeoutError


def _check(reply: dict[str, Any], channels: int, max_pixels: int) -> None:
    """ValueError unless the reply is one that an honest process can give."""
    numbers = [reply.get(key, 0) for key in ("width", "height", "channels", "bytes")]
    if not all(isinstance(number, int) and 0 <= number < 2**62 for number in numbers):
        raise ValueError("sizes that are no numbers")
    width, height, found_channels, size = numbers
    if "error" in reply:
        known = reply["error"] in ("pixels", "memory", "broken") and isinstance(reply.get("detail", ""), str)
        if not known or size:
            raise ValueError("an unknown error")
        reply["detail"] = "".join(letter for letter in reply.get("detail", "") if letter.isprintable())[:200]
    elif not (0 < width * height <= max_pixels and found_channels == channels and size == width * height * channels):
        raise ValueError("sizes that do not fit")


def _folder_of_pillow() -> str:
    """Where Pillow is installed, without importing it: the isolated process does not look for it."""
    spec = importlib.util.find_spec("PIL")
    if spec is None or not spec.submodule_search_locations:
        raise StepwellError("the picture decoder needs Pillow, which is not installed")
    return str(Path(next(iter(spec.submodule_search_locations))).parent)
