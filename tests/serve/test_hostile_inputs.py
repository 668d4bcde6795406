"""Bodies, pictures and URLs that are wrong in every way: each is refused in one shape, and the server goes on."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from stepwell.serve import inputs
from tests.media.test_uploads import bombs, good_files, refused_formats
from tests.support.answers import check_refusal
from tests.support.server import Running, fake, running

LIMITS: dict[str, Any] = {"max_upload_mb": 1, "max_input_megapixels": 1}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(fake("image", step_ms=0), tmp_path_factory.mktemp("images"), **LIMITS) as made:
        yield made


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(fake("video", step_ms=0), tmp_path_factory.mktemp("videos"), **LIMITS) as made:
        yield made


@pytest.fixture(scope="module", params=["image", "video"])
def server(request: pytest.FixtureRequest, images: Running, videos: Running) -> Running:
    return images if request.param == "image" else videos


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=20) as made:
        yield made


# ----------------------------------------------------------------------------------------------------------------- bodies
NUMBER = b"9" * 4200
BAD_JSON = [
    *(b"", b" ", b"{", b"[", b"[1]", b"1", b'"x"', b"null", b"\xff\xfe\xfd", b"\x00", b'{"prompt"}', b'{"prompt":"x",}', b"{}{}"),
    *(b'{"prompt":"x","guidance_scale":NaN}', b'{"prompt":"x","guidance_scale":-Infinity}', b'{"prompt":"x","seed":1e400}'),
    *(b'{"prompt":"\xff"}', b'{"prompt":"\\ud800"}', b'{"prompt":"x","\\ud800":1}', b'{"prompt":"x","nvext":{"\\udfff":1}}'),
    *(b'{"prompt":"x","prompt":"y"}', b'{"prompt":"x","nvext":{"seed":1,"seed":1}}', b'{"prompt":"x","seed":%s}' % (NUMBER * 2)),
    *(b'{"prompt":"x","%s":%s}' % (name, NUMBER) for name in (b"seed", b"width", b"num_inference_steps", b"guidance_scale")),
    *(b'{"prompt":"x","nvext":{"%s":-%s}}' % (name, NUMBER) for name in (b"seed", b"guidance_scale")),
    *(b'{"prompt":"x","%s":"%s"}' % (name, b"y" * 10**6) for name in (b"size", b"model", b"width", b"y" * 10**6)),
    *(b'{"prompt":%s%s}' % (b"[" * depth, b"]" * depth) for depth in (100, 900, 1100, 10**5)),
    *(b'{"prompt":"x","nvext":%s1%s}' % (b'{"nvext":' * depth, b"}" * depth) for depth in (100, 900, 1100, 10**5)),
    b"{%s}" % b",".join(b'"k%d":1' % n for n in range(300_000)),
    b'{"prompt":"x","nvext":{%s}}' % b",".join(b'"k%d":%d' % (n, n) for n in range(200)),
    b'{"prompt":"%s"}' % (b"x" * 10**6),
    b'{"prompt":"x","negative_prompt":["\\u0000"]}',
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json(server: Running, client: httpx.Client, content: bytes) -> None:
    path = "/v1/images/generations" if "image" in next(iter(server.server.models)) else "/v1/videos"
    began = time.monotonic()
    check_refusal(client.post(server.url + path, content=content, headers=JSON), 400, 404)
    assert time.monotonic() - began < 2


def test_bad_json_of_a_remix(videos: Running, client: httpx.Client) -> None:
    made = client.post(f"{videos.url}/v1/videos", json={"prompt": "x", "num_frames": 1}).json()["id"]
    for content in BAD_JSON:
        answer = client.post(f"{videos.url}/v1/videos/{made}/remix", content=content, headers=JSON)
        check_refusal(answer, 400)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"seconds": True}, "seconds"),
        ({"seconds": [1]}, "seconds"),
        ({"nvext": {"seed": 1.5}}, "nvext.seed"),
        ({"nvext": {"sed": 1}}, "nvext.sed"),
        ({"input_reference": {"image_url": 1}}, "input_reference.image_url"),
        ({"x" * 10_000: 1}, "x" * 200 + "…"),
    ],
)
def test_the_field_at_fault_is_named(videos: Running, client: httpx.Client, body: dict[str, Any], param: str) -> None:
    check_refusal(client.post(f"{videos.url}/v1/videos", json={"prompt": "x", **body}), 400, param=param)


def part(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name, more, value)


END, PROMPT = b"--B--\r\n", part(b"prompt", b"x")
PICTURE = good_files()["png"]
FILE = part(b"image", PICTURE, b'; filename="a.png"')
OF_B = "multipart/form-data; boundary=B"
BAD_FORMS: list[tuple[str, bytes]] = [
    *((f"multipart/form-data{options}", PROMPT + END) for options in ("", "; boundary=", "; boundary=C")),
    *((f"multipart/form-data; boundary={'B' * 5000}", b"x"), (OF_B, b""), (OF_B, END), (OF_B, PROMPT[:-9]), (OF_B, b"\0" * 1000)),
    (OF_B, PROMPT + FILE[: len(FILE) // 2]),
    (OF_B, PROMPT + FILE[:-2] + b"--B"),
    (OF_B, b"".join(part(b"f%d" % n, b"1") for n in range(200)) + END),
    (OF_B, PROMPT + FILE * 20 + END),
    (OF_B, PROMPT + FILE * 2 + END),
    (OF_B, PROMPT * 2 + FILE + END),
    (OF_B, PROMPT + part(b"nvext[seed]", b"1") * 2 + END),
    (OF_B, PROMPT + part(b"nvext", b"1") + part(b"nvext[seed]", b"1") + END),
    (OF_B, PROMPT + part(b"nvext[seed]", b"1") + part(b"nvext", b"{}") + FILE + END),
    (OF_B, PROMPT + part(b"nvext[a][b]", b"1") + END),
    (OF_B, PROMPT + part(b"nvext", b'{"a":' * 5000 + b"1" + b"}" * 5000) + END),
    (OF_B, PROMPT + part(b"nvext", b'{"guidance_scale": NaN}') + FILE + END),
    *((OF_B, PROMPT + FILE + part(name, b"nan") + END) for name in (b"seed", b"guidance_scale", b"[x]", b"", b"x" * 1000)),
    *((OF_B, PROMPT + FILE + part(b"seed", value) + END) for value in (b"9" * 4000, b"9" * 5000, b"\xff", b"\0", b"1e5")),
    (OF_B, PROMPT + part(b"image", PICTURE) + part(b"input_reference", PICTURE) + END),
    (OF_B, PROMPT + part(b"mask", PICTURE, b'; filename="m.png"') + FILE + END),
    (OF_B, part(b"prompt", b"x", b'; filename="p"') + FILE + END),
    (OF_B, PROMPT + part(b"image", PICTURE, b'; filename="../../../../etc/passwd"') + part(b"seed", b"x") + END),
    (OF_B, b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END),
    (OF_B, b"--B\r\nX: y\r\n\r\nx\r\n" + END),
    (OF_B, b"--B\r\n" + b"x" * 100_000 + b": y\r\n\r\n" + END),
    (OF_B, b"--B\r\n" + b"x: y\r\n" * 100_000 + b"\r\n" + END),
    (OF_B, part(b"prompt", b"x" * (5 * 2**20)) + END),
    *((f"{OF_B}; charset={codec}", part(b"+2AA-", b"\xff") + END) for codec in ("utf-7", "utf-16", "undefined", "zlib", "x")),
    ("application/x-www-form-urlencoded", b"prompt=%ff%00&&&="),
    ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % n for n in range(2000))),
    ("application/x-www-form-urlencoded", b"prompt=x&" + b"a" * 10**6),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content"), BAD_FORMS, ids=range(len(BAD_FORMS)))
def test_bad_forms(server: Running, client: httpx.Client, kind: str, content: bytes) -> None:
    path = "/v1/images/edits" if "image" in next(iter(server.server.models)) else "/v1/videos"
    check_refusal(client.post(server.url + path, content=content, headers={"Content-Type": kind}), 400)


URLENCODED = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("kind", "content", "said", "param"),
    [
        (OF_B, part(b"prompt", b"caf\xe9") + END, r"prompt = b'caf\xe9': not UTF-8", "prompt"),
        (f"{OF_B}; charset=iso-8859-1", part(b"prompt", b"caf\xe9") + END, r"prompt = b'caf\xe9': not UTF-8", "prompt"),
        (OF_B, PROMPT + part(b"caf\xe9", b"x") + END, r"a name in the form = b'caf\xe9': not UTF-8", None),
        (OF_B, PROMPT + part(b"seed", b"\xff" * 999) + END, "(3999 characters): not UTF-8", "seed"),
        (URLENCODED, b"seed=1&prompt=caf%E9", r"prompt = b'caf\xe9': not UTF-8", "prompt"),
        (URLENCODED, b"prompt=caf\xe9", r"prompt = b'caf\xe9': not UTF-8", "prompt"),
        (URLENCODED, b"caf%e9=1", r"a name in the form = b'caf\xe9': not UTF-8", None),
        (URLENCODED, b"&".join(b"a%d=1" % n for n in range(101)), "the form has 101 fields: at most 100", None),
        (OF_B, PROMPT + part(b"seed", b"1_0") + END, "seed = '1_0': must be a number", "seed"),
        (OF_B, PROMPT + part(b"guidance_scale", b"1_0.5") + END, "guidance_scale = '1_0.5': must be a number", "guidance_scale"),
        (OF_B, PROMPT + part(b"nvext[seed]", b"1_0") + END, "nvext.seed = '1_0': must be a number", "nvext.seed"),
        (OF_B, PROMPT + part(b"cache[scm_compute_bins][]", b"1_0") + END, "must be a number", None),
        (OF_B, PROMPT + part(b"seconds", b"1_0") + END, "seconds = '1_0': must be a number above 0", "seconds"),
        (OF_B, PROMPT + part(b"seconds", " ４".encode()) + END, "seconds = ' ４': must be a number above 0", "seconds"),
        ("application/json", b'{"prompt": "x", "seconds": "1_0"}', "seconds = '1_0': must be a number above 0", "seconds"),
    ],
)  # fmt: skip
def test_a_form_says_what_is_no_text_and_no_number(
    videos: Running, client: httpx.Client, kind: str, content: bytes, said: str, param: str | None
) -> None:
    error = check_refusal(client.post(f"{videos.url}/v1/videos", content=content, headers={"Content-Type": kind}), 400)
    assert said in error["message"] and param in (None, error["param"])


@pytest.mark.parametrize(("kind", "content"), [
    (OF_B, part(b"prompt", "café 😀".encode()) + END), (f'{OF_B}; Charset="utf-8"', part(b"prompt", "café 😀".encode()) + END),
    ("multipart/form-data; charset=utf-16; boundary=B", part(b"prompt", "café 😀".encode()) + END),
    (URLENCODED, "prompt=café+😀".encode()), (URLENCODED, b"prompt=caf%C3%A9%20%F0%9F%98%80&seconds=.2&seed="),
])  # fmt: skip
def test_a_form_is_utf8(videos: Running, client: httpx.Client, kind: str, content: bytes) -> None:
    content = content.removesuffix(b"&seed=")
    answer = client.post(f"{videos.url}/v1/videos", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 200 and answer.json()["prompt"] == "café 😀", answer.text


@pytest.mark.parametrize(
    "kind", ["text/plain", "text/xml", "multipart/mixed; boundary=B", "image/png", "x", "", ";", "application/js"]
)
def test_bodies_of_another_kind(server: Running, client: httpx.Client, kind: str) -> None:
    for path in ("/v1/images/generations", "/v1/images/edits", "/v1/videos"):
        check_refusal(client.post(server.url + path, content=b"{}", headers={"Content-Type": kind}), 415)


def test_bodies_that_are_too_large(server: Running, client: httpx.Client) -> None:
    paths = ("/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/videos")
    for path, kind in zip(paths, ("application/json", OF_B, OF_B, "application/json"), strict=True):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        with connected(server) as sock:  # refused for what is promised, before it comes
            sock.sendall(f"{head}Content-Length: {10**15}\r\n\r\n".encode())
            assert sock.recv(100).startswith(b"HTTP/1.1 413 ")
        pieces = iter([part(b"image", bytes(2**20 - 5), b'; filename="x"')] * 20)
        chunked = client.post(server.url + path, content=pieces, headers={"Content-Type": kind})
        assert check_refusal(chunked, 413)["code"] == "body_too_large"
    name = "image" if "image" in next(iter(server.server.models)) else "input_reference"
    path = "/v1/images/edits" if name == "image" else "/v1/videos"
    answer = client.post(server.url + path, data={"prompt": "x"}, files={name: PICTURE + bytes(2**20)})
    check_refusal(answer, 413, param=name)


def connected(server: Running) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)


def test_a_slow_body_blocks_nobody(images: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "IDLE_S", 0.5)
    head = "HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nContent-Type:"
    slow = [connected(images) for _ in range(32)]
    for number, sock in enumerate(slow):
        whole = (
            f"POST /v1/images/generations {head} application/json\r\n\r\n{{",
            f"POST /v1/images/edits {head} {OF_B}\r\n\r\n-",
            "P",
        )
        sock.sendall(whole[number % 3].encode())
    began = time.monotonic()
    assert client.post(f"{images.url}/v1/images/generations", json={"prompt": "x"}).status_code == 200
    assert time.monotonic() - began < 1
    for number, sock in enumerate(slow):
        if number % 3 < 2:
            assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
        sock.close()


# --------------------------------------------------------------------------------------------------------------- pictures
def send_url(server: Running, client: httpx.Client, url: str) -> tuple[httpx.Response, str]:
    """A picture by URL, and the name of the field it was in."""
    if "image" in next(iter(server.server.models)):
        return client.post(f"{server.url}/v1/images/edits", data={"prompt": "x", "url": url}), "url"
    body = {"prompt": "x", "input_reference": {"image_url": url}}
    return client.post(f"{server.url}/v1/videos", json=body), "input_reference"


def test_urls_are_off_unless_allowed(server: Running, client: httpx.Client) -> None:
    for url in ("https://example.com/a.png", "http://example.com", "file:///etc/passwd", "ftp://x.example/", "x", "", "s3://b/k"):
        answer, name = send_url(server, client, url)
        check_refusal(answer, 400, param=name)
    for url in ("data:", "data:text/html,x", "data:image/png;base64,!", "data:image/png;base64,aGVsbG8=", "data:image/png,x"):
        answer, name = send_url(server, client, url)
        check_refusal(answer, 400, param=name)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_allowed_urls_are_public_ones(tmp_path: Path, client: httpx.Client, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, running(fake(kind), tmp_path, allow_url_inputs=True) as made:
        listener.settimeout(0.1)
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        hosts = (
            "127.0.0.1",
            "localhost",
            "[::1]",
            "169.254.169.254",
            "10.0.0.1",
            "192.168.0.1",
            "0.0.0.0",
            "2130706433",
            "0x7f.1",
        )
        urls = [f"https://{host}/x.png" for host in (*hosts, here, "[::ffff:127.0.0.1]", "u:p@93.184.216.34", "100.64.0.1")]
        for url in (
            *urls,
            f"http://{here}/x.png",
            f"http://{here}@example.com/",
            "file:///etc/passwd",
            "gopher://x.example/",
            "//x",
        ):
            answer, name = send_url(made, client, url)
            check_refusal(answer, 400, param=name)
        with pytest.raises(TimeoutError):
            listener.accept()


def malformed() -> dict[str, bytes]:
    found = {**refused_formats(), **bombs()}
    for kind in ("png", "jpeg", "webp"):
        data = good_files()[kind]
        found |= {f"{kind} {name}": broken for name, broken in (("head", data[:20]), ("torn", data[: len(data) // 2]))}
        found[f"{kind} zeroed"] = data[:24] + bytes(len(data) - 24)
    return {name: data for name, data in found.items() if name not in ("png idat", "png many texts")}  # only too long


def test_malformed_pictures(images: Running, videos: Running, client: httpx.Client) -> None:
    corpus = malformed()
    assert len(corpus) >= 40
    for name, data in corpus.items():
        for server, path, field in ((images, "/v1/images/edits", "image"), (videos, "/v1/videos", "input_reference")):
            files = {field: ("fine.png", io.BytesIO(data), "image/png")}
            answer = client.post(server.url + path, data={"prompt": "x"}, files=files)
            assert check_refusal(answer, 400, 413, param=field), name
            assert answer.status_code == 400 or "pixels" in answer.text or "MiB" in answer.text
    for server, path, field in ((images, "/v1/images/edits", "image"), (videos, "/v1/videos", "input_reference")):
        files = {field: ("fine.png", PICTURE, "text/html")}
        assert client.post(server.url + path, data={"prompt": "x"}, files=files).status_code == 200
