"""stepwell serve: a model over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from stepwell.cli.flags import Flags, quiet_threads
from stepwell.cli.following import follows
from stepwell.config.schema import EngineOptions, ServerOptions
from stepwell.engine.api import EngineInfo
from stepwell.errors import InvalidRequest

END_S = 15  # for letting go of everything once there is nothing left to wait for
PROMPT = '{"prompt": "a small red circle on a white background"}'
EXAMPLES = {
    "pictures": ("images/generations", PROMPT),
    "videos": ("videos", PROMPT),
    "text": ("chat/completions", '{"messages": [{"role": "user", "content": "Hello!"}], "stream": true}'),
}
DESCRIPTION = "Serve a model over HTTP with an OpenAI-compatible API."


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    flags = Flags("serve", DESCRIPTION)
    given, file = flags.parse(arguments)
    options = flags.load(given, file)
    engine_options, server_options = options[EngineOptions], options[ServerOptions]
    if follows(engine_options):
        return 0
    if engine_options.checkpoint_path is None:
        folder = Path(server_options.data_path).absolute() / "checkpoints"
        engine_options = engine_options.model_copy(update={"checkpoint_path": str(folder)})
    quiet_threads()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("stepwell.access").setLevel(logging.INFO)
    from stepwell.serve.keys import Keys

    Keys.of(server_options)  # an open door is refused before anything listens
    listener = _listen(server_options.host, server_options.port)
    return asyncio.run(_serve(listener, server_options, engine_options))


async def _serve(listener: socket.socket, options: ServerOptions, engine_options: EngineOptions) -> int:
    import uvicorn

    from stepwell.engine.remote import RemoteEngine
    from stepwell.serve.app import close, create_app, drain, open_server

    server = open_server(RemoteEngine(engine_options), options, engine_options)
    config = uvicorn.Config(
        create_app(server), lifespan="off", log_level="warning", timeout_graceful_shutdown=5, h11_max_incomplete_event_size=65536
    )

    class Http(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals are ours: a drain comes before the end

    http = Http(config)
    stopping: list[asyncio.Task[None]] = []

    async def stop() -> None:
        await drain(server)
        _leave_soon()
        http.should_exit = True

    def on_signal() -> None:
        if stopping:
            _leave_soon()
            http.should_exit = http.force_exit = True
        else:
            print("stopping: finishing what is running; a second signal ends at once", file=sys.stderr)
            stopping.append(asyncio.ensure_future(stop()))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    print(f"loading {', '.join(engine_options.model_paths)} …", file=sys.stderr)
    listening = asyncio.ensure_future(http.serve(sockets=[listener]))
    loading = asyncio.ensure_future(server.engine.start())
    try:
        await asyncio.wait({loading, listening}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not stopping:
            info = loading.result()
            server.begin(info)
            _announce(listener, options, info, list(server.models))
        await listening
    finally:
        http.should_exit = http.force_exit = True
        loading.cancel()
        await asyncio.gather(listening, loading, return_exceptions=True)
        await close(server)
    return 0


def _leave_soon() -> None:
    """A thread that waits for a storage that hangs can't be ended, and would keep the process."""
    guard = threading.Timer(END_S, os._exit, (0,))
    guard.daemon = True
    guard.start()


def _announce(listener: socket.socket, options: ServerOptions, info: EngineInfo, names: list[str]) -> None:
    """What was decided, and a line to paste."""
    for what, value, reason in info.choices:
        print(f"  {what} {value}: {reason}", file=sys.stderr)
    host = f"[{options.host}]" if ":" in options.host else options.host
    base = f"http://{host}:{listener.getsockname()[1]}"
    route, example = EXAMPLES[info.model.makes]
    key = "" if options.api_key is None and options.api_key_file is None else " -H 'Authorization: Bearer …'"
    print(
        f"serving {', '.join(names)} on {base}\n\n"
        f"curl -sS {base}/v1/{route}{key} -H 'Content-Type: application/json' \\\n"
        f"  -d '{example}'\n",
        file=sys.stderr,
    )


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket, taken before anything slow, so that a port in use is known at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # inherited by its connections; without it an answer's body waits 40 ms for its headers to be acknowledged
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise InvalidRequest(
            f"host = {host!r}, port = {port}: can't listen there: {error.strerror or error}", param="port"
        ) from None
