"""Where weights rest while others compute: the passes of offloading, and who takes turns on the device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from stepwell.config.resolve import Plan
from stepwell.config.schema import EngineOptions
from stepwell.models.spec import ModelSpec
from stepwell.offload.homes import FileHome, Home, MemoryHome
from stepwell.offload.layers import Streamed, stays
from stepwell.offload.parts import Movable, Residency, Resident
from stepwell.ops.blocks import Blocks
from stepwell.weights.reader import Place

logger = logging.getLogger(__name__)


def open_home(options: EngineOptions, plan: Plan) -> Home | None:
    """Where the blocks rest if they are to be fetched one by one."""
    if "layers" not in plan.offloaded:
        if options.offload_path is not None:
            logger.warning("offload_path does not apply: dit_layerwise_offload is off")
        return None
    return FileHome(options.offload_path) if plan.device.value == "cpu" else MemoryHome(pin=options.pin_cpu_memory)


ALIGNED_BYTES = 16


def placing(denoiser: nn.Module, plan: Plan, home: Home | None, quantised: Collection[str]) -> Place:
    """Where each parameter goes as it is loaded: the blocks' at once to their home, so that they never are in memory together,
    but for layers that are about to be quantised."""
    streamed = tuple(f"{name}." for name, module in denoiser.named_modules() if isinstance(module, Blocks))
    device = "cpu" if "dit" in plan.offloaded else plan.device.value

    def place(name: str, tensor: Tensor) -> Tensor:
        if home is None:
            # a row times a matrix is summed in another order where the matrix begins at such a place of the checkpoint's file
            return tensor.to(device, copy=tensor.data_ptr() % ALIGNED_BYTES != 0)
        if name.startswith(streamed) and name.rpartition(".")[0] not in quantised:
            return home.keep(tensor)
        return tensor.to(device, copy=True)  # a copy, since a part of the checkpoint's file would keep all of it mapped

    return place


def stream_blocks(denoiser: nn.Module, home: Home | None) -> list[Streamed]:
    """Blocks seam: fetch each block's weights while the one before computes."""
    made = []
    for module in denoiser.modules() if home is not None else ():
        if isinstance(module, Blocks):
            assert home is not None
            module.runner = Streamed(list(module), module.runner, home)
            made.append(module.runner)
    return made


def share_device(
    loaded: Mapping[str, Any], streamed: Mapping[str, list[Streamed]], spec: ModelSpec, plan: Plan, *, pin: bool
) -> Residency:
    """Who takes turns on the device: the parts that are offloaded, and what has been fetched of blocks."""
    movables: dict[str, list[Movable]] = {spec.parts[name].kind: [*runners] for name, runners in streamed.items()}
    for name, part in spec.parts.items():
        if name in loaded and part.kind.removesuffix("_2") in plan.offloaded:
            blocks = [block for runner in streamed.get(name, ()) for block in runner.blocks]
            movables.setdefault(part.kind, []).append(Resident(stays(loaded[name], blocks), plan.device.value, pin=pin))
    return Residency(movables)
