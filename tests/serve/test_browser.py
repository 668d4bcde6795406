"""A browser plays what the server serves: Debian's Chromium, headless, with a page that tells what it sees."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.sdk import Sdk, made
from tests.support.server import fake, running

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
CHROMIUM = shutil.which("chromium")
LIMIT_S = 90
FLAGS = ("--headless", "--disable-gpu", "--autoplay-policy=no-user-gesture-required", "--no-first-run", "--disable-dev-shm-usage",
         "--no-sandbox")  # root has none, and it sees nothing but what is ours  # fmt: skip
PAGE = """<!doctype html><meta charset="utf-8"><video id="video" muted autoplay src="SOURCE"></video><script>
const video = document.getElementById("video"), times = [];
video.ontimeupdate = () => times.push(video.currentTime);
function tell(end) {
  fetch("/seen", {method: "POST", body: JSON.stringify({
    end, times, width: video.videoWidth, height: video.videoHeight, duration: video.duration,
    frames: video.getVideoPlaybackQuality().totalVideoFrames, error: video.error && video.error.message})});
}
video.onended = () => tell("ended");
video.onerror = () => tell("error");
</script>"""


@contextmanager
def page(source: str) -> Iterator[tuple[str, queue.Queue[dict[str, Any]]]]:
    """The URL of a page that plays a video, and what it says in the end."""
    seen: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(PAGE.replace("SOURCE", source).encode() if self.path == "/" else b"")

        def do_POST(self) -> None:
            seen.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._answer(b"")

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", seen
        finally:
            server.shutdown()
            thread.join()


def watched(source: str, profile: Path) -> dict[str, Any]:
    """What Chromium's page says once the video has ended, or could not be played."""
    assert CHROMIUM is not None
    with page(source) as (url, seen), (profile / "log").open("wb") as log:
        command = (CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", url)
        browser = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            return seen.get(timeout=LIMIT_S)
        except queue.Empty:
            pytest.fail(f"the page told nothing; Chromium said: {(profile / 'log').read_text(errors='replace')[-2000:]}")
        finally:
            browser.terminate()
            browser.wait(20)


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed; `make browser` does it as root")
@pytest.mark.parametrize(("size", "frames", "fps"), [("96x64", 33, 16), ("832x480", 25, 24)])
def test_chromium_plays_a_served_video(size: str, frames: int, fps: int, tmp_path: Path) -> None:
    with running(fake("video", step_ms=1), tmp_path / "data") as server:
        sdk = Sdk("sync", f"{server.url}/v1", timeout=60)
        body = {"num_frames": frames, "fps": fps, "num_inference_steps": 1}
        video = made(sdk, prompt="a moving gradient", size=size, extra_body=body)
        (tmp_path / "profile").mkdir()
        seen = watched(f"{server.url}/v1/videos/{video.id}/content", tmp_path / "profile")
    assert (seen["end"], seen["error"]) == ("ended", None), seen
    assert (seen["width"], seen["height"]) == tuple(map(int, size.split("x")))
    assert seen["duration"] == pytest.approx(frames / fps, abs=1e-3)
    times = seen["times"]
    assert times == sorted(times) and len(set(times)) >= 3 and times[-1] == pytest.approx(frames / fps, abs=0.05)
    assert seen["frames"] >= frames // 2  # shown or dropped late, on a machine that is busy; a still picture would be one


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed; `make browser` does it as root")
def test_chromium_tells_what_is_no_video(tmp_path: Path) -> None:
    """The test above can fail: the page reports what can't be played."""
    with page("x") as (url, _):
        (tmp_path / "profile").mkdir()
        assert watched(url, tmp_path / "profile")["end"] == "error"
