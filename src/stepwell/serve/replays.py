"""Requests for pictures and texts that are the same request again: one generation, one answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request as HttpRequest

from stepwell.serve.jobs import IdempotencyMismatch

REPLAY_S = 600  # how long a finished answer is kept for its idempotency key
REPLAYS, REPLAY_BYTES = 64, 2**28  # at most, of all clients


def body_hash(body: Any) -> str:
    """The same for bodies that say the same."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class Replay:
    """The one generation behind requests that are the same request again."""

    hash: str
    task: asyncio.Task[Any]
    waiting: int = 0  # requests that do
    born_at: float = field(default_factory=time.monotonic)


class Replays:
    """Answers a repeated request with the first one's result instead of generating again.

    With an `Idempotency-Key` the work goes on even if the client hangs up, and its result is kept for a while. Without
    one, a client's automatic retry (`x-stainless-retry-count`) joins its first attempt if that is still under way, and the
    work is given up once nobody waits for it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Replay] = {}

    async def run(
        self,
        http: HttpRequest,
        body: Any,
        work: Callable[[], Awaitable[Any]],
        guard: Callable[[HttpRequest, Awaitable[Any]], Awaitable[Any]],
    ) -> Any:
        """The result of `work`, or of the earlier request that this one repeats."""
        digest, given = body_hash(body), http.headers.get("idempotency-key") or None
        key = (http.state.owner, f"given {given}" if given else f"same {digest}")
        self._forget_old()
        known = self._known.get(key)
        if known is not None and known.hash != digest:
            raise IdempotencyMismatch("this Idempotency-Key came with another body before", param="Idempotency-Key")
        is_again = given is not None or http.headers.get("x-stainless-retry-count", "0") != "0"
        if known is None or not is_again:
            known = Replay(digest, asyncio.ensure_future(work()))
            self._known.setdefault(key, known)
            if given is not None:
                known.task.add_done_callback(partial(self._settle, key, known))
        known.waiting += 1
        try:
            return await guard(http, asyncio.shield(known.task))
        finally:
            known.waiting -= 1
            if given is None and not known.waiting:
                self._forget(key, known)
                known.task.cancel()
                await asyncio.gather(known.task, return_exceptions=True)

    def _settle(self, key: tuple[str, str], replay: Replay, task: asyncio.Task[Any]) -> None:
        """A failure is not kept: the same key may try again."""
        if task.cancelled() or task.exception() is not None:
            self._forget(key, replay)

    def _forget(self, key: tuple[str, str], replay: Replay) -> None:
        if self._known.get(key) is replay:
            del self._known[key]

    def _forget_old(self) -> None:
        now = time.monotonic()
        kept, size = 0, 0
        for key, replay in reversed(list(self._known.items())):  # the newest first
            if replay.task.done() and not replay.task.cancelled() and replay.task.exception() is None:
                kept, size = kept + 1, size + _size(replay.task.result())
                if now - replay.born_at > REPLAY_S or kept > REPLAYS or size > REPLAY_BYTES:
                    del self._known[key]


def _size(result: dict[str, Any]) -> int:
    """About the bytes an answer takes: those of its pictures; texts are small."""
    return sum(len(picture.get("b64_json") or "") for picture in result.get("data", ()))
