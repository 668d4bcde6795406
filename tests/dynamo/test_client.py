"""The client that tries again, before a frontend that misbehaves."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from stepwell.dynamo.client import RetryingClient
from stepwell.errors import InvalidRequest, Unavailable

RESULT = b'{"data": [1]}'


class Faulty(http.server.ThreadingHTTPServer):
    """Answers a POST with the next of `answers`: status, body, and the length that it claims; at the end with a result."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes, int]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Faulty

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body, length = self.server.answers.pop(0) if self.server.answers else (200, RESULT, len(RESULT))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def frontend() -> Iterator[Faulty]:
    with Faulty() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("answer", [
    (503, b"x", 100), (500, b"x", 100), (200, b'{"da', 100), (200, b"<html>", 6), (200, b"", 0), (200, b'"\xff', 2),
], ids=["half a 503", "half a 500", "half a result", "a page", "nothing", "no text"])  # fmt: skip
def test_an_answer_that_is_none_is_asked_for_again(frontend: Faulty, answer: tuple[int, bytes, int]) -> None:
    frontend.answers = [answer]
    assert RetryingClient([frontend.url]).post("/v1/images/generations", {}) == {"data": [1]}


def test_it_ends_with_an_error_of_ours(frontend: Faulty) -> None:
    frontend.answers = [(200, b"<html>", 6)] * 99
    with pytest.raises(Unavailable, match="no answer after .*<html>"):
        RetryingClient([frontend.url], patience_s=0.5).post("/v1/images/generations", {})


@pytest.mark.parametrize("frontends", [[], "http://127.0.0.1:8000", ["127.0.0.1:8000"], ["ftp://127.0.0.1"], ["http://"]])
def test_frontends_are_urls(frontends: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="must be a list of URLs"):
        RetryingClient(frontends)


def test_a_model_that_was_there_is_waited_for(frontend: Faulty) -> None:
    client, absent = RetryingClient([frontend.url]), (404, b"{}", 2)
    frontend.answers = [absent]
    with pytest.raises(InvalidRequest, match="404"):  # a name nobody has heard of
        client.post("/v1/images/generations", {"model": "a"})
    assert client.post("/v1/images/generations", {"model": "a"})
    frontend.answers = [absent, (503, b"", 0), absent]
    assert client.post("/v1/images/generations", {"model": "a"}) == {"data": [1]}
    frontend.answers = [absent]
    with pytest.raises(InvalidRequest, match="404"):
        client.post("/v1/images/generations", {"model": "b"})
