"""stepwell doctor MODEL: how a model would run here, and the reason for every choice."""

from __future__ import annotations

from stepwell.cli.flags import Flags, quiet_threads
from stepwell.config.attention import Site
from stepwell.config.attention import table as attention_table
from stepwell.config.schema import EngineOptions

DESCRIPTION = "Show how a model would run on this machine: every automatic choice and its reason. Reads no weights."


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    flags = Flags("doctor", DESCRIPTION)
    flags.parser.add_argument("model", nargs="?", help="The model; the same as --model-path.")
    given, file = flags.parse(arguments)
    positional = given.pop("model", None)
    if positional is not None:
        given["model_path"] = positional
    options = flags.load(given, file)[EngineOptions]

    quiet_threads()
    import torch
    from rich.console import Console
    from rich.table import Table

    from stepwell.engine.build import attention_shape, find_row_bound, make_plan, packing_line, warmup_line
    from stepwell.engine.kernels import AttentionPass
    from stepwell.models import find_spec
    from stepwell.weights.repository import open_repository

    repository = open_repository(options.model_path)
    spec = find_spec(repository)
    with torch.device("meta"):
        denoiser = spec.build_denoiser(repository.denoiser_config)
    plan, hardware = make_plan(options, repository, spec, denoiser)
    shape = attention_shape(repository, spec)
    AttentionPass.of(options, plan, denoiser, shape, hardware)  # refuses what a start would refuse
    table = Table(title=f"{options.model_path}: {spec.name}", title_justify="left")
    for column in ("what", "value", "reason"):
        table.add_column(column)
    table.add_row("machine", hardware.gpu or hardware.cpu, f"{hardware.cores} cores, {hardware.memory_bytes / 2**30:.0f} GiB")
    table.add_row("parameters", f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f} M", "of the transformer")
    for row in (*plan.lines(), packing_line(find_row_bound(denoiser, plan), plan), *warmup_line(options)):
        table.add_row(*row)
    console = Console()
    console.print(table)
    kernels = Table(title="attention backends here", title_justify="left")
    for column in ("name", "usable", "what it is, or lacks"):
        kernels.add_column(column)
    for row in attention_table(Site(plan.device.value, plan.dit_precision.value, hardware, shape)):
        kernels.add_row(*row)
    console.print(kernels)
    return 0
