"""Whether files can be written in a folder, told by opening one there before anything slow. Standard library only."""

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
    """What to say of a path that can't be written; ValueError is a NUL character in it."""
    reason = error.strerror if isinstance(error, OSError) else error
    return InvalidRequest(f"{shown}: can't be written: {reason}", param=param)
