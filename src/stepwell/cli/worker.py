"""stepwell worker: a model behind NVIDIA Dynamo's frontend."""

from __future__ import annotations

import importlib.util
import sys

from stepwell.cli.flags import Flags, quiet_threads
from stepwell.cli.following import follows
from stepwell.config.schema import EngineOptions, WorkerOptions
from stepwell.errors import Unsupported

DESCRIPTION = "Serve a model as a worker of NVIDIA Dynamo: pictures, videos or text, as the model makes them."
IDLE = ("skip_tokenizer_init", "enable_metrics", "disable_cuda_graph", "disable_overlap_schedule")


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    flags = Flags("worker", DESCRIPTION)
    given, file = flags.parse(arguments)
    options = flags.load(given, file)
    if follows(options[EngineOptions]):
        return 0
    worker_options: WorkerOptions = options[WorkerOptions]
    for name in IDLE:
        if name in worker_options.model_fields_set:
            print(f"note: {name} does not apply. {WorkerOptions.model_fields[name].description}", file=sys.stderr)
    if importlib.util.find_spec("dynamo") is None or importlib.util.find_spec("uvloop") is None:
        raise Unsupported("NVIDIA Dynamo is not installed: `make setup-dynamo`, or see docs/dynamo.md")
    quiet_threads()
    import uvloop

    from stepwell.dynamo.adapter import serve

    uvloop.run(serve(worker_options, options[EngineOptions]))
    return 0
