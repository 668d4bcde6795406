"""Where checkpoints lie, and what one says of itself, for those who import no torch. What is in them: `engine.checkpoints`.

A name is made of the hash of the sample's id, so that nobody chooses a path, and is the same after a restart.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from stepwell.errors import InvalidRequest
from stepwell.types import Request, replace

STALE_S = 86_400  # a file that nobody has come back for
MOST_HEADER_BYTES = 2**24
_NAME = re.compile(r"[0-9a-f]{40}\.(safetensors|partial-\d+)")


def open_folder(path: str) -> Path:
    """The folder, made where there is none, and rid of what is stale. Raises InvalidRequest where nothing can be written."""
    folder = Path(path).absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
        for file in folder.iterdir():
            with suppress(FileNotFoundError):  # another process may be faster
                if _NAME.fullmatch(file.name) and time.time() - file.stat().st_mtime > STALE_S:
                    file.unlink()
    except OSError as error:
        raise InvalidRequest(
            f"checkpoint_path = {path!r}: checkpoints can't be kept there: {error.strerror}", param="checkpoint_path"
        ) from None
    return folder


def path_of(folder: Path, sample_id: str) -> Path:
    """The file of one sample."""
    return folder / f"{hashlib.sha256(sample_id.encode(errors='surrogatepass')).hexdigest()[:40]}.safetensors"


def write(path: Path, content: bytes) -> None:
    """Put a file in place, whole, for its owner alone. Raises OSError, and then what was there before still is."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)
        os.replace(partial, path)  # not flushed to the disk: what a lost power spoils, its checksum tells
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def erase(folder: Path, request: Request) -> None:
    """Remove what there is of a request's outputs."""
    for path in _paths(folder, request):
        for file in folder.glob(f"{path.stem}.*"):
            with suppress(OSError):
                file.unlink()


def steps_saved(folder: Path, request: Request) -> int:
    """Steps of a request's outputs that need not be taken again, as far as the files themselves say."""
    return sum(_steps_in(path) for path in _paths(folder, request))


def fingerprint(request: Request) -> str:
    """The same for requests that ask for the same thing."""
    same = replace(request, id="", priority=0)
    return hashlib.sha256(msgspec.msgpack.encode(same)).hexdigest()


def _paths(folder: Path, request: Request) -> list[Path]:
    return [path_of(folder, f"{request.id}/{index}") for index in range(request.sampling.num_outputs or 1)]


def _steps_in(path: Path) -> int:
    """A safetensors file begins with the length of its JSON header."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return int(json.loads(file.read(min(size, MOST_HEADER_BYTES)))["__metadata__"]["steps_in_all"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
