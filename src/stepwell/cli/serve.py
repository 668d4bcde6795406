"""stepwell serve: a model over HTTP."""

from __future__ import annotations

import signal
import sys

from stepwell.cli.flags import Flags, quiet_threads
from stepwell.config.schema import EngineOptions, ServerOptions

DESCRIPTION = "Serve a model over HTTP with an OpenAI-compatible API."


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    flags = Flags("serve", DESCRIPTION)
    given, file = flags.parse(arguments)
    options = flags.load(given, file)
    engine_options, server = options[EngineOptions], options[ServerOptions]

    quiet_threads()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn hands the signal on once it has shut down
    import uvicorn

    from stepwell.generator import open_engine
    from stepwell.serve.app import create_app

    engine = open_engine(engine_options)
    print(f"loading {engine_options.model_path} …", file=sys.stderr)
    info = engine.open()
    name = server.served_model_name or info.model.id
    base = f"http://{server.host}:{server.port}"
    print(
        f"serving {name} on {base}\n\n"
        f"curl -sS {base}/v1/images/generations -H 'Content-Type: application/json' \\\n"
        f"""  -d '{{"prompt": "a small red circle on a white background"}}'\n""",
        file=sys.stderr,
    )
    app = create_app(engine, info, served_name=name, api_key=server.api_key)
    uvicorn.run(app, host=server.host, port=server.port, log_level="warning")
    return 0
