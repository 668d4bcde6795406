"""Pictures from URLs that clients give: fetched from the public internet and from nowhere else.

A name is resolved once, every address it has is checked, and the connection goes to a checked address, so that a name which
means something else a moment later gains nothing. Each hop of a redirect is a new URL. No proxies, no cookies, no retries.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from stepwell.errors import InvalidRequest
from stepwell.media.uploads import TooLarge

PORTS = {"http": 80, "https": 443}
MAX_URL_CHARS = 8192
PIECE_BYTES = 64 * 1024
SAFE = "/%:@!$&'()*+,;=~?[]"  # what is not quoted in a path and query, besides letters, digits and -._
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@%]+)(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9=.+_-]+)*;base64", re.IGNORECASE)
_BLANKS = str.maketrans("", "", " \t\r\n\f")
# what `is_global` lets through although it is not the public internet, or is a tunnel to somewhere else: protocol assignments
# with a cloud's metadata among them, 6to4 relays, Azure's own services; Teredo and others, documentation, 6to4, documentation
_REFUSED_V4, _REFUSED_V6 = (
    [ipaddress.ip_network(text) for text in texts.split()]
    for texts in ("192.0.0.0/24 192.88.99.0/24 168.63.129.16/32", "2001::/23 2001:db8::/32 2002::/16 3fff::/20")
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all else is mapped, compatible, local, multicast or not given out
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # the way to public IPv4 hosts from networks that have IPv6 only
_REQUEST = (
    "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: stepwell\r\nAccept: image/png, image/jpeg, image/webp\r\n"
    "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
)
Found = list[tuple[int, tuple[Any, ...]]]  # socket family and address of each address of a host


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What may be fetched. `allowed_hosts` are ASCII names, or `*.name` for all below a name; none means any.

    `timeout_s` is for the whole exchange, redirects included. `allow_private` also allows any port; it is for tests.
    """

    allowed_hosts: tuple[str, ...] = ()
    allow_http: bool = False
    allow_private: bool = False
    max_bytes: int = 50 * 1024 * 1024
    timeout_s: float = 10.0
    max_redirects: int = 3


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL after every check that needs no network. `path` includes the query."""

    scheme: str
    host: str  # ASCII, lower-case
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def read_url(url: str, policy: FetchPolicy, name: str) -> bytes:
    """The bytes a `data:` or http(s) URL stands for. `name` is the field at fault in errors: `TooLarge`, `InvalidRequest`."""
    is_data = url[:5].lower() == "data:"
    return read_data_url(url, policy.max_bytes, name) if is_data else fetch(url, policy, name)


def read_data_url(url: str, max_bytes: int, name: str) -> bytes:
    """The bytes inside a `data:image/...;base64,` URL. What they are is for the decoder to find out."""
    head, comma, payload = url.partition(",")
    if not comma or len(head) > 200 or not _DATA_URL.fullmatch(head):
        raise InvalidRequest(f"{name}: a data URL that is not data:image/png;base64,... (or jpeg, webp)", param=name)
    payload = payload.translate(_BLANKS).rstrip("=")
    size = len(payload) * 3 // 4
    if size > max_bytes:
        raise TooLarge(f"{name}: a data URL of {size} bytes; must be at most {max_bytes}", param=name)
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except ValueError:
        raise InvalidRequest(f"{name}: a data URL whose content is not base64", param=name) from None


def fetch(url: str, policy: FetchPolicy, name: str) -> bytes:
    """The bytes at an http(s) URL. Blocks. Raises `TooLarge` or `InvalidRequest`, which name the host, never the query."""
    job = _Fetch(policy, name, time.monotonic() + policy.timeout_s)
    target = job.target(url)
    for _ in range(policy.max_redirects + 1):
        found = job.get(target)
        if isinstance(found, bytes):
            return found
        target = found
    raise job.refusal(target.host, f"redirects more than {policy.max_redirects} times")


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is a single host on the public internet, also through NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in net for net in _REFUSED_V4)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _GLOBAL_V6 and address.is_global and not any(address in net for net in _REFUSED_V6)


def plain_host(text: str) -> str:
    """A host as the name or address that will be used, in one spelling, or ValueError."""
    if text.startswith("["):
        return str(ipaddress.IPv6Address(text[1:-1]))
    host = text.lower()
    if not host.isascii():
        encoded = host.encode("idna").decode("ascii")
        if encoded.encode("ascii").decode("idna") != host:  # look-alikes that turn into digits and dots
            raise ValueError("not in IDNA's own spelling")
        host = encoded
    host = host.removesuffix(".")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        return str(ipaddress.IPv4Address(host))  # refuses the octal, hexadecimal and short forms which resolvers take
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in host.split(".")):
        raise ValueError("not a host name")
    return host


@dataclass(frozen=True, slots=True)
class _Fetch:
    policy: FetchPolicy
    name: str
    deadline: float  # monotonic seconds

    def refusal(self, host: str | None, why: str) -> InvalidRequest:
        return InvalidRequest(f"{self.name}: {'the URL' if host is None else repr(host[:100])} {why}", param=self.name)

    def left_s(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def target(self, url: str, sender: str | None = None) -> _Target:
        """Check a URL without any network. `sender` is the host that redirects to it, which errors name where they must."""
        of = "" if sender is None else "redirects to a URL that "
        if len(url) > MAX_URL_CHARS or "\\" in url or not url.isprintable() or any(letter.isspace() for letter in url):
            why = f"is longer than {MAX_URL_CHARS} characters or has spaces, backslashes or characters that can't be seen"
            raise self.refusal(sender, f"{of}{why}")
        try:
            parts = urlsplit(url)
        except ValueError:
            raise self.refusal(sender, f"{of}is not valid; must be like https://example.com/picture.png") from None
        if parts.scheme not in PORTS or not url[len(parts.scheme) :].startswith("://"):
            raise self.refusal(sender, f"{of}does not begin with https://")
        if parts.scheme == "http" and not self.policy.allow_http:
            raise self.refusal(sender, f"{of}begins with http://; must begin with https://")
        if "@" in parts.netloc:
            raise self.refusal(sender, f"{of}has a user name or password; must have none")
        match = _AUTHORITY.fullmatch(parts.netloc)
        if match is None:
            raise self.refusal(sender, f"{of}has no valid host and port; must be like https://example.com/picture.png")
        try:
            host = plain_host(match[1])
        except ValueError:
            raise self.refusal(match[1], "is not a valid host; must be like example.com, or its xn-- form") from None
        port = int(match[2]) if match[2] else PORTS[parts.scheme]
        self.check_allowed(host, port)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(parts.scheme, host, port, quote(path, safe=SAFE))

    def check_allowed(self, host: str, port: int) -> None:
        """Whether the policy has anything against a host and port, before anybody is asked where it is."""
        names, private = [entry.lower() for entry in self.policy.allowed_hosts], self.policy.allow_private
        if names and not any(host == entry or (entry[:2] == "*." and host.endswith(entry[1:])) for entry in names):
            raise self.refusal(host, "is not among the hosts this server fetches from")
        if not (0 < port < 65536 if private else port in PORTS.values()):
            raise self.refusal(host, f"has port {port}; must be 80 or 443")
        if not private and "." not in host and ":" not in host:
            raise self.refusal(host, "has no public address")  # a machine of this network, whatever the resolver says

    def get(self, target: _Target) -> bytes | _Target:
        """One request: the body, or where it is said to be instead."""
        try:
            with self.connect(target, self.resolve(target)) as sock:
                return self.exchange(target, sock)
        except TimeoutError:
            raise self.refusal(target.host, f"did not answer in full within {self.policy.timeout_s:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise self.refusal(target.host, f"has no valid certificate ({error.verify_message})") from None
        except http.client.HTTPException:
            raise self.refusal(target.host, "does not answer in proper HTTP") from None
        except OSError as error:
            raise self.refusal(target.host, f"can't be reached ({error.strerror or type(error).__name__})") from None

    def resolve(self, target: _Target) -> Found:
        """Socket family and address of every address of a host, all of them checked. Asks exactly once."""
        found = _look_up(target.host, target.port, self.left_s())
        public = all(is_public(ipaddress.ip_address(address[0])) for _, address in found)
        if not found or not (public or self.policy.allow_private):
            # the same words for no address and a private one: which internal names exist is nobody's business
            raise self.refusal(target.host, "has no public address")
        return found

    def connect(self, target: _Target, addresses: Found) -> socket.socket:
        """A connection to the first address that takes it; over TLS the certificate must be for the name."""
        for number, (family, address) in enumerate(addresses):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(self.left_s() / (len(addresses) - number))  # a dead address must not use up all the time
                sock.connect(address)
                sock.settimeout(self.left_s())
                if target.scheme == "http":
                    return sock
                return ssl.create_default_context().wrap_socket(sock, server_hostname=target.host)
            except OSError as error:
                sock.close()
                if isinstance(error, ssl.SSLError) or number == len(addresses) - 1:
                    raise
        raise AssertionError("resolve returns at least one address")

    def exchange(self, target: _Target, sock: socket.socket) -> bytes | _Target:
        sock.sendall(_REQUEST.format(path=target.path, host=target.authority).encode("ascii"))
        with http.client.HTTPResponse(cast(socket.socket, _Reader(sock, self)), method="GET") as response:
            response.begin()
            if response.status in (301, 302, 303, 307, 308):
                return self.redirected(target, response.getheader("Location") or "")
            if response.status != 200:
                raise self.refusal(target.host, f"answers {response.status}; must be 200")
            return self.body(target, response)

    def redirected(self, target: _Target, location: str) -> _Target:
        """The next hop, checked like the first. A header's bytes above 127 come as Latin-1, so that is how they are quoted."""
        here = f"{target.scheme}://{target.authority}{target.path}"
        try:
            url = urljoin(here, quote(location, safe=SAFE + "#\\ ", encoding="latin-1"))
        except ValueError:
            raise self.refusal(target.host, "redirects to a URL that is not valid") from None
        return self.target(url, target.host)

    def body(self, target: _Target, response: http.client.HTTPResponse) -> bytes:
        limit, declared = self.policy.max_bytes, response.length
        coding = response.getheader("Content-Encoding") or "identity"
        if coding.lower() != "identity" or (response.getheader("Transfer-Encoding") and not response.chunked):
            raise self.refusal(target.host, "answers with a compressed body, which was not asked for")
        data, large = bytearray(), declared is not None and declared > limit
        while not large and (piece := response.read(min(PIECE_BYTES, limit + 1 - len(data)))):
            data += piece
            large = len(data) > limit
        if large:
            raise TooLarge(f"{self.name}: {target.host!r} answers with more than {limit} bytes", param=self.name)
        if declared is not None and len(data) != declared:
            raise self.refusal(target.host, "hangs up before the end")
        return bytes(data)


class _Reader(io.RawIOBase):
    """What `HTTPResponse` reads from: every read may take what is left of the whole fetch's time and no more."""

    def __init__(self, sock: socket.socket, job: _Fetch):
        super().__init__()
        self._sock, self._job = sock, job

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, PIECE_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._job.left_s())
        return self._sock.recv_into(buffer)


def _look_up(host: str, port: int, timeout_s: float) -> Found:
    """What the resolver says, or nothing; TimeoutError when it says nothing in time. Only a thread can be left waiting."""
    answers: queue.SimpleQueue[Found] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put([(found[0], found[4]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError):
            answers.put([])

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError from None
