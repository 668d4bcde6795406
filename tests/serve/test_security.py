"""What strangers may not do: the server answers them all, gives nothing away, and does not fall over."""

from __future__ import annotations

import hashlib
import http.client
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from stepwell.serve.app import create_app
from tests.support.answers import check_headers, check_refusal
from tests.support.sdk import eventually
from tests.support.server import Running, fake, running

ALPHA, BETA, GAMMA = "alpha", "beta", "schlüssel-à"  # the last byte of à is a blank in Latin-1
AS_ALPHA, AS_BETA = ({"Authorization": f"Bearer {key}"} for key in (ALPHA, BETA))
OWN_ID = re.compile(r"http-[0-9a-f]{24}")
CANARY = "CANARY-5c1d"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys and a secret, in which the servers have folders of their own."""
    folder = tmp_path_factory.mktemp("security")
    lines = ("# who may", ALPHA, "", f"  sha256:{hashlib.sha256(BETA.encode()).hexdigest().upper()}  ", GAMMA)
    (folder / "keys").write_text("\n".join(lines), encoding="utf-8")
    (folder / "secret.txt").write_text(CANARY)
    return folder


def opened(kind: str, folder: Path, name: str, step_ms: float = 0, **options: Any) -> Any:
    limits = {"max_upload_mb": 1, "max_input_megapixels": 1, "api_key_file": str(folder / "keys")}
    return running(fake(kind, step_ms), folder / name, **{**limits, **options})


@pytest.fixture(scope="module")
def images(folder: Path) -> Iterator[Running]:
    with opened("image", folder, "images") as made:
        yield made


@pytest.fixture(scope="module")
def videos(folder: Path) -> Iterator[Running]:
    with opened("video", folder, "videos", step_ms=2) as made:
        yield made


@pytest.fixture(scope="module", params=["image", "video"])
def server(request: pytest.FixtureRequest, images: Running, videos: Running) -> Running:
    return images if request.param == "image" else videos


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=20) as made:
        yield made


# ------------------------------------------------------------------------------------------------------------------- keys
def test_no_route_but_one_answers_without_a_key(server: Running, client: httpx.Client) -> None:
    found = {(route.path, method) for route in iter_route_contexts(create_app(server.server).routes) for method in route.methods}
    assert len(found) > 35 and ("/livez", "GET") in found and ("/v1/queue/{request_id}", "DELETE") in found
    paths = {path for path, _ in found} | {
        "/",
        "/nowhere",
        "/v1",
        "/livez/",
        "//livez",
        "/LIVEZ",
        "/livez/x",
        "/livez;x",
        "/livez%2f",
    }
    for path in paths - {"/livez"}:
        for method in ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "FROB"):
            answer = client.request(method, server.url + path.replace("{", "").replace("}", ""))
            assert answer.status_code == 401, (method, path)
            check_headers(answer)
            if method != "HEAD":
                assert check_refusal(answer)["code"] == "invalid_api_key"
    alive = client.get(f"{server.url}/livez")
    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "value",
    [
        *("", "Bearer", "Basic alpha", "alpha", "Bearer wrong", "Bearer alpha beta", "Bearer\talpha", "Bearer alphaa"),
        *("Bearer alph", "Bearer ALPHA", "BearerBearer alpha", "Bearer Bearer alpha", "Bearer ,alpha", 'Bearer "alpha"'),
        *("Token alpha", "Bearer # who may", "Basic YWxwaGE6", "Bearer \xff\xfe", "Bearer alph\u0430", f"Bearer {'a' * 8000}"),
        f"Bearer {hashlib.sha256(BETA.encode()).hexdigest()}",
        f"Bearer sha256:{hashlib.sha256(BETA.encode()).hexdigest()}",
    ],
)  # fmt: skip
def test_wrong_keys(images: Running, client: httpx.Client, value: str) -> None:
    check_refusal(client.get(f"{images.url}/v1/models", headers={"Authorization": value.encode()}), 401)


def test_the_first_of_two_keys_counts(images: Running, client: httpx.Client) -> None:
    both = [("Authorization", "Bearer wrong"), ("Authorization", "Bearer alpha")]
    check_refusal(client.get(f"{images.url}/v1/models", headers=both), 401)


@pytest.mark.parametrize("value", ["Bearer alpha", "bearer alpha", "BEARER  alpha", "Bearer beta", f"Bearer {GAMMA}"])
def test_right_keys(images: Running, client: httpx.Client, value: str) -> None:
    assert client.get(f"{images.url}/v1/models", headers={"Authorization": value.encode()}).status_code == 200


def test_keys_do_not_see_each_others_videos(videos: Running, client: httpx.Client) -> None:
    url = f"{videos.url}/v1"
    body = {"prompt": "mine", "num_inference_steps": 1000, "num_frames": 5}
    slow = client.post(f"{url}/videos", json=body, headers={**AS_ALPHA, "Idempotency-Key": "k"}).json()["id"]
    quick = client.post(f"{url}/videos", json={"prompt": "mine", "num_frames": 5}, headers=AS_ALPHA).json()["id"]
    while client.get(f"{url}/videos/{quick}", headers=AS_ALPHA).json()["status"] != "completed":
        time.sleep(0.02)
    for made in (slow, quick):
        for path in (made, f"{made}/content", f"{made}/content?variant=thumbnail", f"{made}/events"):
            check_refusal(client.get(f"{url}/videos/{path}", headers=AS_BETA), 404)
        check_refusal(client.post(f"{url}/videos/{made}/remix", json={"prompt": "x"}, headers=AS_BETA), 404)
        check_refusal(client.delete(f"{url}/videos/{made}", headers=AS_BETA), 404)
        check_refusal(client.delete(f"{url}/queue/{made}", headers=AS_BETA), 404)
        check_refusal(client.get(f"{url}/videos?after={made}", headers=AS_BETA), 400, param="after")
    assert client.get(f"{url}/videos", headers=AS_BETA).json()["data"] == []
    queue = client.get(f"{url}/queue", headers=AS_BETA).json()
    assert queue["data"] == [] and queue["length"] == 1
    assert [entry["id"] for entry in client.get(f"{url}/queue", headers=AS_ALPHA).json()["data"]] == [slow]
    again = client.post(f"{url}/videos", json=body, headers={**AS_BETA, "Idempotency-Key": "k"}).json()["id"]
    assert again != slow
    for made, key in ((slow, AS_ALPHA), (again, AS_BETA)):
        assert client.delete(f"{url}/videos/{made}", headers=key).status_code == 200
    assert client.get(f"{url}/videos/{quick}/content", headers=AS_ALPHA).status_code == 200


def test_keys_do_not_see_each_others_pictures(images: Running, client: httpx.Client) -> None:
    made = client.post(
        f"{images.url}/v1/images/generations", json={"prompt": "x", "response_format": "url"}, headers=AS_ALPHA
    ).json()
    path = images.url + made["data"][0]["url"]
    assert client.get(path, headers=AS_ALPHA).status_code == 200
    check_refusal(client.get(path, headers=AS_BETA), 404)
    check_refusal(client.get(path), 401)
    one, other = (
        client.post(f"{images.url}/v1/images/generations", json={"prompt": "x"}, headers={**key, "Idempotency-Key": "k"}).json()
        for key in (AS_ALPHA, AS_BETA)
    )
    assert one["id"] != other["id"]


# ------------------------------------------------------------------------------------------------------- origins and marks
ORIGINS = (
    "https://evil.example",
    "http://evil.example:80",
    "null",
    "",
    "http://[",
    "http://]",
    "http://127.0.0.1:1",
    "//",
    "\xff",
)


@pytest.mark.parametrize("origin", ORIGINS)
def test_pages_of_other_sites_are_refused(images: Running, client: httpx.Client, origin: str) -> None:
    headers = {**AS_ALPHA, "Origin": origin.encode("latin-1")}
    for path, method in (("/v1/models", "GET"), ("/v1/images/generations", "POST"), ("/v1/queue/x", "DELETE")):
        check_refusal(client.request(method, images.url + path, headers=headers), 403)


def test_pages_of_this_server_are_not(images: Running, client: httpx.Client) -> None:
    assert client.get(f"{images.url}/v1/models", headers={**AS_ALPHA, "Origin": images.url}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:30000", "127.0.0.1.evil.example", "192.168.0.1", "localhost.evil.example"]
)
def test_names_of_other_sites_do_not_stand_for_this_machine(tmp_path: Path, client: httpx.Client, host: str) -> None:
    asked = {"Host": host, "Origin": f"http://{host}"}  # a site whose name leads here makes a browser say both
    with running(fake("image"), tmp_path / "own") as own, running(fake("image"), tmp_path / "told", allow_no_key=True) as told:
        check_refusal(client.get(f"{own.url}/v1/models", headers=asked), 403)
        assert client.get(f"{told.url}/v1/models", headers=asked).status_code == 200
        for name in ("localhost", "LOCALHOST:30000", "127.0.0.1", "[::1]:30000", "127.9.9.9:1"):
            assert client.get(f"{own.url}/v1/models", headers={"Host": name}).status_code == 200


def every_status(url: str, client: httpx.Client, headers: dict[str, Any]) -> Iterator[tuple[int, httpx.Response]]:
    """An answer of each status that is easily had, and the status it should be of."""
    asked = {**AS_ALPHA, **headers}
    yield 200, client.get(f"{url}/livez", headers=headers)
    yield 200, client.get(f"{url}/v1/models", headers=asked)
    yield 200, client.post(f"{url}/v1/images/generations", json={"prompt": "x"}, headers=asked)
    yield 200, client.post(f"{url}/v1/images/generations", json={"prompt": "x", "stream": True}, headers=asked)
    yield 400, client.post(f"{url}/v1/images/generations", content=b"{", headers=asked)
    yield 401, client.get(f"{url}/v1/models", headers=headers)
    yield 403, client.get(f"{url}/v1/models", headers={**asked, "Origin": "null"})
    yield 404, client.get(f"{url}/nowhere", headers=asked)
    yield 404, client.get(f"{url}/v1/images/none/content", headers=asked)
    yield 405, client.put(f"{url}/v1/models", headers=asked)
    yield 413, client.post(f"{url}/v1/images/generations", content=bytes(5 * 2**20), headers=asked)
    yield 415, client.post(f"{url}/v1/images/edits", content=b"x", headers={**asked, "Content-Type": "text/plain"})
    yield 500, client.post(f"{url}/v1/images/generations", json={"prompt": "poison"}, headers=asked)


def test_every_answer_is_marked(images: Running, client: httpx.Client) -> None:
    seen = set()
    for headers in ({}, {"X-Request-Id": "mine-1_2.3:4"}, {"X-Request-Id": "m" * 128}):
        for status, answer in every_status(images.url, client, headers):
            assert answer.status_code == status, answer.text[:200]
            check_headers(answer)
            found = answer.headers.get_list("x-request-id")
            assert found == [headers["X-Request-Id"]] if headers else OWN_ID.fullmatch(found[0])
            seen.add(found[0])
    assert len(seen) == 13 + 2


def test_a_path_forges_no_log_line(images: Running, client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "stepwell.access")
    client.get(f"{images.url}/v1/x%0a2026-01-01%20forged%1b[2J", headers=AS_ALPHA)
    lines: list[str] = []

    def is_logged() -> bool:  # which happens once the answer is out
        lines[:] = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
        return bool(lines)

    eventually(is_logged)
    (line,) = lines
    assert line.isprintable()


def test_what_is_no_request_id_is_not_reflected(images: Running, client: httpx.Client) -> None:
    for asked in ("", "a b", "a\tb", "<script>", "é", "a,b", "m" * 129, "a;b", "%0d%0a", '"', "../x", "\xff", "٣"):
        headers = {**AS_ALPHA, "X-Request-Id": asked.encode()}
        for path in ("/livez", "/v1/models", "/nowhere"):
            assert OWN_ID.fullmatch(client.get(images.url + path, headers=headers).headers["x-request-id"]), asked


def test_a_bug_gives_nothing_away(images: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(images.server.engine, "control", broken)
    answer = client.get(f"{images.url}/health", headers=AS_ALPHA)
    assert check_refusal(answer, 500)["code"] == "internal_error" and CANARY not in answer.text
    assert answer.headers["x-should-retry"] == "false"


# ------------------------------------------------------------------------------------------------------------------ paths
def hostile_names(folder: Path) -> list[str]:
    """What could mean a file, a query or a command to somebody, quoted so that it arrives."""
    ups = (
        "../",
        "..\\",
        "..%2f",
        "%2e%2e/",
        "....//",
        "..;/",
        "%252e%252e%252f",
        "%c0%ae%c0%ae/",
        "..%00/",
        "/",
        "//",
        "file://",
    )
    targets = (f"{str(folder)[1:]}/secret.txt", "secret.txt", "keys", "etc/passwd", "jobs.sqlite", "media/x.png")
    climbs = [up * depth + target for up in ups for depth in (1, 2, 9) for target in targets]
    texts = [
        *("' OR 1=1 --", '" OR ""="', "x'; DROP TABLE jobs; --", "%", "_", "*", "?", "NULL", "None", "0", "-1", "1e9", "true"),
        *("\0", "a\0b", "\r\nX: y", "\x7f", "\ud7ff", "\ufffd", "\u202e", "é", "🐈", "a" * 4000, ".", "..", "~", "~root"),
        *("$HOME", "${jndi:ldap://x}", "`id`", "$(id)", ";id", "|id", "<script>", "{{7*7}}", "%s%n", "../\0", "video_", " "),
    ]  # fmt: skip
    return [*climbs, *(quote(text, safe="") for text in texts), "%", "%zz", "%ff%fe", "%ed%a0%80", "%u002e"]


def test_hostile_paths_read_nothing(server: Running, folder: Path) -> None:
    names = hostile_names(folder)
    assert len(names) > 200
    seen: list[str] = []
    is_watched = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if is_watched and event in ("open", "os.listdir", "os.scandir"):
            seen.append(str(arguments[0]))

    sys.addaudithook(watch)  # for good, which is why it can be told to stop
    parts = urlsplit(server.url)
    line = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    shapes = ("/v1/videos/{}", "/v1/videos/{}/content", "/v1/images/{}/content", "/v1/models/{}", "/v1/queue/{}", "/{}")
    for name in names:
        for shape in shapes if len(name) < 30 else shapes[:5]:
            method = "DELETE" if "queue" in shape else "GET"
            line.putrequest(method, shape.format(name), skip_accept_encoding=True)
            line.putheader("Authorization", "Bearer alpha")
            line.endheaders()
            answer = line.getresponse()
            text = answer.read().decode()
            assert answer.status in (400, 404, 405), (shape, name, answer.status)
            assert CANARY not in text and "root:x:" not in text and "Traceback" not in text
    is_watched = False
    line.close()
    assert [path for path in seen if not path.endswith((".py", ".pyc", ".so"))] == []


def test_a_content_variant_is_one_of_three(videos: Running, client: httpx.Client, folder: Path) -> None:
    made = client.post(f"{videos.url}/v1/videos", json={"prompt": "x", "num_frames": 1}, headers=AS_ALPHA).json()["id"]
    while client.get(f"{videos.url}/v1/videos/{made}", headers=AS_ALPHA).json()["status"] != "completed":
        time.sleep(0.02)
    for name in ("", "keys", "image_key", "../secret.txt", str(folder / "secret.txt"), "video\0"):
        answer = client.get(f"{videos.url}/v1/videos/{made}/content", params={"variant": name}, headers=AS_ALPHA)
        check_refusal(answer, 400, param="variant")
