"""A real server on a real socket, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from stepwell.config.schema import EngineOptions, ServerOptions
from stepwell.engine.api import Engine
from stepwell.engine.fake import FAKES, FakeWorker
from stepwell.engine.local import LocalEngine
from stepwell.serve.app import create_app, open_server
from stepwell.serve.state import Server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Unowned:
    """An engine whose closing is somebody else's business."""

    def __init__(self, engine: LocalEngine):
        self.generate, self.abort, self.control, self.start = engine.generate, engine.abort, engine.control, engine.start

    async def close(self) -> None: ...


class Running:
    """A server that listens: its base URL without /v1, and the server itself."""

    def __init__(self, url: str, server: Server, loop: asyncio.AbstractEventLoop):
        self.url = url
        self.server = server
        self.loop = loop

    def call(self, coroutine: Any) -> Any:
        """Run something on the server's own loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


def fake(kind: str = "image", step_ms: float = 2, **limits: Any) -> LocalEngine:
    """An engine without a model, in this process: `kind` is image or video."""
    return LocalEngine(lambda: FakeWorker(step_ms, FAKES[f"stepwell/fake-{kind}"]), **limits)


@contextlib.contextmanager
def running(
    engine: Engine, data_path: Path | str, engine_options: EngineOptions | None = None, **options: Any
) -> Iterator[Running]:
    """Serve an engine, which the server starts and closes. `options` are those of ServerOptions."""
    server_options = ServerOptions(data_path=str(data_path), **options)
    port = free_port()
    made: list[Running] = []
    stop = threading.Event()
    errors: list[BaseException] = []

    async def serve() -> None:
        server = open_server(engine, server_options, engine_options or EngineOptions())
        http = uvicorn.Server(
            uvicorn.Config(create_app(server), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
        )
        serving = asyncio.ensure_future(http.serve())
        server.begin(await engine.start())
        while not http.started:
            await asyncio.sleep(0.005)
        made.append(Running(f"http://127.0.0.1:{port}", server, asyncio.get_running_loop()))
        while not stop.is_set():
            await asyncio.sleep(0.01)
        http.should_exit = True
        await serving

    def main() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    while not made:
        if errors:
            raise errors[0]
        time.sleep(0.005)
    try:
        yield made[0]
    finally:
        stop.set()
        thread.join(30)


@contextlib.contextmanager
def serving(engine: LocalEngine, name: str | None = None, **options: Any) -> Iterator[str]:
    """The base URL, without /v1, of a server over an engine that stays open afterwards."""
    engine.open()
    with tempfile.TemporaryDirectory() as folder, running(Unowned(engine), folder, served_model_name=name, **options) as made:  # type: ignore[arg-type]
        yield made.url
