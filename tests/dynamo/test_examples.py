"""What is in examples/dynamo runs, or is what systemd and Kubernetes take."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from benchmarks.cluster import free_port, names, until
from stepwell.cli.flags import Flags
from tests.support.dynamo import needs_dynamo

EXAMPLES = Path("examples/dynamo")
UNIT, MANIFEST = EXAMPLES / "deploy" / "stepwell-worker@.service", EXAMPLES / "deploy" / "kubernetes.yaml"


@contextmanager
def launched(script: str, folder: Path, *arguments: str) -> Iterator[str]:
    """A script that runs, until its frontend knows a model; the frontend's URL."""
    port = free_port()
    env = {**os.environ, "RUN": str(folder), "BIN": str(Path(sys.executable).parent), "SYSTEM_PORT": str(free_port()),
           "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0"}  # fmt: skip
    line = [str(EXAMPLES / "launch" / script), "--http-port", str(port), *arguments]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or names(url), 120, script)
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@needs_dynamo
def test_pictures_by_the_scripts(tmp_path: Path) -> None:
    port = free_port()
    media = tmp_path / "media"
    media.mkdir()
    server = subprocess.Popen([sys.executable, str(EXAMPLES / "serve_media.py"), str(media), "--port", str(port)])
    try:
        base = f"http://127.0.0.1:{port}"
        with launched("image_diffusion.sh", tmp_path, "--http-url", base, "--", "--threads", "1") as url:
            body = {"model": "stepwell/tiny-flux", "prompt": "a red star", "size": "64x64", "response_format": "url",
                    "user": "alice", "nvext": {"num_inference_steps": 1}}  # fmt: skip
            made = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60, trust_env=False)
            assert made.status_code == 200, made.text
            found = made.json()["data"][0]["url"]
            assert found.startswith(f"{base}/users/alice/image-")
            answer = httpx.get(found, trust_env=False)
            assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the example serves a folder with a file of ten bytes, an empty one and one outside."""
    folder = tmp_path_factory.mktemp("served") / "media"
    (folder / "users").mkdir(parents=True)
    (folder / "video.mp4").write_bytes(b"0123456789")
    (folder / "empty.png").write_bytes(b"")
    (folder.parent / "secret").write_bytes(b"secret")
    port = free_port()
    server = subprocess.Popen([sys.executable, str(EXAMPLES / "serve_media.py"), str(folder), "--port", str(port)])
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, trust_env=False).status_code == 404
        return False

    try:
        until(answers, 30, "the server of media")
        yield url
    finally:
        server.kill()
        server.wait()


def test_media_are_files_only(media: str) -> None:
    for path in ("/", "/users/", "/a%00.png", "/none.mp4", "/../secret", "/%2e%2e/secret", "/video.mp4/"):
        assert httpx.get(media + path, trust_env=False).status_code == 404, path
    answer = httpx.get(f"{media}/video.mp4", trust_env=False)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"0123456789", "video/mp4")
    assert answer.headers["accept-ranges"] == "bytes" and answer.headers["x-content-type-options"] == "nosniff"
    answer = httpx.get(f"{media}/empty.png", trust_env=False)
    assert (answer.status_code, answer.content) == (200, b"")
    head = httpx.head(f"{media}/video.mp4", headers={"Range": "bytes=2-3"}, trust_env=False)  # which has no ranges
    assert (head.status_code, head.headers["content-length"], head.headers["accept-ranges"]) == (200, "10", "bytes")


@pytest.mark.parametrize(("asked", "status", "content", "said"), [
    ("bytes=0-1", 206, b"01", "bytes 0-1/10"), ("bytes=0-", 206, b"0123456789", "bytes 0-9/10"),
    ("bytes=4-", 206, b"456789", "bytes 4-9/10"), ("bytes=9-99", 206, b"9", "bytes 9-9/10"),
    ("bytes=-3", 206, b"789", "bytes 7-9/10"), ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
    ("bytes=10-", 416, None, "bytes */10"), ("bytes=-0", 416, None, "bytes */10"), ("bytes=99-100", 416, None, "bytes */10"),
    ("bytes=5-4", 200, b"0123456789", None), ("bytes=0-1,4-5", 200, b"0123456789", None), ("bytes=-", 200, b"0123456789", None),
    ("lines=0-1", 200, b"0123456789", None), ("bytes=a-b", 200, b"0123456789", None), (f"bytes={'9' * 99}-", 416, None, None),
])  # fmt: skip
def test_media_come_in_parts(media: str, asked: str, status: int, content: bytes | None, said: str | None) -> None:
    """What browsers need to go to a place in a video."""
    answer = httpx.get(f"{media}/video.mp4", headers={"Range": asked}, trust_env=False)
    assert answer.status_code == status and said in (None, answer.headers.get("content-range"))
    assert content in (None, answer.content) and answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    if status != 206:
        assert status == 416 or "content-range" not in answer.headers


def test_a_part_of_media_that_have_changed_is_not_taken_for_one(media: str) -> None:
    first = httpx.get(f"{media}/video.mp4", trust_env=False).headers["last-modified"]
    for when, status in ((first, 206), ("Mon, 01 Jan 2001 00:00:00 GMT", 200), ('"tag"', 200)):
        answer = httpx.get(f"{media}/video.mp4", headers={"Range": "bytes=2-3", "If-Range": when}, trust_env=False)
        assert answer.status_code == status
    answer = httpx.get(f"{media}/video.mp4", headers={"If-Modified-Since": first}, trust_env=False)
    assert answer.status_code == 304
    assert httpx.get(f"{media}/none.mp4", headers={"Range": "bytes=0-1"}, trust_env=False).status_code == 404
    assert httpx.get(f"{media}/users/", headers={"Range": "bytes=0-1"}, trust_env=False).status_code == 404


@pytest.mark.parametrize("host", [None, ""])
@pytest.mark.parametrize("arguments", [["first"], ["second", "10.0.0.1"]])
def test_several_hosts_need_an_address(arguments: list[str], host: str | None, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "HOST"} | ({} if host is None else {"HOST": host})
    made = subprocess.run([EXAMPLES / "launch" / "two_hosts.sh", *arguments], capture_output=True, text=True, timeout=20,
                          env={**env, "RUN": str(tmp_path / "run")})  # fmt: skip
    assert made.returncode == 2 and "two_hosts.sh: HOST is not set: the address by which the other hosts reach" in made.stderr
    assert not (tmp_path / "run").exists()  # nothing was begun


@needs_dynamo
def test_videos_by_the_script(tmp_path: Path) -> None:
    with launched("text-to-video-diffusion.sh", tmp_path) as url:
        body = {"model": "stepwell/tiny-wan", "prompt": "a red circle", "nvext": {"num_inference_steps": 1, "num_frames": 5}}
        found = httpx.post(f"{url}/v1/videos", json=body, timeout=60, trust_env=False).json()["data"][0]["url"]
        assert found.startswith(f"file://{tmp_path}/media/video-") and Path(found.removeprefix("file://")).exists()


@needs_dynamo
def test_ranks_by_the_script(tmp_path: Path) -> None:
    with launched("ranks.sh", tmp_path, "--", "--threads", "1") as url:
        nvext = {"num_inference_steps": 2, "num_frames": 5, "guidance_scale": 3.0}  # two branches, one for each
        body = {"model": "stepwell/tiny-wan", "prompt": "a red circle", "nvext": nvext}
        made = httpx.post(f"{url}/v1/videos", json=body, timeout=60, trust_env=False)
        assert made.status_code == 200 and made.json()["data"][0]["url"].startswith(f"file://{tmp_path}/media/video-")
    log = (tmp_path / "log").read_text()
    assert "has lost the others" not in log  # they were let go


@pytest.mark.parametrize(("script", "arguments", "message"), [
    ("text-to-video-diffusion.sh", ["--wan-size", "3b"], "--wan-size is 1b or 14b"),
    ("text-to-video-diffusion.sh", ["--wan-szie", "1b"], "unknown option --wan-szie; there are: wan-size"),
    ("image_diffusion.sh", ["--fs-url"], "--fs-url needs a value"),
    ("two_hosts.sh", [], "usage: HOST=ADDRESS two_hosts.sh first"),
    ("two_hosts.sh", ["second"], "usage: HOST=ADDRESS two_hosts.sh first | second ADDRESS_OF_THE_FIRST"),
    ("two_hosts.sh", ["second", "--", "--threads", "1"], "usage: HOST=ADDRESS two_hosts.sh first"),
])  # fmt: skip
def test_scripts_refuse_what_they_do_not_know(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    made = subprocess.run([EXAMPLES / "launch" / script, *arguments], capture_output=True, text=True,
                          env={**os.environ, "RUN": str(tmp_path)})  # fmt: skip
    assert made.returncode == 2 and message in made.stderr


def test_scripts_say_what_is_not_installed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    made = subprocess.run([EXAMPLES / "launch" / "image_diffusion.sh"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "RUN": str(tmp_path), "BIN": str(tmp_path)})  # fmt: skip
    assert made.returncode == 1 and "make setup-dynamo" in made.stderr


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("launch/*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_the_unit_verifies(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/stepwell/.venv/bin/stepwell", "/bin/true"))  # which has to be there
    made = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")


def test_the_unit_starts_a_worker() -> None:
    (line,) = re.findall(r"^ExecStart=/opt/stepwell/.venv/bin/stepwell worker (.*)$", UNIT.read_text(), re.MULTILINE)
    given, _ = Flags("worker", "").parse(line.split())
    assert set(given) == {"model_path", "served_model_name", "drain_seconds"}
    stops = int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)[0])
    assert stops > float(given["drain_seconds"]) + 5


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def test_the_manifest_is_one() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for manifest in manifests():
        assert validator.validate(manifest, "1.33", strict=True)


def test_the_manifest_starts_workers_that_are_found() -> None:
    found = {manifest["metadata"]["name"]: manifest["spec"] for manifest in manifests() if manifest["kind"] == "Deployment"}
    worker, frontend = (found[name]["template"]["spec"] for name in ("pictures", "frontend"))
    (container,), (other,) = worker["containers"], frontend["containers"]
    assert container["command"][:2] == ["stepwell", "worker"]
    flags = Flags("worker", "")
    given, _ = flags.parse(container["command"][2:])
    flags.load(given, None)
    assert worker["terminationGracePeriodSeconds"] > float(given["drain_seconds"]) + 5
    mine, theirs = ({entry["name"]: json.dumps(entry) for entry in each["env"]} for each in (container, other))
    assert all(mine[name] == value for name, value in theirs.items())  # or they would not meet
    for manifest in manifests():
        if manifest["kind"] == "Service":
            labels = found[manifest["metadata"]["name"]]["template"]["metadata"]["labels"]
            assert manifest["spec"]["selector"] == labels
