"""Paths that people give: whether files can be written there, told before anything slow. Standard library only."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

from stepwell.errors import InvalidRequest


def make_folder(folder: Path, param: str, shown: str) -> None:
    """Make a folder that files can be written in, or raise InvalidRequest: `param` asked for it, the message begins `shown`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise unwritable(error, param, shown) from None
    nameless_file(folder, param, shown).close()


def nameless_file(folder: Path, param: str, shown: str) -> IO[bytes]:
    """A file without a name, which goes with the process however that ends. Raises as `make_folder` does."""
    try:
        return tempfile.TemporaryFile(prefix="stepwell-", dir=str(folder))
    except (OSError, ValueError) as error:
        raise unwritable(error, param, shown) from None


def unwritable(error: OSError | ValueError, param: str, shown: str) -> InvalidRequest:
    """What to say of a path that can't be written."""
    return InvalidRequest(f"{shown}: can't be written: {reason(error)}", param=param)


def reason(error: OSError | ValueError) -> str:
    """Why a path can't be used, in a few words; a ValueError is a NUL character in it, or what is in the file."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
