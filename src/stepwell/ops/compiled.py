"""Row kernels made by torch.compile: one graph for each, whatever the batch.

What is compiled are pure functions of tensors that see the number of rows as a variable, and of the layout no more than a
column of indices; so a new mix of sizes compiles nothing, and a row's bits come from the same code alone and in company.
Whole blocks were measured first: each new set of layouts was traced again (35 to 85 s) until dynamo's limit, and packed
weights can't be inputs of a graph. The rotation stays outside, eager: inductor has no complex arithmetic, and its code for
interleaved pairs is slow on a CPU (norm and rotation together: 0.35 to 0.7× of eager's speed).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from stepwell.ops.packing import JointLayout, Segments
from stepwell.ops.rope import rotate
from stepwell.ops.rows import RowKernels

EPS = 1e-6
MOST_GRAPHS = 4  # one is expected; each more would be a surprise worth seconds
logger = logging.getLogger(__name__)


def _norm(x: Tensor, shift: Tensor, scale: Tensor, owners: Tensor) -> Tensor:
    """x: (tokens, channels); shift, scale: (sequences, channels); owners: (tokens,)"""
    centred = x.float()
    centred = centred - centred.sum(-1, keepdim=True) * (1 / x.shape[-1])
    variance = centred.square().sum(-1, keepdim=True) * (1 / x.shape[-1])
    return (centred * torch.rsqrt(variance + EPS) * scale[owners] + shift[owners]).to(x.dtype)


def _add_norm(x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.addcmul(x, gate[owners], update)
    return total, _norm(total, shift, scale, owners)


def _weighted_rms_norm(x: Tensor, weights: Tensor, kinds: Tensor) -> Tensor:
    """x: (tokens, 2, heads, head_dim); weights: (2, 2, 1, head_dim) for text and image; kinds: (tokens,) -> float32"""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) * (1 / x.shape[-1]) + EPS) * weights[kinds]


class Compiled:
    """A function of tensors, `by_row` of which are (tokens, ...) and the rest (2 or more, ...): all first sizes may change.

    The first call raises what the compiler does. Should a later one need too many graphs, or fail to compile, it runs
    eagerly from then on and a warning says why.
    """

    def __init__(self, function: Callable[..., Any], most_graphs: int = MOST_GRAPHS):
        self.plain = function
        # mypy knows torch.compile by overloads that lack the last two
        limits: dict[str, Any] = {"recompile_limit": most_graphs, "isolate_recompiles": True}
        self.call = torch.compile(function, fullgraph=True, **limits)
        self.has_worked = False

    def __call__(self, *views: Tensor) -> Any:
        tensors = [view.detach() for view in views]  # a view knows its base, and dynamo would make a graph for each of its shapes
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        try:
            result = self.call(*tensors)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            if not self.has_worked:
                raise
            reason = str(error).strip().splitlines()[0]
            logger.warning("%s runs eagerly from now on: %s: %s", self.plain.__name__, type(error).__name__, reason)
            self.call = self.plain
            return self.plain(*tensors)
        self.has_worked = True
        return result


def compiled_kernels() -> RowKernels:
    """A set of its own for one model, compiled when first called."""
    norm, add_norm, rms_norm = Compiled(_norm), Compiled(_add_norm), Compiled(_weighted_rms_norm)

    def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> Tensor:
        if len(x) == 1:
            return modulated_norm(_twice(x), shift, scale, Segments([2]))[:1]
        return norm(x, _table(shift), _table(scale), segments.owners(x.device))

    def gated_add_norm(
        x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        if len(x) == 1:
            total, normed = gated_add_norm(_twice(x), gate, _twice(update), shift, scale, Segments([2]))
            return total[:1], normed[:1]
        return add_norm(x, update, _table(gate), _table(shift), _table(scale), segments.owners(x.device))

    def norm_rotate(queries_keys: Tensor, weights: tuple[Tensor, ...], rotary: Tensor, layout: JointLayout) -> Tensor:
        both = torch.stack((weights[0], weights[-1]))
        normed = rms_norm(queries_keys, both, layout.kinds(queries_keys.device))
        return rotate(normed, rotary).to(queries_keys.dtype)

    return RowKernels(modulated_norm, gated_add_norm, norm_rotate)


def _table(vectors: Tensor) -> Tensor:
    """(channels,) or (sequences, channels) -> (2 or more, channels), contiguous.

    Compilers make a case of its own of the size 1, and of every other stride and offset.
    """
    return torch.stack((vectors, vectors)) if vectors.ndim == 1 else vectors.contiguous()


def _twice(x: Tensor) -> Tensor:
    return torch.cat((x, x))
