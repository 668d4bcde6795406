"""stepwell serve: a model over HTTP."""

from __future__ import annotations

import signal
import socket
import sys

from stepwell.cli.flags import Flags, quiet_threads
from stepwell.config.schema import EngineOptions, ServerOptions
from stepwell.errors import InvalidRequest

GRACE_S = 30  # for requests under way when asked to stop
DESCRIPTION = "Serve a model over HTTP with an OpenAI-compatible API."


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    flags = Flags("serve", DESCRIPTION)
    given, file = flags.parse(arguments)
    options = flags.load(given, file)
    engine_options, server = options[EngineOptions], options[ServerOptions]

    quiet_threads()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn hands the signal on once it has shut down
    listener = _listen(server.host, server.port)
    import uvicorn

    from stepwell.generator import open_engine
    from stepwell.serve.app import create_app

    engine = open_engine(engine_options)
    print(f"loading {engine_options.model_path} …", file=sys.stderr)
    info = engine.open()
    for what, value, reason in info.choices:
        print(f"  {what} {value}: {reason}", file=sys.stderr)
    name = server.served_model_name or info.model.id
    host = f"[{server.host}]" if ":" in server.host else server.host
    base = f"http://{host}:{listener.getsockname()[1]}"
    print(
        f"serving {name} on {base}\n\n"
        f"curl -sS {base}/v1/images/generations -H 'Content-Type: application/json' \\\n"
        f"""  -d '{{"prompt": "a small red circle on a white background"}}'\n""",
        file=sys.stderr,
    )
    app = create_app(engine, info, served_name=name, api_key=server.api_key)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket, taken before anything slow, so that a port in use is known at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidRequest(
            f"host = {host!r}, port = {port}: can't listen there: {error.strerror or error}", param="port"
        ) from None
