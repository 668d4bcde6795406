"""Signed notifications to one URL, after Standard Webhooks 1.0.0 (https://www.standardwebhooks.com).

A thread of its own makes the attempts, one at a time; an event that waits for its next attempt holds up no other. Receivers
must expect an event twice, or after a later one: `webhook-id` tells them. What is not delivered when the process ends is lost.
"""

from __future__ import annotations

import base64
import binascii
import heapq
import hmac
import http.client
import json
import logging
import math
import random
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from stepwell.errors import InvalidRequest

logger = logging.getLogger(__name__)
SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64  # what the standard allows
MAX_RETRY_AFTER_S = 300.0
EVENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")  # it becomes a header


@dataclass(order=True, slots=True)
class _Event:
    due: float  # time.monotonic seconds
    number: int
    id: str = field(compare=False)
    body: bytes = field(compare=False)
    attempts: int = field(default=0, compare=False)


class Webhooks:
    """Sends events to `url`, signed with `secret` ("whsec_" and 24 to 64 bytes in base64). Raises InvalidRequest.

    An event is given up after `attempts`; between them it waits about `delay_s` seconds, twice that, four times that and so
    on, or as long as Retry-After says. `timeout_s` is for connecting, and again for the answer, which must be 2xx: redirects
    are not followed. `max_waiting` events wait, then the oldest is dropped. A receiver that answers 410 gets nothing more.
    """

    def __init__(
        self, url: str, secret: str, *, attempts: int = 5, delay_s: float = 4.0, timeout_s: float = 10.0, max_waiting: int = 1000
    ):
        self._url, self._key = _checked_url(url), _checked_secret(secret)
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        self._attempts, self._delay_s, self._timeout_s, self._max_waiting = attempts, delay_s, timeout_s, max_waiting
        self._wake = threading.Condition()  # guards the five below
        self._waiting: list[_Event] = []  # a heap
        self._sending: _Event | None = None
        self._notified = 0
        self._is_refused = False
        self._closes_at = math.inf
        self._thread = threading.Thread(target=self._run, name="stepwell-webhooks", daemon=True)
        self._thread.start()

    def notify(self, event_id: str, kind: str, data: dict[str, Any]) -> None:
        """Have an event delivered, such as "video.completed". Returns at once and never raises; what goes wrong is logged.

        `event_id` is the receiver's means to tell a repetition: letters, digits, ".", "_" and "-", never a client's choice.
        """
        try:
            if not EVENT_ID.fullmatch(event_id):
                raise ValueError("its id must be letters, digits, '.', '_' and '-'")
            content = {"type": kind, "created_at": int(time.time()), "data": data}
            body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            logger.error("webhook %r not sent: %s", event_id, error)
            return
        with self._wake:
            if self._is_refused or self._closes_at < math.inf:
                why = "the receiver wants no more" if self._is_refused else "the server is closing"
                logger.warning("webhook %s not sent: %s", event_id, why)
                return
            while len(self._waiting) >= self._max_waiting:
                oldest = min(self._waiting, key=lambda event: event.number)
                self._waiting.remove(oldest)
                heapq.heapify(self._waiting)
                logger.error("webhook %s dropped: %d others wait", oldest.id, self._max_waiting)
            self._notified += 1
            heapq.heappush(self._waiting, _Event(time.monotonic(), self._notified, event_id, body))
            self._wake.notify()

    def close(self, timeout_s: float) -> None:
        """Take no more events and send those that wait, for at most `timeout_s` seconds. Blocks. May be called again.

        Each is tried once at once, however long it had to wait, and again as long as the time allows.
        """
        with self._wake:
            now = time.monotonic()
            self._closes_at = now + timeout_s
            for event in self._waiting:
                event.due = min(event.due, now)
            heapq.heapify(self._waiting)
            self._wake.notify()
        self._thread.join(timeout_s)
        with self._wake:
            left = dict.fromkeys(event.id for event in (self._sending, *sorted(self._waiting)) if event is not None)
            self._waiting.clear()
        if left:
            logger.error("webhooks not delivered before the end: %s", ", ".join(left))

    # --------------------------------------------------------------------------------------------------------- the thread
    def _run(self) -> None:
        while (event := self._next()) is not None:
            try:
                self._attempt(event)
            except Exception:  # whatever it is, the next event deserves its attempt
                logger.exception("webhook %s dropped", event.id)
            with self._wake:
                self._sending = None

    def _next(self) -> _Event | None:
        """The next event once it is due; None when closing and there is none, or no time."""
        with self._wake:
            while True:
                now = time.monotonic()
                if now >= self._closes_at or (self._closes_at < math.inf and not self._waiting):
                    return None
                due = self._waiting[0].due if self._waiting else math.inf
                if due <= now:
                    self._sending = heapq.heappop(self._waiting)
                    return self._sending
                self._wake.wait(min(due - now, self._closes_at - now, threading.TIMEOUT_MAX))

    def _attempt(self, event: _Event) -> None:
        event.attempts += 1
        retry_after_s = 0.0
        try:
            status, retry_after_s = self._post(event)
            if 200 <= status < 300:
                return
            problem = f"status {status}"
        except (OSError, http.client.HTTPException) as error:
            status, problem = 0, str(error) or type(error).__name__
        what = event.id, self._url.hostname, problem  # of the URL only the host: the rest may hold a token
        if status == http.client.GONE:
            logger.error("webhook %s: %s answered 410 Gone, so it gets nothing more", event.id, self._url.hostname)
            with self._wake:
                self._is_refused = True
                self._waiting.clear()
        elif event.attempts >= self._attempts:
            logger.error("webhook %s to %s dropped: %s, after %d attempts", *what, event.attempts)
        else:
            # jitter, so that events that failed together don't come back together
            delay_s = max(self._delay_s * 2 ** (event.attempts - 1) * random.uniform(0.75, 1.25), retry_after_s)
            logger.warning("webhook %s to %s failed: %s; once more in %.1f s", *what, delay_s)
            with self._wake:
                event.due = time.monotonic() + delay_s
                heapq.heappush(self._waiting, event)

    def _post(self, event: _Event) -> tuple[int, float]:
        """The answer's status, and for how many seconds it asks to wait."""
        stamp = str(int(time.time()))  # of the attempt, as receivers refuse old ones
        signed = b".".join((event.id.encode(), stamp.encode(), event.body))
        signature = base64.b64encode(hmac.digest(self._key, signed, "sha256")).decode()
        headers = {
            "content-type": "application/json",
            "user-agent": "stepwell",
            "webhook-id": event.id,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{signature}",
            "connection": "close",
        }
        target = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        connection = self._connection()
        guard = threading.Timer(self._timeout_s, _cut, [connection])
        guard.daemon = True
        try:
            connection.connect()
            guard.start()  # the socket's own timeout is for each read, and a receiver could drip its answer for ever
            connection.request("POST", target, event.body, headers)
            with connection.getresponse() as answer:
                wanted = answer.headers.get("retry-after", "")
                return answer.status, min(float(wanted), MAX_RETRY_AFTER_S) if wanted.isdecimal() else 0.0
        finally:
            guard.cancel()
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host = self._url.hostname or ""
        if self._tls is None:
            return http.client.HTTPConnection(host, self._url.port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(host, self._url.port, timeout=self._timeout_s, context=self._tls)


def _cut(connection: http.client.HTTPConnection) -> None:
    with suppress(OSError, TypeError):  # it is closed by now
        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # not TLS's own, which is not for another thread


def _checked_url(url: str) -> SplitResult:
    try:
        if not re.fullmatch(r"[\x21-\x7e]+", url):
            raise ValueError("must be printable ASCII; percent-encode the rest")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("must look like https://host/path")
        parts.hostname.encode("idna")  # as connecting will
        if "@" in parts.netloc or parts.fragment:
            raise ValueError("must hold neither user nor fragment; a token goes into the path or query")
    except ValueError as error:  # urlsplit's own among them
        raise InvalidRequest(f"webhook_url: {error}", param="webhook_url") from None
    return parts


def _checked_secret(secret: str) -> bytes:
    wanted = f"{SECRET_PREFIX}<base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes>"
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        # without the value, which is a secret even when it is wrong
        raise InvalidRequest(
            f"webhook_secret: must be {wanted}, such as {SECRET_PREFIX}$(openssl rand -base64 32)", param="webhook_secret"
        )
    return key
