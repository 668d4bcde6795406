"""Fetching from URLs that clients give: the public internet, and under no disguise anything else."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stepwell.errors import InvalidRequest
from stepwell.media.fetch import FetchPolicy, fetch, is_public, read_url
from stepwell.media.uploads import TooLarge

PUBLIC, OTHER_PUBLIC = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"
METADATA = "169.254.169.254"
HTTP = FetchPolicy(allow_http=True, timeout_s=5.0)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
Answer = bytes | Callable[[socket.socket, bytes], None]


@dataclass
class Net:
    """The network a test sees: names with addresses, and public addresses that lead to a local port. It remembers all."""

    names: dict[str, list[str]] = field(default_factory=dict)
    routes: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    connected: list[tuple[str, int]] = field(default_factory=list)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    net = Net(names={"pictures.example": [PUBLIC]})
    real_look_up, real_connect = socket.getaddrinfo, socket.socket.connect

    def look_up(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        net.asked.append(host)
        found = []
        for address in net.names.get(host, [host]):  # what is no known name is left to the real parser of numbers
            found += real_look_up(address, port, *args, flags=socket.AI_NUMERICHOST, **kwargs)
        return found

    def connect(sock: socket.socket, address: tuple[Any, ...]) -> None:
        net.connected.append((address[0], address[1]))
        if address[0] not in net.routes:
            raise ConnectionRefusedError(111, "Connection refused")
        host = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
        real_connect(sock, (host, net.routes[address[0]]))

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return net


class Server:
    """A local server that answers each connection with the next answer, the last one again and again."""

    def __init__(self, answers: tuple[Answer, ...], tls: ssl.SSLContext | None = None):
        self.answers, self.tls, self.requests = list(answers), tls, list[bytes]()
        self.server_names = list[str | None]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        if tls:
            tls.sni_callback = lambda _sock, name, _context: self.server_names.append(name)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with self.tls.wrap_socket(connection, server_side=True) if self.tls else connection as stream:
                request = b""
                while not request.endswith(b"\r\n\r\n") and request[:1] != b"\x16":  # or a TLS hello to a server without
                    piece = stream.recv(65536)
                    if not piece:
                        return
                    request += piece
                self.requests.append(request)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if isinstance(answer, bytes):
                    stream.sendall(answer)
                else:
                    answer(stream, request)
        except OSError:
            pass  # the client has seen enough


@pytest.fixture
def serve(net: Net) -> Iterator[Callable[..., Server]]:
    """Start a server that is reached at PUBLIC, the address of pictures.example."""
    servers: list[Server] = []

    def start(*answers: Answer, tls: ssl.SSLContext | None = None, at: str = PUBLIC) -> Server:
        servers.append(Server(answers, tls))
        net.routes[at] = servers[-1].port
        return servers[-1]

    yield start
    for server in servers:
        server.listener.close()


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")


def body(*pieces: bytes, headers: bytes = b"", pause_s: float = 0.0) -> Callable[[socket.socket, bytes], None]:
    def answer(stream: socket.socket, _request: bytes) -> None:
        stream.sendall(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n")
        for piece in pieces:
            stream.sendall(piece)
            time.sleep(pause_s)

    return answer


def refused(url: str, policy: FetchPolicy = HTTP) -> str:
    with pytest.raises(InvalidRequest) as caught:
        fetch(url, policy, "image_url")
    assert caught.value.param == "image_url" and caught.value.message.startswith("image_url: ")
    assert caught.value.message.isprintable() and len(caught.value.message) < 400
    return caught.value.message


INTERNAL_NAMES = {
    "localhost": ["127.0.0.1", "::1"],
    "localhost.localdomain": ["127.0.0.1"],
    "metadata.google.internal": [METADATA],
    "metadata": [METADATA],
    "intranet": [PUBLIC],
    "inside.example": ["10.1.2.3"],
    "mixed.example": [PUBLIC, "192.168.0.1"],
    "mixed6.example": [PUBLIC, "fd00::1"],
    "zero.example": ["0.0.0.0"],
    "six.example": ["::1"],
    "mapped.example": ["::ffff:169.254.169.254"],
    "nat64.example": ["64:ff9b::a9fe:a9fe"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
}
HOSTS = """
    localhost LOCALHOST localhost. localhost.localdomain metadata.google.internal metadata intranet inside.example
    mixed.example mixed6.example zero.example six.example mapped.example nat64.example 127.0.0.1.nip.example
    127.0.0.1 127.0.0.1. 127.0.0.1:80 127.1 127.0.1 127.255.255.254 2130706433 017700000001 0177.0.0.1 0177.0.0.01 00127.0.0.1
    0x7f000001 0x7f.0.0.1 0x7f.1 0X7F.0.0.1 127.0.0.0x1 127.0.0.01 0 0.0.0.0 00000 0x0 0x 1 4294967295 4294967296 255.255.255.255
    256.256.256.256 1.2.3.4.5 10.0.0.1 10.1 172.16.0.1 172.31.255.255 192.168.1.1 192.168.257 100.64.0.1 100.100.100.200
    169.254.169.254 2852039166 0xA9FEA9FE 0251.0376.0251.0376 169.254.43518 192.0.0.192 192.0.2.1 198.18.0.1 198.51.100.7
    203.0.113.9 192.88.99.1 224.0.0.1 239.255.255.250 240.0.0.1 168.63.129.16
    [::1] [::] [0:0:0:0:0:0:0:1] [::127.0.0.1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:0:127.0.0.1] [0:0:0:0:0:ffff:a9fe:a9fe]
    [fe80::1] [fe80::1%25eth0] [fe80::1%eth0] [fc00::1] [fd00:ec2::254] [fec0::1] [ff02::1] [ff0e::1] [64:ff9b::7f00:1]
    [64:ff9b::169.254.169.254] [64:ff9b:1::a00:1] [2002:7f00:1::] [2002:a9fe:a9fe::1] [2001:0:a9fe:a9fe::1] [2001::1]
    [2001:db8::1] [3fff::1] [100::1] [5f00::1] [4000::1] [::1]. [::1]:80 [v1.fe80] [127.0.0.1] [localhost] [] [ ::1 ::1
    user@pictures.example user:secret@pictures.example @pictures.example pictures.example@127.0.0.1 :@127.0.0.1
    127.0.0.1%00.pictures.example 127.0.0.1%2523.example %31%32%37.0.0.1 127%2e0%2e0%2e1 pictures.example%2f@127.0.0.1
    １２７.0.0.1 ①②⑦.⓪.⓪.① 127。0。0。1 127．0．0．1 ⓛⓞⓒⓐⓛⓗⓞⓢⓣ loc\u00adalhost localhost\u200b pictures.exa\u2100mple
    pictures\u3002example ｐictures.example faß.example xn--.\u0301.example -pictures.example pictures-.example pictures..example
    . .. .pictures.example pictures.example.. pict!ures.example pictures.example, pictures.example;a pict$.example a.b*c.example
    pictures.example: pictures.example:http pictures.example:22 pictures.example:6379 pictures.example:8080 pictures.example:0
    pictures.example:65616 pictures.example:99999999 pictures.example:-80 pictures.example:+80 pictures.example:8_0
    pictures.example:８０ pictures.example:80:80 pictures.example:80@127.0.0.1:80 pictures.example:080000
""".split()
URLS = [
    *(f"{scheme}://{host}/p.png" for host in HOSTS for scheme in ("http", "https")),
    "",
    " ",
    "/etc/passwd",
    "//pictures.example/p.png",
    "pictures.example/p.png",
    "http:",
    "http:/",
    "http://",
    "http:///p.png",
    "http:////127.0.0.1/p.png",
    "http:pictures.example",
    "http:/pictures.example",
    "http:\\\\127.0.0.1\\p.png",
    "http://127.0.0.1\\@pictures.example/",
    "http://pictures.example\\@127.0.0.1/",
    "http://pictures.example\\.127.0.0.1/",
    "http:/\\127.0.0.1/",
    "http://127.0.0.1#@pictures.example/",
    "http://127.0.0.1?@pictures.example/",
    "http://127.0.0.1;@pictures.example/",
    "http://pictures.example#@127.0.0.1:80@/\\",
    "http://pictures.example /p.png",
    "http:// pictures.example/p.png",
    " http://pictures.example/p.png",
    "http://pictures.example/p.png ",
    "http://pictures.example/p.png\n",
    "http://pictures.example/\r\nHost: 127.0.0.1\r\n\r\nGET /admin",
    "http://pictures.example\r\n.127.0.0.1/",
    "ht\ntp://pictures.example/",
    "http://pictures.example/\tp.png",
    "http://pictures.example/\0p.png",
    "http://pictures.example/\x7fp.png",
    "http://pictures.example/\u2028p.png",
    "http://pictures.example/\u3000p.png",
    "http://pictures.example/\ufeffp.png",
    "http://pictures.example/\ud800.png",
    "\x01http://127.0.0.1/",
    "file:///etc/passwd",
    "file://pictures.example/etc/passwd",
    "FILE:///etc/passwd",
    "ftp://pictures.example/p.png",
    "gopher://127.0.0.1:6379/_INFO",
    "dict://127.0.0.1:11211/stats",
    "ldap://127.0.0.1/",
    "tftp://127.0.0.1/x",
    "jar:http://127.0.0.1!/",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/info",
    "ws://127.0.0.1/",
    "s3://bucket/key",
    "javascript:alert(1)",
    "data:image/png;base64,AAAA",
    "blob:https://pictures.example/1",
    "url:http://127.0.0.1/",
    "https+http://pictures.example/",
    "http://[::1]127.0.0.1/",
    "http://127.0.0.1[::1]/",
    "http://[::ffff:127.0.0.1]:80@pictures.example/",
    "http://pictures.example/" + "a" * 8192,
    "http://" + "a" * 64 + ".example/",
    "http://" + "a." * 130 + "example/",
]


@pytest.mark.parametrize("url", URLS)
def test_tricks_reach_nothing(net: Net, url: str) -> None:
    net.names |= INTERNAL_NAMES
    message = refused(url)
    assert net.connected == []
    assert "secret" not in message and "p.png" not in message


@pytest.mark.parametrize(
    "address",
    "1.1.1.1 8.8.8.8 93.184.216.34 172.32.0.1 100.128.0.1 2606:4700::1111 2a00:1450:4001::1 64:ff9b::101:101".split(),
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_a_picture_arrives(net: Net, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server = serve(OK)
    assert fetch("http://Pictures.EXAMPLE./a b?".replace(" ", "%20") + "x=ü&y=[1]{}#part", HTTP, "image_url") == b"hello"
    request = server.requests[0].decode("ascii").split("\r\n")
    assert request[0] == "GET /a%20b?x=%C3%BC&y=[1]%7B%7D HTTP/1.1"
    assert "Host: pictures.example" in request and "Accept-Encoding: identity" in request
    assert not any(line.lower().startswith(("cookie", "authorization", "referer")) for line in request)
    assert net.asked == ["pictures.example"] and net.connected == [(PUBLIC, 80)]


def test_real_sockets_with_allow_private() -> None:
    server = Server((OK,))
    try:
        policy = FetchPolicy(allow_http=True, allow_private=True)
        for host in ("127.0.0.1", "localhost"):
            assert fetch(f"http://{host}:{server.port}/", policy, "image_url") == b"hello"
            assert f"Host: {host}:{server.port}".encode() in server.requests[-1]
        assert "no public address" in refused("http://127.0.0.1/")
        assert "https://" in refused(f"http://127.0.0.1:{server.port}/", FetchPolicy(allow_private=True))
    finally:
        server.listener.close()


def test_unicode_names_are_asked_for_in_ascii(net: Net, serve: Callable[..., Server]) -> None:
    net.names["xn--bcher-kva.example"] = [PUBLIC]
    server = serve(OK)
    assert fetch("http://Bücher.example/", HTTP, "image_url") == b"hello"
    assert b"Host: xn--bcher-kva.example\r\n" in server.requests[0]


def test_user_names_are_refused_and_not_repeated() -> None:
    assert refused("http://user:hidden@pictures.example/") == ("image_url: the URL has a user name or password; must have none")


def test_only_https_unless_told() -> None:
    assert "must begin with https://" in refused("http://pictures.example/", FetchPolicy())


@pytest.mark.parametrize(
    ("host", "welcome"),
    [
        ("pictures.example", True),
        ("PICTURES.example.", True),
        ("a.cdn.example", True),
        ("a.b.cdn.example", True),
        ("cdn.example", False),
        ("evilcdn.example", False),
        ("pictures.example.evil.example", False),
        ("evil.example", False),
        ("inside.example", False),
        ("private.cdn.example", False),
    ],
)
def test_allowed_hosts(net: Net, serve: Callable[..., Server], host: str, welcome: bool) -> None:
    hosts = "a.cdn.example a.b.cdn.example cdn.example evilcdn.example evil.example pictures.example.evil.example"
    net.names |= {name: [PUBLIC] for name in hosts.split()}
    net.names |= {"inside.example": [METADATA], "private.cdn.example": [METADATA]}
    serve(OK)
    policy = FetchPolicy(allowed_hosts=("Pictures.example", "*.cdn.example"), allow_http=True)
    if welcome:
        assert fetch(f"http://{host}/", policy, "image_url") == b"hello"
    else:
        refused(f"http://{host}/", policy)
        assert net.connected == []


def test_a_name_is_asked_once_and_its_answer_used(
    net: Net, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebinding resolver: public for the check, internal for whoever asks again."""
    answers, look_up = [PUBLIC, METADATA, "127.0.0.1"], socket.getaddrinfo

    def rebinding(_host: str, port: int, **kwargs: Any) -> list[Any]:
        return look_up(answers.pop(0), port, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    serve(OK)
    assert fetch("http://rebind.example/", HTTP, "image_url") == b"hello"
    assert net.connected == [(PUBLIC, 80)] and answers == [METADATA, "127.0.0.1"]
    assert "no public address" in refused("http://rebind.example/")
    assert net.connected == [(PUBLIC, 80)]


def test_a_second_address_is_tried(net: Net, serve: Callable[..., Server]) -> None:
    net.names["pictures.example"] = [OTHER_PUBLIC, "93.184.216.35", PUBLIC]
    serve(OK)
    assert fetch("http://pictures.example/", HTTP, "image_url") == b"hello"
    assert [host for host, _ in net.connected] == [OTHER_PUBLIC, "93.184.216.35", PUBLIC]
    net.routes.clear()
    assert "can't be reached" in refused("http://pictures.example/")


@pytest.mark.parametrize(
    "location",
    [
        f"http://{METADATA}/latest/meta-data/",
        f"//{METADATA}/latest/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::ffff:169.254.169.254]/",
        "http://inside.example/",
        "http://localhost:8000/v1/images",
        "http://pictures.example:8080/",
        "http://user:secret@pictures.example/",
        "http://pictures.example\\@127.0.0.1/",
        "http://127.0.0.1%2f@pictures.example/",
        "http:// 127.0.0.1/",
        "file:///etc/passwd",
        "ftp://pictures.example/",
        "gopher://127.0.0.1:6379/_x",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "http://[::1",
        "http://\xe2\x93\xaa.0.0.1/",
        "///127.0.0.1/",
        "http://x" + "y" * 9000,
    ],
)
def test_a_redirect_is_checked_like_a_url(net: Net, serve: Callable[..., Server], location: str) -> None:
    net.names |= INTERNAL_NAMES
    serve(redirect(location))
    message = refused("http://pictures.example/?token=secret")
    assert all(connected == (PUBLIC, 80) for connected in net.connected) and len(net.connected) <= 4
    assert "secret" not in message


def test_a_redirect_is_followed(net: Net, serve: Callable[..., Server]) -> None:
    net.names["cdn.example"] = ["93.184.216.40"]
    first = serve(redirect("/second?x=1", 301), redirect("third\xc3\xbc", 307), redirect("http://cdn.example/last", 308))
    last = serve(OK, at="93.184.216.40")
    assert fetch("http://pictures.example/dir/first", HTTP, "image_url") == b"hello"
    paths = [request.split()[1] for request in first.requests + last.requests]
    assert paths == [b"/dir/first", b"/second?x=1", b"/third%C3%BC", b"/last"]
    assert net.asked == ["pictures.example"] * 3 + ["cdn.example"]


def test_redirects_end(net: Net, serve: Callable[..., Server]) -> None:
    server = serve(redirect("/again"))
    assert "redirects more than 3 times" in refused("http://pictures.example/")
    assert len(server.requests) == 4
    assert "redirects more than 0 times" in refused("http://pictures.example/", FetchPolicy(allow_http=True, max_redirects=0))
    serve(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n")
    assert "redirects" in refused("http://pictures.example/")


def test_a_redirect_obeys_the_policy(net: Net, serve: Callable[..., Server]) -> None:
    net.names["elsewhere.example"] = [PUBLIC]
    serve(redirect("http://elsewhere.example/"))
    policy = FetchPolicy(allowed_hosts=("pictures.example",), allow_http=True)
    assert "'elsewhere.example' is not among the hosts" in refused("http://pictures.example/", policy)


def slowly(stream: socket.socket, _request: bytes) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + bytes(500):
        stream.sendall(bytes([byte]))
        time.sleep(0.02)


def chatty(stream: socket.socket, _request: bytes) -> None:
    while True:
        stream.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


def silent(stream: socket.socket, _request: bytes) -> None:
    time.sleep(3)


@pytest.mark.parametrize(
    "answer",
    [
        slowly,
        chatty,
        silent,
        body(*[b"x"] * 200, headers=b"Content-Length: 200\r\n", pause_s=0.02),
        body(*[b"1\r\nx\r\n"] * 200, headers=b"Transfer-Encoding: chunked\r\n", pause_s=0.02),
        body(*[b"x"] * 200, pause_s=0.02),
    ],
    ids=["head drips", "continues for ever", "silent", "body drips", "chunks drip", "endless drip"],
)
def test_the_deadline_is_for_everything(net: Net, serve: Callable[..., Server], answer: Answer) -> None:
    serve(answer)
    began = time.monotonic()
    message = refused("http://pictures.example/", FetchPolicy(allow_http=True, timeout_s=0.3))
    assert "within 0.3 s" in message and time.monotonic() - began < 2.5


def test_the_deadline_is_for_all_hops_together(net: Net, serve: Callable[..., Server]) -> None:
    def later(stream: socket.socket, _request: bytes) -> None:
        time.sleep(0.2)
        stream.sendall(redirect("/on"))

    serve(later)
    policy = FetchPolicy(allow_http=True, timeout_s=0.5, max_redirects=100)
    assert "within 0.5 s" in refused("http://pictures.example/", policy)


def test_the_deadline_is_for_the_resolver_and_the_handshake_too(
    net: Net, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(silent)  # answers a TLS hello with nothing
    policy = FetchPolicy(allow_http=True, timeout_s=0.3)
    assert "within 0.3 s" in refused("https://pictures.example/", policy)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: time.sleep(1) or [])
    assert "within 0.3 s" in refused("https://pictures.example/", policy)


def test_names_that_do_not_exist(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_args: Any, **_kwargs: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    assert "'nowhere.example' has no public address" in refused("http://nowhere.example/?token=secret")


SMALL = FetchPolicy(allow_http=True, max_bytes=1000, timeout_s=5.0)


@pytest.mark.parametrize(
    "answer",
    [
        body(b"x" * 1001, headers=b"Content-Length: 1001\r\n"),
        body(headers=b"Content-Length: 99999999999999999999\r\n"),
        body(*[b"x" * 500] * 3),
        body(*[b"x" * 500] * 3, headers=b"Content-Length: -1\r\n"),
        body(*[b"x" * 500] * 3, headers=b"Content-Length: many\r\n"),
        body(*[b"1f4\r\n" + b"x" * 500 + b"\r\n"] * 3, b"0\r\n\r\n", headers=b"Transfer-Encoding: chunked\r\n"),
        body(
            *[b"1f4\r\n" + b"x" * 500 + b"\r\n"] * 3,
            b"0\r\n\r\n",
            headers=b"Transfer-Encoding: chunked\r\nContent-Length: 10\r\n",
        ),
        body(b"ffffffff\r\n" + b"x" * 2000, headers=b"Transfer-Encoding: chunked\r\n"),
    ],
)
def test_too_many_bytes(net: Net, serve: Callable[..., Server], answer: Answer) -> None:
    serve(answer)
    with pytest.raises(TooLarge, match="'pictures.example' answers with more than 1000 bytes") as caught:
        fetch("http://pictures.example/?token=secret", SMALL, "image_url")
    assert caught.value.status == 413 and caught.value.param == "image_url" and "secret" not in caught.value.message


def test_exactly_the_limit(net: Net, serve: Callable[..., Server]) -> None:
    exact = b"x" * 1000
    for answer in (
        body(exact),
        body(exact, headers=b"Content-Length: 1000\r\n"),
        body(b"3e8\r\n" + exact + b"\r\n0\r\n\r\n", headers=b"Transfer-Encoding: chunked\r\n"),
        body(exact, b"more than was said", headers=b"Content-Length: 1000\r\n"),
    ):
        serve(answer)
        assert fetch("http://pictures.example/", SMALL, "image_url") == exact


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (body(b"x" * 10, headers=b"Content-Length: 500\r\n"), "hangs up before the end"),
        (body(b"a\r\n123", headers=b"Transfer-Encoding: chunked\r\n"), "proper HTTP"),
        (body(b"zz\r\n123", headers=b"Transfer-Encoding: chunked\r\n"), "proper HTTP"),
        (body(b"x" * 10, headers=b"Content-Encoding: gzip\r\n"), "compressed"),
        (body(b"x" * 10, headers=b"Transfer-Encoding: gzip, chunked\r\n"), "compressed"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "proper HTTP"),
        (b"-ERR unknown command\r\n", "proper HTTP"),
        (b"", "proper HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n", "proper HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", "proper HTTP"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret", "answers 404; must be 200"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\nx", "answers 206"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "answers 101"),
        (b"HTTP/1.1 500 Oh\r\n\r\n", "answers 500"),
    ],
)
def test_answers_that_are_no_picture(net: Net, serve: Callable[..., Server], answer: Answer, message: str) -> None:
    serve(answer)
    said = refused("http://pictures.example/private?token=secret", SMALL)
    assert message in said and "'pictures.example'" in said and "secret" not in said and "private" not in said


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for pictures.example that signs itself, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.example")]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_tls_checks_the_name_and_not_the_address(
    net: Net, serve: Callable[..., Server], tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(OK, tls=tls)
    policy = FetchPolicy()
    assert "no valid certificate" in refused("https://pictures.example/", policy)  # nobody signed it
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch("https://pictures.example/p?q=1", policy, "image_url") == b"hello"
    assert server.server_names[-1] == "pictures.example" and net.connected[-1] == (PUBLIC, 443)
    assert b"Host: pictures.example\r\n" in server.requests[-1]
    net.names["other.example"] = [PUBLIC]
    assert "'other.example' has no valid certificate" in refused("https://other.example/", policy)
    assert "has no valid certificate" in refused(f"https://{PUBLIC}/", policy)
    assert len(server.requests) == 1


def test_tls_is_not_left_by_a_redirect(
    net: Net, serve: Callable[..., Server], tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    serve(redirect("http://pictures.example/"), tls=tls)
    assert "redirects to a URL that begins with http://" in refused("https://pictures.example/", FetchPolicy())
    serve(OK)  # no TLS there
    assert "can't be reached" in refused("https://pictures.example/", FetchPolicy())


def test_data_urls() -> None:
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    policy = FetchPolicy(max_bytes=256)
    wrapped = "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for content in (text, text.rstrip("="), wrapped):
        assert read_url(f"data:image/png;base64,{content}", policy, "image") == data
    assert read_url(f"DATA:image/svg+xml;charset=utf-8;BASE64,{text}", policy, "image") == data
    assert read_url("data:image/png;base64,", policy, "image") == b""
    with pytest.raises(TooLarge, match="257 bytes; must be at most 256"):
        read_url("data:image/png;base64," + base64.b64encode(bytes(257)).decode(), policy, "image")


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,hello",
        "data:;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,A",
        "data:image/png;base64,AA*A",
        "data:image/png;base64,AA=A",
        "data:image/png;base64,AAA\u0410",
        "data:image/png;base64,%41AAA",
        "data:image/png;base64;,AAAA",
        "data:image/png\n;base64,AAAA",
        "data:image/png;" + "a=b;" * 100 + "base64,AAAA",
        "data://pictures.example/p.png",
    ],
)
def test_data_urls_that_are_wrong(net: Net, url: str) -> None:
    with pytest.raises(InvalidRequest, match="image: a data URL") as caught:
        read_url(url, FetchPolicy(), "image")
    assert caught.value.param == "image" and net.connected == []


def test_other_urls_are_fetched(net: Net, serve: Callable[..., Server]) -> None:
    serve(OK)
    assert read_url("http://pictures.example/", HTTP, "image") == b"hello"
    with pytest.raises(InvalidRequest):
        read_url(" data:image/png;base64,AAAA", HTTP, "image")
