"""stepwell COMMAND …: finds the command, and turns every error meant for people into one line and exit code 2."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from stepwell import __version__
from stepwell.errors import StepwellError, Unsupported

COMMANDS = {
    "generate": "make a picture and save it",
    "serve": "serve a model over HTTP, OpenAI-compatible",
    "worker": "serve a model behind NVIDIA Dynamo's frontend",
    "compare": "show what changed between the timing reports of runs",
    "doctor": "show how a model would run on this machine, and why",
    "models": "list the models this version knows",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"stepwell {__version__}")
        return 0
    command = arguments[0]
    try:
        return _run(command, arguments[1:])
    except StepwellError as error:
        name = f"stepwell {command}" if command in COMMANDS else "stepwell"
        print(f"{name}: error: {' '.join(error.message.split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough, as in `stepwell … | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (so that flushing at exit does not complain)
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        raise Unsupported(f"unknown command {command!r}; {hint}")
    return int(import_module(f"stepwell.cli.{command}").run(arguments))


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"stepwell {__version__}: one engine for diffusion models",
            "",
            "usage: stepwell COMMAND [options]",
            "",
            *lines,
            "",
            "stepwell COMMAND --help lists a command's options.",
            'Try: stepwell generate --prompt "a small red circle on a white background"',
        ]
    )
