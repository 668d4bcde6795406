"""Where finished pictures and videos live: a folder, memory, or a bucket of an object store, named by one URL.

Keys are made here and nowhere else, so that no client ever chooses a path: `image-<milliseconds><random>.png`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from stepwell.errors import InvalidRequest, StepwellError

_IMAGES = {"gif": "image/gif", "jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
CONTENT_TYPES = _IMAGES | {"json": "application/json", "mp4": "video/mp4"}
# Only stores that show an object whole or not at all; the value is what their package is installed with.
OBJECT_STORES = {"s3": "stepwell[s3]", "gs": "gcsfs", "az": "adlfs"}
EXAMPLES = "right are /a/folder, file:///a/folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or memory://name"
PARTIAL = ".partial-"
STALE_PARTIAL_S = 3600  # no write takes an hour: what is older was left by a process that died
FULL = (errno.ENOSPC, errno.EDQUOT)
_KEY = re.compile(r"[a-z]{1,16}-[0-9a-f]{44}\.[a-z0-9]{1,8}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")
_PATH_CHARACTERS = "/%:@!$&'()*+,;=~"  # what a URL's path may hold as it is
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_PREFIX = re.compile(r"(?!(.*/)?\.{1,2}(/|$))[\w.=@+-]+(/[\w.=@+-]+)*/?")


class MediaNotFound(StepwellError):
    """Nothing is stored under this key, or no longer."""

    status = 404
    kind = "invalid_request_error"
    code = "media_not_found"


class StorageFailed(StepwellError):
    """The storage could not read or write; the message gives the reason."""

    code = "storage_failed"


class StorageFull(StorageFailed):
    """The storage has no room left."""

    status = 507
    code = "storage_full"


def new_key(kind: str, suffix: str) -> str:
    """A key that nobody can guess, such as `video-<44 hex digits>.mp4`; keys of one kind sort by age."""
    return _checked(f"{kind}-{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex}.{suffix.removeprefix('.')}")


def made_at(key: str) -> float:
    """When a key was made, in Unix seconds; read from the key itself, so a janitor needs no request per file."""
    return int(_checked(key).partition("-")[2][:12], 16) / 1000


def content_type(key: str) -> str:
    """The media type that the key's suffix stands for."""
    return CONTENT_TYPES.get(_checked(key).rpartition(".")[2], "application/octet-stream")


class Storage:
    """Files under server-made keys. Calls block and may come from any thread.

    `fs_url` is a folder (a path or `file:///path`), `s3://bucket/prefix` or another object store, or `memory://name`.
    `http_url` is where a web server or CDN shows the same files, if one does. An object store takes its endpoint and
    credentials from where its own package looks for them. A URL that is wrong raises InvalidRequest.
    """

    def __init__(self, fs_url: str, http_url: str | None = None):
        self._http_url = None if http_url is None else _checked_http_url(http_url)
        self._place = _place(fs_url)

    def within(self, folder: str) -> Storage:
        """The same storage, one folder further down. `folder` is one plain name; it is made where there is none."""
        if not _NAME.fullmatch(folder):
            raise InvalidRequest(f"folder = {folder!r:.100}: must be one plain name", param="folder")
        inner = copy(self)
        inner._http_url = None if self._http_url is None else f"{self._http_url}/{folder}"
        with _told(folder, missing=StorageFailed):
            inner._place = self._place.within(folder)
        return inner

    def put(self, key: str, content: bytes) -> None:
        """Store a file: it appears whole or not at all. Raises StorageFull or StorageFailed, and then nothing is stored."""
        with _told(_checked(key), missing=StorageFailed):
            self._place.put(key, content)

    def get(self, key: str) -> bytes:
        """The whole file. Raises MediaNotFound."""
        with _told(_checked(key)):
            return self._place.get(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` up to, not including, `stop`; what lies beyond the end is left out. Raises MediaNotFound."""
        if not 0 <= start <= stop:
            raise InvalidRequest(f"range = {start}:{stop}: must be 0 <= start <= stop", param="range")
        with _told(_checked(key)):
            return self._place.read(key, start, stop)

    def size(self, key: str) -> int:
        """The file's length in bytes. Raises MediaNotFound."""
        with _told(_checked(key)):
            return self._place.size(key)

    def exists(self, key: str) -> bool:
        """Whether the file is there."""
        with suppress(MediaNotFound):
            return self.size(key) >= 0
        return False

    def delete(self, key: str) -> None:
        """Remove the file; one that is not there is no error."""
        with _told(_checked(key)), suppress(FileNotFoundError):
            self._place.delete(key)

    def keys(self) -> Iterator[str]:
        """All keys, sorted: by kind, then by age. Files that are not of this storage's making are left out."""
        with _told("the list of files"):
            names = sorted(name for name in self._place.names() if _KEY.fullmatch(name))
        yield from names

    def path(self, key: str) -> Path | None:
        """The file in a local folder, for a web server's sendfile; None anywhere else. Raises MediaNotFound."""
        with _told(_checked(key)):
            return self._place.path(key) if isinstance(self._place, _Folder) else None

    def url(self, key: str) -> str | None:
        """Where clients find the file over HTTP; None without an `http_url`."""
        _checked(key)
        return None if self._http_url is None else f"{self._http_url}/{quote(key)}"

    def address(self, key: str) -> str:
        """Where whoever has access to the storage itself finds the file, such as file:///folder/KEY or s3://bucket/KEY."""
        return self._place.address(_checked(key))


class _Folder:
    """A local folder. fsspec would neither rename nor sync, so this is the operating system directly.

    Here and in `_Bucket` keys are checked already, and what is missing raises FileNotFoundError.
    """

    def __init__(self, root: Path):
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self._root = root
        for partial in root.glob(f"{PARTIAL}*"):
            with suppress(FileNotFoundError):  # another process may be faster
                if time.time() - partial.stat().st_mtime > STALE_PARTIAL_S:
                    partial.unlink()

    def put(self, key: str, content: bytes) -> None:
        target, partial = self._root / key, self._root / f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            _write_through(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, content)
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        try:
            _write_through(self._root, os.O_RDONLY | os.O_DIRECTORY)  # or the new name is lost with the power
        except BaseException:
            target.unlink(missing_ok=True)  # an error means that nothing is stored
            raise

    def get(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def read(self, key: str, start: int, stop: int) -> bytes:
        with self.path(key).open("rb") as file:
            stop = min(stop, os.fstat(file.fileno()).st_size)  # `file.read` makes room for all it is asked for
            file.seek(start)
            return file.read(max(0, stop - start))

    def size(self, key: str) -> int:
        found = (self._root / key).stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(key)
        return found.st_size

    def delete(self, key: str) -> None:
        (self._root / key).unlink()

    def names(self) -> list[str]:
        with os.scandir(self._root) as entries:
            return [entry.name for entry in entries if entry.is_file()]

    def path(self, key: str) -> Path:
        self.size(key)
        return self._root / key

    def address(self, key: str) -> str:
        return (self._root / key).as_uri()

    def within(self, folder: str) -> _Folder:
        return _Folder(self._root / folder)


def _write_through(path: Path, flags: int, content: bytes = b"") -> None:
    """Write what there is and wait until the disk has it."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)  # less the umask
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Bucket:
    """An object store or memory, through fsspec."""

    def __init__(self, protocol: str, root: str):
        import fsspec  # type: ignore[import-untyped]

        # other processes write too, so a listing that was true once must not be remembered
        self._fs: Any = fsspec.get_filesystem_class(protocol)(use_listings_cache=False, skip_instance_cache=True)
        self._protocol, self._root = protocol, root

    def put(self, key: str, content: bytes) -> None:
        extra = {"ContentType": content_type(key)} if self._protocol == "s3" else {}
        self._fs.pipe_file(self._name(key), content, **extra)

    def get(self, key: str) -> bytes:
        return bytes(self._fs.cat_file(self._name(key)))

    def read(self, key: str, start: int, stop: int) -> bytes:
        stop = min(stop, self.size(key))  # object stores refuse a range that is empty or begins beyond the end
        return bytes(self._fs.cat_file(self._name(key), start=start, end=stop)) if start < stop else b""

    def size(self, key: str) -> int:
        found = self._fs.info(self._name(key))
        if found["type"] != "file":
            raise FileNotFoundError(key)
        return int(found["size"])

    def delete(self, key: str) -> None:
        self._fs.rm_file(self._name(key))

    def names(self) -> list[str]:
        with suppress(FileNotFoundError):  # a prefix under which nothing was stored yet
            return [str(name).rpartition("/")[2] for name in self._fs.ls(self._root, detail=False)]
        return []

    def address(self, key: str) -> str:
        return f"{self._protocol}://{self._name(key)}"

    def within(self, folder: str) -> _Bucket:
        inner = copy(self)
        inner._root = self._name(folder)
        return inner

    def _name(self, key: str) -> str:
        return f"{self._root}/{key}"


def _place(fs_url: str) -> _Folder | _Bucket:
    """The folder or bucket that a URL names."""
    found = _SCHEME.fullmatch(fs_url)
    protocol, rest = (found[1].lower(), found[2]) if found else ("file", f"//{fs_url}")
    if not fs_url or "\0" in fs_url or not rest.startswith("//") or protocol not in ("file", "memory", *OBJECT_STORES):
        raise _wrong(fs_url, f"no storage that Stepwell knows; {EXAMPLES}")
    rest = rest[2:]
    if protocol == "file" and found and not rest.startswith("/"):
        raise _wrong(fs_url, "a file URL has three slashes and a whole path: file:///a/folder")
    if protocol != "file" and not _PREFIX.fullmatch(rest):
        raise _wrong(fs_url, f"must be a name and a plain prefix, without empty parts, '..', '?', '*' or spaces; {EXAMPLES}")
    try:
        return _Folder(Path(rest).expanduser().absolute()) if protocol == "file" else _Bucket(protocol, rest.rstrip("/"))
    except (FileExistsError, NotADirectoryError):
        raise _wrong(fs_url, "a file is in the way; must be a folder, which is made where there is none") from None
    except ImportError:
        raise _wrong(fs_url, f"{protocol}:// needs a package: pip install '{OBJECT_STORES[protocol]}'") from None
    except Exception as error:  # packages raise what they like for credentials they miss
        raise _wrong(fs_url, f"can't be opened: {getattr(error, 'strerror', None) or error}") from error


def _wrong(fs_url: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"media_output_fs_url = {fs_url!r}: {reason}", param="media_output_fs_url")


def _checked_http_url(http_url: str) -> str:
    """The URL that keys are joined to, percent-encoded and without a slash at its end."""
    try:
        parts = urlsplit(http_url)
    except ValueError:
        parts = urlsplit("")
    host = parts.scheme in ("http", "https") and parts.hostname and not re.search(r"[\s\\]", parts.netloc)
    if not host or parts.query or parts.fragment:
        reason = "must be like https://cdn.example.com/media, without '?' and '#'"
        raise InvalidRequest(f"media_output_http_url = {http_url!r}: {reason}", param="media_output_http_url")
    return f"{parts.scheme}://{parts.netloc}{quote(parts.path, safe=_PATH_CHARACTERS)}".rstrip("/")


def _checked(key: str) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InvalidRequest(f"key = {key!r:.100}: not a key of this server, such as {new_key('image', 'png')}", param="key")
    return key


@contextmanager
def _told(key: str, missing: type[StepwellError] = MediaNotFound) -> Iterator[None]:
    """Turn what a place raises into errors that say what was wrong."""
    try:
        yield
    except StepwellError:
        raise
    except FileNotFoundError as error:
        text = f"{key}: no such file" if missing is MediaNotFound else f"{key}: the folder or bucket is gone"
        raise missing(text, param="key") from error
    except Exception as error:  # object stores raise errors of their own, which share no base
        if isinstance(error, OSError) and error.errno in FULL:
            raise StorageFull(f"{key}: the storage is full") from error
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise StorageFailed(f"{key}: the storage failed: {reason}") from error
