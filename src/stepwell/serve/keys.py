"""Who may use the server: API keys, kept as digests and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from pathlib import Path

from stepwell.config.schema import ServerOptions
from stepwell.errors import InvalidRequest

EVERYBODY = ""  # the owner of everything on a server without keys


class Keys:
    """The digests of the keys that are accepted. Without any, everybody is."""

    def __init__(self, digests: frozenset[str] = frozenset()):
        self._digests = digests

    @classmethod
    def of(cls, options: ServerOptions) -> Keys:
        """The keys of the options. Raises InvalidRequest for a file that holds none, and for an open door to the network."""
        digests = set()
        if options.api_key is not None:
            if not options.api_key.strip():
                raise InvalidRequest("api_key is empty; leave it out to ask for none", param="api_key")
            digests.add(_digest(options.api_key))
        if options.api_key_file is not None:
            digests |= _read(Path(options.api_key_file))
        if not digests and not options.allow_no_key and not is_loopback(options.host):
            raise InvalidRequest(
                f"host = {options.host!r} lets other machines in and no key is asked for; set api_key or api_key_file, "
                "or say allow_no_key",
                param="host",
            )
        return cls(frozenset(digests))

    @property
    def any(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._digests)

    def owner(self, authorization: str) -> str | None:
        """The owner an `Authorization` header speaks for: the key's digest, or None if it is no key of ours."""
        if not self._digests:
            return EVERYBODY
        scheme, _, key = authorization.partition(" ")
        key = key.strip(" \t").encode("latin-1").decode("utf-8", "surrogateescape")  # headers come as Latin-1
        given = _digest(key) if scheme.lower() == "bearer" else ""
        matches = [digest for digest in self._digests if hmac.compare_digest(digest, given)]
        return matches[0] if matches else None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _read(path: Path) -> set[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"api_key_file = {str(path)!r} can't be read: {error}", param="api_key_file") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InvalidRequest(f"api_key_file = {str(path)!r} holds no key; write one a line", param="api_key_file")
    return {match[1].lower() if (match := re.fullmatch(r"sha256:([0-9a-fA-F]{64})", key)) else _digest(key) for key in keys}
