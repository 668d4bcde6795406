"""From options to a worker for a text model: its own short order of the passes of `engine/build`."""

from __future__ import annotations

import torch
from torch import nn

from stepwell.ops.experts import Experts, OneDnnLinear
from stepwell.ops.linear import BySegment, Linear, PackedLinear, is_row_invariant


@torch.no_grad()
def keep_bits(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Linear seam, on a CPU: packed layers, and block by block what sums in an order that depends on the number of rows.

    Returns the names of the latter. After this a row's bits depend neither on other requests nor on how its own text was cut
    into steps.
    """
    probed: dict[tuple[object, ...], bool] = {}

    def is_bound(kind: type[nn.Module], shape: tuple[int, int], precision: torch.dtype) -> bool:
        key = (kind, shape, precision)
        if key not in probed:
            with torch.device("meta"):
                plain = Linear(*shape)
            probed[key] = not is_row_invariant(plain, precision, kind)
        return probed[key]

    bound = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            packed: nn.Module = PackedLinear(module)
            if is_bound(PackedLinear, (module.in_features, module.out_features), module.weight.dtype):
                packed = BySegment(packed)
                bound.append(name)
            model.set_submodule(name, packed)
        elif isinstance(module, Experts):
            width = module.gate.shape[1]
            shapes = ((width, len(module.gate) // module.count), (module.down.shape[1], width))
            module.by_block = any(is_bound(OneDnnLinear, shape, dtype) for shape in shapes)
            bound += [name] * module.by_block
    return bound
