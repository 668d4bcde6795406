"""The pass at the row seam: compiled or fused kernels, tried against eager PyTorch before anybody relies on them."""

from __future__ import annotations

import torch
from torch import nn

from stepwell.config.resolve import Plan
from stepwell.errors import Unsupported
from stepwell.ops.rows import RowKernels, RowMaths, largest_difference


def set_row_kernels(denoiser: nn.Module, plan: Plan, attention_shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Row seam: the kernels that were asked for, if they pass a trial on this model's width; else an error that says why not."""
    chosen = plan.row_kernels.value
    if chosen == "plain":
        return
    try:
        kernels = _row_kernels(chosen)
        error = largest_difference(kernels, *attention_shape, dtype, plan.device.value)
        problem = None if error <= 1 else f"results differ from eager ones by {error:.1f}× what rounding explains"
    except Exception as failure:  # a compiler or a driver may fail in any way
        problem = f"{type(failure).__name__}: {next(iter(str(failure).strip().splitlines()), '')}"[:300]
    if problem is not None:
        if chosen == "triton":
            raise Unsupported(f"fused_kernels = True: {problem}; leave it out", param="fused_kernels")
        why = f"enable_torch_compile = True: {problem}; it needs a C++ compiler that torch finds, such as g++"
        raise Unsupported(why, param="enable_torch_compile")
    for module in denoiser.modules():
        if isinstance(module, RowMaths):
            module.kernels = kernels


def _row_kernels(name: str) -> RowKernels:
    """Imported only where chosen: Triton may be missing, and inductor takes a second."""
    if name == "triton":
        from stepwell.ops.kernels.rows import KERNELS

        return KERNELS
    from stepwell.ops.compiled import compiled_kernels

    return compiled_kernels()
