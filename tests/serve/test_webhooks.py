"""Webhooks against a real HTTP server, their signatures checked by the openai SDK."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest

from stepwell.errors import InvalidRequest
from stepwell.serve.webhooks import Webhooks

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
SDK = openai.OpenAI(api_key="x").webhooks


@dataclass
class Delivery:
    """One request as it came in."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    status: int

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verify(self, secret: str = SECRET) -> None:
        SDK.verify_signature(self.body, self.headers, secret=secret)


@dataclass
class Receiver:
    """An HTTP server that answers with `statuses` in turn, then 204; `gate` holds its answers back while it is clear."""

    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    drip_s: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    got: list[Delivery] = field(default_factory=list)
    url: str = ""

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        body = http.rfile.read(int(http.headers["content-length"]))
        status = self.statuses.pop(0) if self.statuses else 204
        headers = {name.lower(): value for name, value in http.headers.items()}
        self.got.append(Delivery(http.path, headers, body, time.monotonic(), status))
        self.arrived.release()
        assert self.gate.wait(10)
        if self.drip_s:
            for _ in range(100):
                http.wfile.write(b"H")
                time.sleep(self.drip_s)
        http.send_response(status)
        for name, value in self.headers.items():
            http.send_header(name, value)
        http.end_headers()

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=10), f"{len(self.got)} requests so far"

    def accepted(self) -> list[str]:
        return [delivery.id for delivery in self.got if 200 <= delivery.status < 300]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    made.gate.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, address: Any) -> None:
            pass  # a client that hung up

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}/hook?token=hush"
    yield made
    made.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hooks(receiver: Receiver) -> Iterator[Webhooks]:
    made = Webhooks(receiver.url, SECRET, delay_s=0.02, timeout_s=5)
    yield made
    receiver.gate.set()
    made.close(1)


def test_one_event(receiver: Receiver, hooks: Webhooks) -> None:
    hooks.notify("evt_1", "video.completed", {"id": "video_1", "prompt": "ein Kätzchen 🐈"})
    receiver.wait()
    got = receiver.got[0]
    got.verify()
    assert got.path == "/hook?token=hush"
    assert got.headers["content-type"] == "application/json"
    content = json.loads(got.body)
    assert abs(content.pop("created_at") - time.time()) < 5
    assert content == {"type": "video.completed", "data": {"id": "video_1", "prompt": "ein Kätzchen 🐈"}}
    event: Any = SDK.unwrap(got.body, got.headers, secret=SECRET)
    assert (event.type, event.data.id) == ("video.completed", "video_1")


def test_the_signature_covers_id_time_and_body(receiver: Receiver, hooks: Webhooks) -> None:
    hooks.notify("evt_1", "video.completed", {"id": "video_1"})
    receiver.wait()
    got = receiver.got[0]
    changed = [
        ({**got.headers, "webhook-id": "evt_2"}, got.body, SECRET),
        ({**got.headers, "webhook-timestamp": str(int(got.headers["webhook-timestamp"]) + 1)}, got.body, SECRET),
        (got.headers, got.body + b" ", SECRET),
        (got.headers, got.body, "whsec_" + base64.b64encode(bytes(32)).decode()),
    ]
    for headers, body, secret in changed:
        with pytest.raises(openai.InvalidWebhookSignatureError):
            SDK.verify_signature(body, headers, secret=secret)


def test_fails_twice_then_accepted(receiver: Receiver, hooks: Webhooks, caplog: pytest.LogCaptureFixture) -> None:
    receiver.statuses = [500, 404]
    hooks.notify("evt_1", "video.failed", {"id": "video_1"})
    receiver.wait(3)
    first, second, third = receiver.got
    for got in receiver.got:
        got.verify()
    assert {got.id for got in receiver.got} == {"evt_1"} and len({got.body for got in receiver.got}) == 1
    assert second.at - first.at >= 0.015 and third.at - second.at >= 0.03  # twice as long, less the jitter
    hooks.close(5)
    assert len(receiver.got) == 3
    assert "status 500" in caplog.text and "127.0.0.1" in caplog.text and "hush" not in caplog.text


def test_given_up_after_all_attempts(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.statuses = [503] * 3
    hooks = Webhooks(receiver.url, SECRET, attempts=3, delay_s=0.01)
    hooks.notify("evt_1", "video.completed", {})
    receiver.wait(3)
    hooks.notify("evt_2", "video.completed", {})
    hooks.close(5)
    assert [got.id for got in receiver.got] == ["evt_1"] * 3 + ["evt_2"]
    assert "evt_1" in caplog.text and "after 3 attempts" in caplog.text and "evt_2" not in caplog.text


def test_an_event_that_waits_holds_up_no_other(receiver: Receiver) -> None:
    receiver.statuses = [500]
    hooks = Webhooks(receiver.url, SECRET, delay_s=60)
    hooks.notify("evt_1", "video.completed", {})
    receiver.wait()
    hooks.notify("evt_2", "video.completed", {})
    receiver.wait()
    assert receiver.accepted() == ["evt_2"]
    hooks.close(5)  # the one that waits for a minute goes out now
    assert receiver.accepted() == ["evt_2", "evt_1"]


def test_redirects_are_not_followed(receiver: Receiver, hooks: Webhooks) -> None:
    receiver.statuses, receiver.headers = [307], {"location": "/elsewhere"}
    hooks.notify("evt_1", "video.completed", {})
    receiver.wait(2)
    hooks.close(5)
    assert [got.path for got in receiver.got] == ["/hook?token=hush"] * 2


def test_retry_after_is_heeded(receiver: Receiver, hooks: Webhooks) -> None:
    receiver.statuses, receiver.headers = [429], {"retry-after": "1"}
    hooks.notify("evt_1", "video.completed", {})
    receiver.wait(2)
    assert receiver.got[1].at - receiver.got[0].at >= 0.95
    assert receiver.got[0].headers["webhook-timestamp"] != receiver.got[1].headers["webhook-timestamp"]


def test_gone_means_nothing_more(receiver: Receiver, hooks: Webhooks, caplog: pytest.LogCaptureFixture) -> None:
    receiver.gate.clear()
    receiver.statuses = [410]
    for number in range(3):
        hooks.notify(f"evt_{number}", "video.completed", {})
    receiver.wait()
    receiver.gate.set()
    hooks.close(5)
    assert [got.id for got in receiver.got] == ["evt_0"]
    hooks.notify("evt_9", "video.completed", {})
    assert "410 Gone" in caplog.text and "evt_9 not sent: the receiver wants no more" in caplog.text


def test_the_oldest_is_dropped_on_overflow(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.gate.clear()
    hooks = Webhooks(receiver.url, SECRET, max_waiting=3)
    hooks.notify("evt_0", "video.completed", {})
    receiver.wait()  # under way, so it no longer waits
    began = time.monotonic()
    for number in range(1, 7):
        hooks.notify(f"evt_{number}", "video.completed", {})
    assert time.monotonic() - began < 1
    receiver.gate.set()
    hooks.close(5)
    assert receiver.accepted() == ["evt_0", "evt_4", "evt_5", "evt_6"]
    dropped = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert dropped == [f"webhook evt_{number} dropped: 3 others wait" for number in (1, 2, 3)]


def test_close_flushes(receiver: Receiver, hooks: Webhooks, caplog: pytest.LogCaptureFixture) -> None:
    receiver.statuses = [500, 204, 500]
    for number in range(50):
        hooks.notify(f"evt_{number}", "video.completed", {"number": number})
    hooks.close(10)
    assert sorted(receiver.accepted()) == sorted(f"evt_{number}" for number in range(50))
    hooks.notify("evt_late", "video.completed", {})
    hooks.close(10)
    assert len(receiver.got) == 52 and "evt_late not sent: the server is closing" in caplog.text


def test_close_ends_in_time(receiver: Receiver, hooks: Webhooks, caplog: pytest.LogCaptureFixture) -> None:
    receiver.gate.clear()
    for number in range(3):
        hooks.notify(f"evt_{number}", "video.completed", {})
    receiver.wait()
    began = time.monotonic()
    hooks.close(0.2)
    assert time.monotonic() - began < 1
    assert "not delivered before the end: evt_0, evt_1, evt_2" in caplog.text


@pytest.mark.parametrize("drip_s", [0.0, 0.05])
def test_slow_receivers_are_cut_off(receiver: Receiver, caplog: pytest.LogCaptureFixture, drip_s: float) -> None:
    receiver.drip_s = drip_s
    if not drip_s:
        receiver.gate.clear()
    hooks = Webhooks(receiver.url, SECRET, attempts=1, timeout_s=0.3)
    began = time.monotonic()
    hooks.notify("evt_1", "video.completed", {})
    receiver.wait()
    hooks.close(5)
    assert 0.25 < time.monotonic() - began < 3
    assert "evt_1 to 127.0.0.1 dropped" in caplog.text


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_receiver_at_all(receiver: Receiver, caplog: pytest.LogCaptureFixture, scheme: str) -> None:
    url = "http://127.0.0.1:1/" if scheme == "http" else receiver.url.replace("http:", "https:")  # no TLS there
    hooks = Webhooks(url, SECRET, attempts=2, delay_s=0.01)
    hooks.notify("evt_1", "video.completed", {})
    hooks.close(5)
    assert "evt_1 to 127.0.0.1 dropped" in caplog.text and "after 2 attempts" in caplog.text and not receiver.got


def test_notify_never_raises(receiver: Receiver, hooks: Webhooks, caplog: pytest.LogCaptureFixture) -> None:
    knot: dict[str, Any] = {}
    knot["knot"] = knot
    for event_id, data in (("a b", {}), ("a\r\nx: y", {}), ("", {}), ("evt_1", {"x": object()}), ("evt_2", knot)):
        hooks.notify(event_id, "video.completed", data)
    hooks.notify("evt_3.completed", "video.completed", {})
    hooks.close(5)
    assert receiver.accepted() == ["evt_3.completed"]
    receiver.got[0].verify()
    assert caplog.text.count("not sent") == 5


@pytest.mark.parametrize(
    "url",
    [
        *("", "example.com/hook", "ftp://example.com", "http://", "https:///x", "http://a b/", "http://x:99999/", "http://x:0/"),
        *("http://me:pw@x/", "http://x/#part", "http://[::1/", "http://bücher.example/", "http://x/\n", "http://a..b/"),
    ],
)
def test_wrong_urls(url: str) -> None:
    with pytest.raises(InvalidRequest, match="webhook_url") as caught:
        Webhooks(url, SECRET)
    assert caught.value.param == "webhook_url"


@pytest.mark.parametrize(
    "secret",
    [
        *("", "whsec_", SECRET.removeprefix("whsec_"), "whsec_" + "A" * 20, "whsec_" + "A" * 100, "whsec_" + "!" * 44),
        *("whsec_" + "é" * 44, "whsec_" + base64.urlsafe_b64encode(b"\xff" * 32).decode(), SECRET[:-1]),
    ],
)
def test_wrong_secrets(secret: str) -> None:
    with pytest.raises(InvalidRequest, match="webhook_secret") as caught:
        Webhooks("https://example.com/hook", secret)
    assert caught.value.param == "webhook_secret"
    assert len(secret) < 20 or secret[10:] not in caught.value.message
