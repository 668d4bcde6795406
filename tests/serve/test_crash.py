"""`stepwell serve` as a process of its own, killed, stopped and deserted: nothing that was acknowledged is lost.

`-m long` runs the same with many more kills and clients.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from benchmarks import livez
from stepwell.cli.serve import END_S
from stepwell.media.video import probe
from tests.support.command import Command, until

VIDEO = "stepwell/fake-video?step_ms=5"
ENDS_AFTER = "import sys; from stepwell.cli import main, serve; serve.END_S = {}; sys.exit(main.main())"
DEATH_S = 2.0  # within which an engine without a server is gone, and a server without an engine says so
SMALL = {"size": "32x32", "num_frames": 5, "num_inference_steps": 4}


def long(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


class Clients:
    """Threads that order videos as long as they are let, each with a prompt of its own, and note what was promised them."""

    def __init__(self, url: str, count: int, pause_s: float, **body: Any):
        self.promised: list[str] = []
        self.statuses: Counter[int] = Counter()
        self._url, self._pause_s, self._body = url, pause_s, body
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._order, args=(number,)) for number in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _order(self, number: int) -> None:
        turn = 0
        with httpx.Client(timeout=10, trust_env=False) as http:
            while not self._stop.wait(self._pause_s):
                turn += 1
                try:
                    answer = http.post(f"{self._url}/v1/videos", json={"prompt": f"star {turn} of {number}", **self._body})
                except httpx.TransportError:
                    self.statuses[0] += 1
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    self.promised.append(answer.json()["id"])


def check_end(server: Command, promised: list[str], reasons: set[str]) -> Counter[str]:
    """Every promised video plays or has failed for one of the reasons, is there once, and nothing else lies about."""
    until(lambda: server.health().get("jobs") == 0, 60, "every job has ended")
    outcomes: Counter[str] = Counter()
    for video_id in promised:
        video = server.http.get(f"/v1/videos/{video_id}").json()
        outcomes[video["status"]] += 1
        if video["status"] == "failed":
            assert video["error"]["code"] in reasons and video["error"]["message"], video
            continue
        assert video["status"] == "completed", video
        assert probe(server.http.get(f"/v1/videos/{video_id}/content").content).frames == 5
    rows = server.rows()
    assert len(set(promised)) == len(promised) and Counter(row["id"] for row in rows) >= Counter(promised)
    assert {row["status"] for row in rows} <= {"completed", "failed"}
    named = [key for row in rows if row["result"] for key in json.loads(row["result"])["keys"].values()]
    lost = sum(row["status"] == "failed" for row in rows)
    found = {name for name in server.files() if not name.startswith(".partial-")}
    assert len(named) == len(set(named)) == 3 * (len(rows) - lost) and found >= set(named)
    wanted = {key for row in rows for key in json.loads(row["request"])["keys"].values()}
    assert found <= wanted, "files that no row names"
    return outcomes


@pytest.mark.parametrize("kills", [8, long(50)])
def test_no_promise_is_lost_however_often_the_server_is_killed(tmp_path: Path, kills: int) -> None:
    rng = random.Random(1)
    slowest_s = 0.0
    with Command(VIDEO, tmp_path) as server, Clients(server.url, 3, 0.05, **SMALL) as clients:
        for turn in range(kills):
            server.begin()
            if turn % 2 == 0:  # while the engine's process has hardly begun
                until(server.engines, 20, "an engine")
            else:
                server.wait_ready()
                time.sleep(rng.uniform(0, 0.8))
            assert server.engines()
            server.kill()
            slowest_s = max(slowest_s, until(lambda: not server.engines(), DEATH_S, "the engine is gone with its server"))
        server.start()
        time.sleep(0.3)
        clients.__exit__()
        began = time.monotonic()
        outcomes = check_end(server, clients.promised, {"server_lost"})
        print(f"\n{kills} kills of the server: {len(clients.promised)} promised, {dict(outcomes)}, answers {clients.statuses}, "
              f"engine gone within {slowest_s:.2f} s, all ended after {time.monotonic() - began:.1f} s more")  # fmt: skip
        assert len(clients.promised) > kills and outcomes["completed"] > kills
        assert server.stop() == 0 and not server.engines() and not server.complaints()
        assert not list(Path(server.temporary).iterdir()), "sockets of dead engines are left"


@pytest.mark.parametrize("kills", [6, long(50)])
def test_an_engine_that_is_killed_comes_back_and_loses_nobody_who_waits(tmp_path: Path, kills: int) -> None:
    rng = random.Random(2)
    noticed_s, back_s = 0.0, 0.0
    with Command(VIDEO, tmp_path, "--max-running-samples", "2") as server:
        server.start()
        with Clients(server.url, 3, 0.1, **SMALL) as clients:
            until(lambda: len(clients.promised) > 5, 10, "a few orders")
            for turn in range(kills):
                time.sleep(rng.uniform(0, 0.3))
                (engine,) = server.engines()
                waiting = {row["id"] for row in server.rows() if row["status"] == "queued"}
                os.kill(engine, signal.SIGKILL)

                def is_noticed(before: int = turn) -> bool:
                    return server.readiness() == 503 or server.health().get("restarts", 0) > before

                noticed_s = max(noticed_s, until(is_noticed, DEATH_S, "the death is noticed"))
                back_s = max(back_s, server.wait_ready(10))
        outcomes = check_end(server, clients.promised, {"worker_lost"})
        print(f"\n{kills} kills of the engine: {len(clients.promised)} promised, {dict(outcomes)}, "
              f"noticed within {noticed_s:.2f} s, back within {back_s:.2f} s")  # fmt: skip
        assert server.health()["restarts"] == kills and set(clients.statuses) == {200}
        assert {row["status"] for row in server.rows() if row["id"] in waiting} <= {"completed"}
        assert outcomes["failed"] <= kills, "two were under way at a time, and it takes two deaths to fail one"
        assert server.stop() == 0 and not server.complaints()


# --------------------------------------------------------------------------------------------------------------- asked to stop
def ask(server: Command, **body: Any) -> httpx.Response:
    """One picture, and the wait for it."""
    wanted = {"prompt": "a star", "size": "64x64", "response_format": "b64_json", "seed": 7, **body}
    return server.http.post("/v1/images/generations", json=wanted)


def running(server: Command) -> int:
    return int(server.health().get("running", 0))


def test_asked_to_stop_it_finishes_the_picture_that_somebody_waits_for(tmp_path: Path) -> None:
    with Command("stepwell/fake-image?step_ms=50", tmp_path) as server, ThreadPoolExecutor(2) as pool:
        server.start()
        asked = pool.submit(ask, server, num_inference_steps=60)
        until(lambda: running(server), 10, "the picture is begun")
        began = time.monotonic()
        server.signal()
        until(lambda: server.readiness() == 503, 2, "not ready any more")
        refused = ask(server)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["message"] == "the server is shutting down"
        assert server.health()["status"] == "draining" and running(server) == 1
        assert asked.result().status_code == 200
        assert server.process is not None and server.process.wait(5) == 0
        print(f"\nSIGTERM with a picture of 3 s under way: over after {time.monotonic() - began:.2f} s")

        server.start()
        asked = pool.submit(ask, server, num_inference_steps=1000)
        until(lambda: running(server), 10, "the picture is begun")
        server.signal()
        until(lambda: server.readiness() == 503, 2, "not ready any more")
        began = time.monotonic()
        code = server.stop(3)
        print(f"a second SIGTERM: over after {time.monotonic() - began:.2f} s, exit code {code}")
        assert asked.result().json()["error"]["code"] == "engine_closed" and not server.engines() and not server.complaints()


def test_who_waits_for_too_long_is_told_when_the_time_is_over(tmp_path: Path) -> None:
    with Command("stepwell/fake-image?step_ms=50", tmp_path, "--drain-seconds", "0.3") as server:
        server.start()
        waiting = [leave_waiting(server), leave_waiting(server, stream=True, partial_images=1)]
        until(lambda: running(server) == 2, 10, "two are running")
        began = time.monotonic()
        assert server.stop(0.3 + 5) == 0
        took_s = time.monotonic() - began
        answers = [b"".join(iter(lambda one=one: one.recv(4096), b"")) for one in waiting]  # type: ignore[misc]
        print(f"\nSIGTERM with drain_seconds = 0.3 and two who wait: over after {took_s:.2f} s")
        assert answers[0].startswith(b"HTTP/1.1 503") and b"retry-after" in answers[0]
        assert all(b'"code":"engine_closed"' in answer.replace(b": ", b":") for answer in answers) and not server.complaints()


@pytest.mark.parametrize("end_s", [2, long(END_S)])
def test_a_storage_that_hangs_does_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end_s: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with Command(VIDEO, tmp_path, "--media-output-fs-url", "s3://bucket/x", "--drain-seconds", "0.3") as server:
            server.line = (sys.executable, "-c", ENDS_AFTER.format(end_s), *server.line[3:])
            server.start()
            for _ in range(8):
                assert server.http.post("/v1/videos", json={"prompt": "x", **SMALL}).status_code == 200
            time.sleep(1)  # they are made and being stored
            assert server.stop(0.3 + end_s + 10) == 0


def test_asked_to_stop_it_leaves_the_queue_to_the_next_start(tmp_path: Path) -> None:
    with Command(VIDEO, tmp_path, "--max-running-samples", "2", "--drain-seconds", "0.3") as server:
        server.start()
        with Clients(server.url, 3, 0.02, **{**SMALL, "num_inference_steps": 60}) as clients:
            until(lambda: len(clients.promised) >= 6, 10, "orders")
            watching = [follow(server, video_id) for video_id in clients.promised[-3:]]
            began = time.monotonic()
            server.signal()
            until(lambda: server.readiness() == 503, 0.5, "not ready any more")
            until(lambda: clients.statuses[503], 1, "orders are refused")
            assert server.process is not None and server.process.wait(0.3 + 5) == 0
            took_s = time.monotonic() - began
        for stream in watching:
            stream.close()
        left = sum(row["status"] in ("queued", "in_progress") for row in server.rows())
        server.start()
        outcomes = check_end(server, clients.promised, set())
        print(f"\nSIGTERM with a queue: over after {took_s:.2f} s, {left} of {len(clients.promised)} left, then {dict(outcomes)}")
        assert left and not server.complaints()


# ------------------------------------------------------------------------------------------------------------- clients who leave
def follow(server: Command, video_id: str) -> socket.socket:
    """A connection on which the events of a video come in."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"GET /v1/videos/{video_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def leave_waiting(server: Command, **body: Any) -> socket.socket:
    """A connection on which a picture was asked for that takes very long."""
    content = json.dumps({"prompt": "a cat", "size": "64x64", "num_inference_steps": 1000, **body}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize(
    ("model", "step_s"), [("stepwell/fake-image?step_ms=50", 0.05), long("stepwell/tiny-flux", 0.25)], ids=["fake", "tiny-flux"]
)
def test_who_hangs_up_costs_a_step_and_nobody_elses_picture(tmp_path: Path, model: str, step_s: float) -> None:
    with Command(model, tmp_path, "--threads", "1") as server, ThreadPoolExecutor(1) as pool:
        server.start()
        quiet = pixels(ask(server, num_inference_steps=12))
        leavers = {"a sync request": leave_waiting(server), "a stream": leave_waiting(server, stream=True, partial_images=1)}
        until(lambda: running(server) == 2, 10, "two are running")
        neighbour = pool.submit(ask, server, num_inference_steps=12)
        until(lambda: running(server) == 3, 10, "three are running")
        for left, (name, connection) in zip((2, 1), leavers.items(), strict=True):
            connection.close()
            took_s = until(lambda most=left: running(server) <= most, 0.5 + 2 * step_s, f"{name} is given up")  # type: ignore[misc]
            print(f"\n{model}: {name} was given up {took_s * 1e3:.0f} ms after its client hung up")
        assert pixels(neighbour.result()) == quiet
        until(lambda: not running(server), 1, "nothing runs")
        steps = server.metric("stepwell_steps_total")
        time.sleep(3 * step_s)
        assert server.metric("stepwell_steps_total") == steps and server.metric("stepwell_held_samples") == 0
        assert server.metric("stepwell_aborts_total") == 2 and not server.complaints()


def pixels(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as image:
        return image.convert("RGB").tobytes()


@pytest.mark.clock
@pytest.mark.parametrize(("clients", "seconds", "limit_ms"), [(60, 2, 150), long(200, 15, 50)])
def test_livez_answers_at_once_while_many_follow(tmp_path: Path, clients: int, seconds: float, limit_ms: float) -> None:
    with Command(VIDEO, tmp_path) as server:
        server.start()
        report = livez.measure(server.port, clients, seconds)
        print(f"\n{report}")
        assert report["events"] > clients and report["polls"] > clients and report["videos"]
        assert report["livez_ms"]["p99"] <= limit_ms and not server.complaints()


# --------------------------------------------------------------------------------------------------------- after the end of a job
@contextmanager
def receiver() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A local receiver of webhooks: its URL, and what it was sent."""
    received: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *_: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}/hook", received
    http.shutdown()
    thread.join()
    http.server_close()


def test_the_end_of_a_job_is_told_and_its_result_expires(tmp_path: Path) -> None:
    key = bytes(range(32))
    secret = f"whsec_{base64.b64encode(key).decode()}"
    with receiver() as (url, received):
        flags = ("--webhook-url", url, "--webhook-secret", secret, "--media-ttl-seconds", "2")
        with Command(VIDEO, tmp_path, *flags) as server:
            server.start()
            made = server.http.post("/v1/videos", json={"prompt": "a star", **SMALL}).json()["id"]
            failed = server.http.post("/v1/videos", json={"prompt": "poison", **SMALL}).json()["id"]
            until(lambda: len(received) == 2, 5, "both are told")
            for headers, body in received:
                signed = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body))
                expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
                assert (
                    headers["webhook-signature"] == f"v1,{expected}" and abs(int(headers["webhook-timestamp"]) - time.time()) < 10
                )
            told = {json.loads(body)["data"]["id"]: json.loads(body)["type"] for _, body in received}
            assert told == {made: "video.completed", failed: "video.failed"}
            assert server.http.get(f"/v1/videos/{made}/content").status_code == 200 and len(server.files()) == 3
            until(lambda: not server.rows() and not server.files(), 6, "rows and files are gone")
            assert server.http.get(f"/v1/videos/{made}").status_code == 404
            assert server.stop() == 0 and not server.complaints()


# ----------------------------------------------------------------------------------------------------------------- not started
def refusal(server: Command) -> str:
    """The one line, besides what is being loaded, of a command that ends with exit code 2."""
    server.begin()
    assert server.process is not None and server.process.wait(30) == 2
    lines = [line for line in server.log.read_text().splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1 and lines[0].startswith("stepwell serve: error: "), lines
    assert not server.engines() and not list(Path(server.temporary).iterdir())
    return lines[0]


def test_what_can_not_be_served_is_refused_in_one_line(tmp_path: Path) -> None:
    with Command(VIDEO, tmp_path) as first:
        first.start()
        with Command(VIDEO, tmp_path) as second:
            assert re.search(r"jobs\.sqlite.*another server \(process \d+\) has it in use", refusal(second))
        assert first.readiness() == 200
        assert first.http.post("/v1/videos", json={"prompt": "a star", **SMALL}).status_code == 200
    with Command("/no/such/model", tmp_path, data=tmp_path / "other") as bad:
        assert "/no/such/model" in refusal(bad)
    with Command(VIDEO, tmp_path, "--host", "0.0.0.0", data=tmp_path / "open") as bad:
        assert "host = '0.0.0.0'" in refusal(bad) and not bad.data.exists()


@pytest.mark.parametrize("turns", [1, long(20)])
def test_stopped_while_it_loads_it_goes_quietly(tmp_path: Path, turns: int) -> None:
    rng = random.Random(3)
    with Command(VIDEO, tmp_path) as server:
        for _ in range(turns):
            server.begin()
            until(server.engines, 20, "an engine")  # signals are handled by now
            time.sleep(rng.uniform(0, 0.5))
            assert server.stop(5) == 0 and not server.engines() and not server.complaints()


def test_a_job_is_not_run_by_another_model(tmp_path: Path) -> None:
    with Command("stepwell/fake-video?step_ms=200", tmp_path) as server:
        server.start()
        answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "a star", "num_inference_steps": 50})
        server.kill()
    with Command("stepwell/fake-video?step_ms=1", tmp_path, "--served-model-name", "another") as server:
        server.start()
        url = f"{server.url}/v1/videos/{answer.json()['id']}"
        until(lambda: httpx.get(url).json()["status"] == "failed", 10, "the job is given up")
        error = httpx.get(url).json()["error"]
        assert error["code"] == "model_not_found" and "this server serves 'another'" in error["message"]
