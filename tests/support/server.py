"""A real server on a real socket, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from stepwell.engine.local import LocalEngine
from stepwell.serve.app import create_app


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Unowned:
    """An engine whose closing is somebody else's business."""

    def __init__(self, engine: LocalEngine):
        self.generate, self.abort, self.control, self.start = engine.generate, engine.abort, engine.control, engine.start

    async def close(self) -> None: ...


@contextlib.contextmanager
def serving(engine: LocalEngine, name: str, api_key: str | None = None) -> Iterator[str]:
    """The server's base URL, without /v1. The engine stays open afterwards."""
    app = create_app(_Unowned(engine), engine.open(), served_name=name, api_key=api_key)  # type: ignore[arg-type]
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
