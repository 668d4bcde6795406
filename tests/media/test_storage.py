"""Storage: one behaviour on a folder, in memory and on S3 (moto's server, over HTTP); no key but its own; whole or not at all."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from stepwell.errors import InvalidRequest, StepwellError
from stepwell.media.storage import (
    PARTIAL,
    STALE_PARTIAL_S,
    MediaNotFound,
    Storage,
    StorageFailed,
    StorageFull,
    content_type,
    made_at,
    new_key,
)

BUCKET = "stepwell-media"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """An S3 server in a process of its own; yields its URL."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "moto's server did not start"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture
def s3(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment in which s3fs finds the server, and an empty bucket; returns the server's URL."""
    for name, value in {
        "AWS_ENDPOINT_URL": moto_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for path, method in (("moto-api/reset", "POST"), (BUCKET, "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"{moto_server}/{path}", method=method), timeout=10).close()
    return moto_server


@pytest.fixture(params=["folder", "file-url", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Storage(f"s3://{BUCKET}/made/by-stepwell")
    if request.param == "memory":
        return Storage(f"memory://{tmp_path.name}-{os.urandom(4).hex()}")
    folder = tmp_path / "not" / "there yet"
    return Storage(f"file://{folder}" if request.param == "file-url" else str(folder))


# --- the same everywhere ---


def test_put_get_size_and_ranges(storage: Storage) -> None:
    key, content = new_key("video", ".mp4"), os.urandom(100_000)
    storage.put(key, content)
    assert storage.get(key) == content
    assert storage.size(key) == len(content)
    assert storage.exists(key)
    for start, stop in [(0, 1), (0, 100_000), (7, 7), (99_999, 100_000), (500, 70_000), (99_990, 10**15), (100_000, 100_005)]:
        assert storage.read(key, start, stop) == content[start:stop], (start, stop)
    assert storage.read(key, 10**12, 10**12 + 1) == b""


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    key = new_key("image", "png")
    storage.put(key, b"")
    assert (storage.get(key), storage.size(key), storage.read(key, 0, 10)) == (b"", 0, b"")
    assert storage.exists(key) and list(storage.keys()) == [key]


def test_what_is_missing_is_told(storage: Storage) -> None:
    key = new_key("image", "png")
    calls: list[Callable[[], object]] = [
        lambda: storage.get(key),
        lambda: storage.size(key),
        lambda: storage.read(key, 0, 5),
        lambda: storage.read(key, 5, 5),
    ]
    for call in calls:
        with pytest.raises(MediaNotFound) as caught:
            call()
        assert (caught.value.status, caught.value.code, caught.value.kind) == (404, "media_not_found", "invalid_request_error")
        assert key in caught.value.message
    assert not storage.exists(key)
    assert list(storage.keys()) == []


def test_delete_twice(storage: Storage) -> None:
    key, other = new_key("image", "png"), new_key("image", "png")
    storage.put(key, b"one")
    storage.put(other, b"two")
    storage.delete(key)
    storage.delete(key)
    assert not storage.exists(key)
    assert storage.get(other) == b"two"
    assert list(storage.keys()) == [other]


def test_a_folder_within(storage: Storage) -> None:
    inner, key = storage.within("users").within("alice-1"), new_key("image", "png")
    inner.put(key, b"picture")
    assert storage.within("users").within("alice-1").get(key) == b"picture" and not storage.exists(key)
    assert inner.address(key).endswith(f"/users/alice-1/{key}") and key not in list(storage.keys())
    for name in ("", ".", "..", "a/b", "a b", "x" * 81, "a\0", "ä"):
        with pytest.raises(InvalidRequest, match="must be one plain name"):
            storage.within(name)


def test_keys_are_all_and_in_order_of_age(storage: Storage) -> None:
    made = []
    for number in range(12):
        made.append(new_key("image", "png"))
        storage.put(made[-1], bytes([number]))
        time.sleep(0.002)
    clip = new_key("clip", "mp4")
    storage.put(clip, b"")
    assert list(storage.keys()) == [clip, *made]
    ages = [made_at(key) for key in made]
    assert ages == sorted(ages) and time.time() - 60 < ages[0] <= ages[-1] <= time.time()


def test_a_range_must_be_one() -> None:
    storage, key = Storage("memory://ranges"), new_key("image", "png")
    storage.put(key, b"content")
    for start, stop in [(-1, 3), (3, 2), (-5, -1)]:
        with pytest.raises(InvalidRequest, match="start <= stop"):
            storage.read(key, start, stop)


def test_many_threads_share_one_storage(storage: Storage) -> None:
    def work(number: int) -> str:
        key, content = new_key("image", "png"), bytes([number]) * (1000 + number)
        storage.put(key, content)
        assert storage.get(key) == content
        assert storage.read(key, number, number + 100) == content[number : number + 100]
        if number % 2:
            storage.delete(key)
        return key

    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(work, range(40)))
    assert set(storage.keys()) == set(keys[::2])


def test_two_storages_see_each_others_files(storage: Storage, request: pytest.FixtureRequest) -> None:
    """No listing and no size is remembered from before another process wrote."""
    name = request.node.callspec.params["storage"]
    place = storage._place
    url = {"s3": f"s3://{BUCKET}/made/by-stepwell", "memory": f"memory://{getattr(place, '_root', '')}"}.get(name)
    other = Storage(url or str(getattr(place, "_root", "")))
    assert list(other.keys()) == []
    key = new_key("image", "png")
    storage.put(key, b"content")
    assert list(other.keys()) == [key] and other.get(key) == b"content"
    other.put(key, b"longer content")
    assert storage.size(key) == 14
    other.delete(key)
    assert not storage.exists(key) and list(storage.keys()) == []


# --- keys ---

BAD_PARTS = """
.. . / \\ \0 \n ../ ..\\ ../../etc/passwd /etc/passwd \\\\server\\share C:\\windows\\win.ini file:///etc/passwd s3://other/key
%2e%2e%2f %2e%2e/ ..%2f ..%252f ..%c0%af .../...// ~ ~root $HOME `id` $(id) | ; & * ? [a] {a,b} # :: simplecache::file://x
http://127.0.0.1/ é ＂ \u202e ．． ／ ∕ \u0000 \u2028 \ud800 \x7f \x1b[31m \r\nLocation:x %00 <script> ' " \t
con. .nul .partial- .git -rf --help
""".split(" ")


# what a hostile client may try around a right key: its kind, its code and itself
SHAPES = """{key}\n|\n{key}|{key}\0|{key} |{key}.|{kind}|{kind}-{code}|{kind}-{code}.|-{code}.png|{kind}{code}.png|{code}.png\
|{kind}-{code}0.png|{kind}--{code}.png|{kind}-{code}.p.ng|{kind}-{code}.PNG|Image-{code}.png|{kind}-{code}.123456789\
|longerthansixteen-{code}.png"""
AROUND = "{part}|{part}/{key}|{key}/{part}|{part}{key}|{kind}-{part}{code}.png|{kind}-{code}.{part}".split("|")


def hostile_keys() -> list[Any]:
    key = new_key("image", "png")
    kind, code, _ = re.split("[-.]", key)
    bad: list[Any] = ["", " ", "a" * 10_000, "../" * 2_000 + "etc/passwd", None, 7, key.encode(), Path(key), ["image"]]
    bad += [f"{kind}-{digit * 44}.png" for digit in "\u0663g- F"]
    bad += [shape.format(key=key, kind=kind, code=code) for shape in SHAPES.split("|")]
    return bad + [shape.format(key=key, kind=kind, code=code, part=part) for shape in AROUND for part in BAD_PARTS]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_hostile_keys_touch_nothing(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "root" / "media"
    storage = Storage(str(root) if kind == "folder" else "memory://hostile/media", "https://cdn.example.com")
    root.mkdir(parents=True, exist_ok=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root" / new_key("image", "png")).write_bytes(b"outside")
    (root / "inside").write_bytes(b"not a key")
    before = snapshot(tmp_path)
    keys = hostile_keys()
    assert len(keys) >= 200
    for key in keys:
        calls = [partial(call, key) for call in (storage.get, storage.size, storage.exists, storage.delete, storage.path)]
        calls += [partial(call, key) for call in (storage.url, made_at, content_type)]
        calls += [partial(storage.put, key, b"overwritten"), partial(storage.read, key, 0, 10)]
        for call in calls:
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert caught.value.param == "key" and len(caught.value.message) < 300
    assert snapshot(tmp_path) == before
    assert list(storage.keys()) == []


def test_new_keys_are_right_by_construction() -> None:
    keys = {new_key("image", "png") for _ in range(1000)}
    assert len(keys) == 1000
    assert new_key("video", ".mp4").endswith(".mp4")
    assert content_type(new_key("video", ".mp4")) == "video/mp4"
    assert content_type(new_key("thing", "xyz")) == "application/octet-stream"
    for kind, suffix in [("../x", "png"), ("Image", "png"), ("image", "p/g"), ("", "png"), ("image", ""), ("image", "..png")]:
        with pytest.raises(InvalidRequest):
            new_key(kind, suffix)


def test_a_folders_other_files_are_not_keys(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    key = new_key("image", "png")
    storage.put(key, b"content")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / new_key("image", "png")).mkdir()
    assert list(storage.keys()) == [key]
    folder = next(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert not storage.exists(folder)
    with pytest.raises(MediaNotFound):
        storage.get(folder)


# --- whole or not at all ---


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    storage, key = Storage(str(tmp_path)), new_key("video", "mp4")
    versions = [bytes([number]) * 1_000_000 for number in range(3)]
    storage.put(key, versions[0])
    stop, seen, wrong = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            content = storage.get(key)
            seen.add(content[0])
            if content not in versions:
                wrong.append(len(content))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(30):
        storage.put(key, versions[number % 3])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong and len(seen) > 1
    assert [path.name for path in tmp_path.iterdir()] == [key]


REAL_WRITE, REAL_FSYNC = os.write, os.fsync


@pytest.mark.parametrize("at", ["write", "fsync", "replace", "fsync of the folder"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_nothing(at: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, key = Storage(str(tmp_path)), new_key("image", "png")
    calls = 0

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    def fail_later(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            fail()
        REAL_FSYNC(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, at.split()[0], fail_later if at.endswith("folder") else fail)
        with pytest.raises(StorageFailed) as caught:
            storage.put(key, b"content")
    full = number != errno.EIO
    assert (caught.value.status, caught.value.code) == ((507, "storage_full") if full else (500, "storage_failed"))
    assert isinstance(caught.value, StorageFull) == full
    assert str(tmp_path) not in caught.value.message
    assert list(tmp_path.iterdir()) == [] and not storage.exists(key)
    storage.put(key, b"content")  # the disk has room again
    assert storage.get(key) == b"content"


def test_a_disk_that_fills_up_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, key = Storage(str(tmp_path)), new_key("image", "png")

    def write_a_little(descriptor: int, data: memoryview) -> int:
        if len(data) > 50:
            return REAL_WRITE(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_a_little)
        with pytest.raises(StorageFull):
            storage.put(key, bytes(1000))
    assert list(tmp_path.iterdir()) == []


def in_a_process(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    start = f"import os, signal, resource\nfrom stepwell.media.storage import *\nstorage = Storage({str(folder)!r})\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=30)


def test_the_kernel_refuses_a_write(tmp_path: Path) -> None:
    """A real failure half-way through a file: the process may write no more than 64 KiB."""
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    storage.put(new_key("image", "png"), bytes(200_000))
except StorageFailed as error:
    print(error.status, error)
"""
    done = in_a_process(tmp_path, code)
    assert done.returncode == 0 and done.stdout.startswith("500 "), done
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_file_and_its_rest_is_swept(tmp_path: Path) -> None:
    code = """
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
storage.put(new_key("image", "png"), bytes(200_000))
"""
    assert in_a_process(tmp_path, code).returncode == -signal.SIGKILL
    (rest,) = tmp_path.iterdir()
    assert rest.name.startswith(PARTIAL)
    assert list(Storage(str(tmp_path)).keys()) == [] and rest.exists()  # it could be somebody's at work
    old = time.time() - STALE_PARTIAL_S - 1
    os.utime(rest, (old, old))
    Storage(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_went_away(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "media"))
    (tmp_path / "media").rmdir()
    with pytest.raises(StorageFailed, match="gone"):
        storage.put(new_key("image", "png"), b"content")
    assert not (tmp_path / "media").exists()


# --- where files are ---


def test_paths_for_sendfile(tmp_path: Path, s3: str) -> None:
    local, key = Storage(str(tmp_path)), new_key("image", "png")
    with pytest.raises(MediaNotFound):
        local.path(key)
    local.put(key, b"content")
    assert local.path(key) == tmp_path / key
    assert Storage("memory://paths").path(key) is None
    assert Storage(f"s3://{BUCKET}").path(key) is None


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage, key = Storage("media"), new_key("image", "png")
    monkeypatch.chdir("/")
    storage.put(key, b"content")
    assert (tmp_path / "media" / key).read_bytes() == b"content"


@pytest.mark.parametrize(
    ("http_url", "start"),
    [
        ("https://cdn.example.com", "https://cdn.example.com/"),
        ("https://cdn.example.com/", "https://cdn.example.com/"),
        ("http://cdn.example.com:8080/a/b//", "http://cdn.example.com:8080/a/b/"),
        ("https://cdn.example.com/my media/ü", "https://cdn.example.com/my%20media/%C3%BC/"),
        ("https://cdn.example.com/my%20media", "https://cdn.example.com/my%20media/"),
    ],
)
def test_urls(http_url: str, start: str) -> None:
    key = new_key("image", "png")
    assert Storage("memory://urls", http_url).url(key) == start + key
    assert Storage("memory://urls").url(key) is None


@pytest.mark.parametrize(
    "http_url", ["", "cdn.example.com", "ftp://x/", "https://", "https:///a", "https://a/?b=c", "https://a/#b", "http://["]
)
def test_a_wrong_http_url(http_url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Storage("memory://urls", http_url)
    assert caught.value.param == "media_output_http_url" and repr(http_url) in caught.value.message


@pytest.mark.parametrize(
    ("fs_url", "reason"),
    [
        ("", "file:///a/folder"),
        ("gopher://x/y", "s3://bucket/prefix"),
        ("http://example.com/media", "s3://bucket/prefix"),
        ("simplecache::s3://bucket", "s3://bucket/prefix"),
        ("file:/var/media", "file:///a/folder"),
        ("file://var/media", "three slashes"),
        ("file://", "three slashes"),
        ("with\0nul", "file:///a/folder"),
        ("s3://", "plain prefix"),
        ("s3:///prefix", "plain prefix"),
        ("s3://bucket/../other", "plain prefix"),
        ("s3://bucket//double", "plain prefix"),
        ("s3://bucket/*", "plain prefix"),
        ("s3://bucket/a?versionId=1", "plain prefix"),
        ("memory://..", "plain prefix"),
        ("/dev/null", "a file is in the way"),
        ("file:///dev/null/media", "a file is in the way"),
        ("/proc/nobody-can-make-this", "can't be opened"),
    ],
)
def test_a_wrong_fs_url(fs_url: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Storage(fs_url)
    assert caught.value.param == "media_output_fs_url"
    assert repr(fs_url) in caught.value.message and reason in caught.value.message


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)  # where it lies once it was imported
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'stepwell\[s3\]'"):
        Storage("s3://bucket/prefix")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(InvalidRequest, match="pip install 'gcsfs'"):
            Storage("gs://bucket/prefix")


# --- S3 ---


def test_s3_files_can_be_shown_by_a_browser(s3: str) -> None:
    storage = Storage(f"s3://{BUCKET}/shown", f"{s3}/{BUCKET}/shown")
    key = new_key("image", "webp")
    storage.put(key, b"content")
    fsspec.filesystem("s3", skip_instance_cache=True).chmod(f"{BUCKET}/shown/{key}", "public-read")
    url = storage.url(key)
    assert url is not None
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read() == b"content" and answer.headers["Content-Type"] == "image/webp"


def test_s3_prefixes_are_apart(s3: str) -> None:
    one, two, whole = Storage(f"s3://{BUCKET}/one"), Storage(f"s3://{BUCKET}/one/two/"), Storage(f"s3://{BUCKET}")
    key = new_key("image", "png")
    two.put(key, b"content")
    assert list(one.keys()) == list(whole.keys()) == []
    assert not one.exists(key) and two.exists(key)
    one.delete(key)
    assert two.exists(key)


def test_s3_without_the_bucket(s3: str) -> None:
    storage = Storage("s3://no-such-bucket/prefix")
    with pytest.raises(StorageFailed) as caught:
        storage.put(new_key("image", "png"), b"content")
    assert caught.value.status == 500
    with pytest.raises(StepwellError):
        storage.get(new_key("image", "png"))


def test_s3_without_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    storage = Storage(f"s3://{BUCKET}/prefix")
    with pytest.raises(StorageFailed, match="credentials"):
        storage.put(new_key("image", "png"), b"content")


def test_s3_that_does_not_answer(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage = Storage(f"s3://{BUCKET}/prefix")
    with pytest.raises(StorageFailed):
        storage.put(new_key("image", "png"), b"content")
    with pytest.raises(StorageFailed):  # not MediaNotFound: nobody knows whether it is there
        storage.get(new_key("image", "png"))
