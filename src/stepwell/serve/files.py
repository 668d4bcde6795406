"""Storage for the event loop: every call in a thread of a pool of its own, so that a store that hangs holds up nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from stepwell.media.storage import Storage

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 16


class Files:
    """`Storage`, awaitable."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._pool = ThreadPoolExecutor(THREADS, "stepwell-files")

    async def put(self, key: str, content: bytes) -> None:
        """Whoever cancels this waits for the write, so that nothing is written after it was erased."""
        done = asyncio.ensure_future(self._run(self._storage.put, key, content))
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            await asyncio.wait({done})
            raise

    async def get(self, key: str) -> bytes:
        return await self._run(self._storage.get, key)

    async def read(self, key: str, start: int, stop: int) -> bytes:
        return await self._run(self._storage.read, key, start, stop)

    async def size(self, key: str) -> int:
        return await self._run(self._storage.size, key)

    async def delete(self, key: str) -> None:
        await self._run(self._storage.delete, key)

    def url(self, key: str) -> str | None:
        return self._storage.url(key)

    def close(self) -> None:
        """Let go of the threads; one that hangs is left to the process's end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))
