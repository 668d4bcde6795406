"""stepwell doctor MODEL: how a model would run here, and the reason for every choice."""

from __future__ import annotations

from stepwell.cli.flags import Flags, quiet_threads
from stepwell.config.attention import table as attention_table
from stepwell.config.schema import EngineOptions

DESCRIPTION = "Show how a model would run on this machine: every automatic choice and its reason. Reads no weights."


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    flags = Flags("doctor", DESCRIPTION)
    flags.parser.add_argument("model", nargs="*", help="The model, or several; the same as --model-path.")
    given, file = flags.parse(arguments)
    positional = given.pop("model", [])
    if positional:
        given["model_path"] = positional
    options = flags.load(given, file)[EngineOptions]

    quiet_threads()
    for path in options.model_paths:
        _show(options, path)
    return 0


def _show(options: EngineOptions, path: str) -> None:
    """One model's tables."""
    from rich.console import Console
    from rich.table import Table

    from stepwell.engine.build import report

    made = report(options, path)
    hardware = made.hardware
    table = Table(title=f"{path}: {made.kind}", title_justify="left")
    for column in ("what", "value", "reason"):
        table.add_column(column)
    table.add_row("machine", hardware.gpu or hardware.cpu, f"{hardware.cores} cores, {hardware.memory_bytes / 2**30:.0f} GiB")
    table.add_row("parameters", f"{made.parameters / 1e6:.2f} M", "of a transformer")
    for row in made.lines:
        table.add_row(*row)
    console = Console()
    console.print(table)
    if made.site is None:
        return
    kernels = Table(title="attention backends here", title_justify="left")
    for column in ("name", "usable", "what it is, or lacks"):
        kernels.add_column(column)
    for row in attention_table(made.site):
        kernels.add_row(*row)
    console.print(kernels)
