"""stepwell models: what this version can run."""

from __future__ import annotations

import sys

from stepwell.cli.flags import quiet_threads
from stepwell.errors import InvalidRequest

HELP = "usage: stepwell models\n\nList the models this version knows, with their tasks and defaults."


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    if arguments in (["-h"], ["--help"]):
        print(HELP)
        return 0
    if arguments:
        raise InvalidRequest(f"unknown argument {arguments[0]!r}; models takes none")
    quiet_threads()
    from rich.console import Console
    from rich.table import Table

    from stepwell.models import find_spec, specs, text_architecture, text_hub_ids
    from stepwell.types import Task
    from stepwell.weights.hub import BUNDLED, locate
    from stepwell.weights.repository import open_repository

    table = Table()
    for column in ("model", "family", "task", "default size", "steps"):
        table.add_column(column, no_wrap=column == "model", overflow="fold")
    for spec in specs():
        for hub_id in spec.hub_ids:
            d = spec.defaults
            tasks = ", ".join(task.value for task in spec.tasks)
            table.add_row(hub_id, spec.name, tasks, f"{d.width}×{d.height}", str(d.num_inference_steps))
    for hub_id, family in text_hub_ids():
        table.add_row(hub_id, family, "T2T", "", "")
    for bundled in BUNDLED:
        is_text = text_architecture(locate(bundled)) is not None
        own = (Task.TEXT_TO_TEXT,) if is_text else find_spec(open_repository(bundled)).tasks
        table.add_row(bundled, "bundled with the package", ", ".join(task.value for task in own), "", "")
    Console(file=sys.stdout).print(table)
    return 0
