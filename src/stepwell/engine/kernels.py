"""The pass over the attention seam: from a plan's names to the kernel of every attention layer."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from stepwell.config.attention import BACKENDS, SLIDING, Shape, Site, library_of
from stepwell.config.hardware import Hardware
from stepwell.config.masks import MaskStrategy, read_mask_strategy
from stepwell.config.resolve import Plan
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest
from stepwell.ops.attention import Attention, AttentionKernel
from stepwell.ops.backends import blocked, sdpa
from stepwell.ops.backends.block_sparse_torch import BlockSparse
from stepwell.ops.backends.sage import Sage, Sage3
from stepwell.ops.backends.sliding_tile_attn import VendorSlidingTile
from stepwell.ops.backends.sliding_tile_torch import Planner, SlidingTile, WindowsOf
from stepwell.ops.backends.varlen import VarlenAttention
from stepwell.ops.backends.video_sparse_attn import VendorBlockSparse

logger = logging.getLogger(__name__)
DEFAULT_SPARSITY = 0.5
KernelOf = Callable[[int], AttentionKernel]  # the number of an attention layer -> its kernel


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the kernels are made from: where they run, and the options of sparse patterns."""

    site: Site
    strategy: MaskStrategy | None
    sparsity: float

    def windows(self, layer: int) -> WindowsOf:
        assert self.strategy is not None  # config.attention.check_options saw to it
        return partial(self.strategy.at, layer=layer)


@dataclass(frozen=True, slots=True)
class AttentionPass:
    """The kernel each attention layer will have. Making one checks everything that can be wrong with the choice."""

    wanted: Wanted
    layers: Mapping[str, str]  # name of an attention module -> name of a backend

    @classmethod
    def of(cls, options: EngineOptions, plan: Plan, denoiser: nn.Module, shape: Shape, hardware: Hardware) -> AttentionPass:
        """Raises StepwellError for a pattern that matches nothing, or a mask-strategy file that does not fit the model."""
        names = [name for name, module in denoiser.named_modules() if isinstance(module, Attention)]
        chosen = dict.fromkeys(names, plan.attention.value)
        for pattern, choice in plan.attention_parts:
            if pattern.startswith("transformer."):
                chosen.update(dict.fromkeys(_matching(pattern, names), choice.value))
        strategy = _strategy(options, len(names), shape.heads) if set(chosen.values()) & set(SLIDING) else None
        sparsity = DEFAULT_SPARSITY if options.attention_sparsity is None else options.attention_sparsity
        site = Site(plan.device.value, plan.dit_precision.value, hardware, shape)
        for choice in {plan.attention, *(choice for _, choice in plan.attention_parts)}:
            if choice.is_warning:
                logger.warning("attention backend %s: %s", choice.value, choice.reason)
        if options.mask_strategy_file_path is not None and strategy is None:
            logger.warning("mask_strategy_file_path does not apply: no layer uses sliding tiles (%s)", " or ".join(SLIDING))
        return cls(Wanted(site, strategy, sparsity), chosen)

    def apply(self, denoiser: nn.Module) -> None:
        """Set every layer's kernel; a vendor's library is imported here, and only if a layer wants it."""
        makers = {name: MAKERS[name](self.wanted) for name in sorted(set(self.layers.values()))}
        for layer, (module, name) in enumerate(self.layers.items()):
            found = denoiser.get_submodule(module)
            assert isinstance(found, Attention)
            found.kernel = makers[name](layer)


def _matching(pattern: str, names: list[str]) -> list[str]:
    """The attention modules a pattern means, by their own name or by that of a module around them."""
    full = {f"transformer.{name}": name for name in names}
    found = [short for name, short in full.items() if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
    if found:
        return found
    candidates = list(dict.fromkeys([name.rpartition(".")[0] for name in full] + list(full)))
    near = difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.0)
    raise InvalidRequest(
        f"component_attention_backends: {pattern!r} matches no attention layer of this model; the nearest is {near[0]!r}",
        param="component_attention_backends",
    )


def _strategy(options: EngineOptions, layers: int, heads: int) -> MaskStrategy:
    if options.mask_strategy_file_path is not None:
        return read_mask_strategy(options.mask_strategy_file_path, layers, heads)
    assert options.sliding_tile_window is not None
    frames, rows, columns = options.sliding_tile_window
    return MaskStrategy.uniform((frames, rows, columns), layers, heads)


# --------------------------------------------------------------------------------------------------------------- makers
def _everywhere(kernel: AttentionKernel) -> KernelOf:
    return lambda layer: kernel


def _torch_sdpa(wanted: Wanted) -> KernelOf:
    site = wanted.site
    hopper = site.machine == "cuda" and (site.hardware.capability or (0, 0)) >= (9, 0) and site.precision != "fp32"
    return _everywhere(sdpa.attend_cudnn if hopper else sdpa.attend)


def _varlen(name: str, wanted: Wanted) -> KernelOf:
    return _everywhere(VarlenAttention(_vendor(name, wanted)))


def _sliding_tile_torch(wanted: Wanted) -> KernelOf:
    planner = Planner()
    return lambda layer: SlidingTile(wanted.windows(layer), planner)


def _sliding_tile_attn(wanted: Wanted) -> KernelOf:
    function = _vendor("sliding_tile_attn", wanted)
    return lambda layer: VendorSlidingTile(function, wanted.windows(layer))


MAKERS: Mapping[str, Callable[[Wanted], KernelOf]] = {
    "torch_sdpa": _torch_sdpa,
    "blocked": lambda wanted: _everywhere(blocked.attend),
    "fa": partial(_varlen, "fa"),
    "aiter": partial(_varlen, "aiter"),
    "sage_attn": lambda wanted: _everywhere(Sage(_vendor("sage_attn", wanted))),
    "sage_attn_3": lambda wanted: _everywhere(Sage3(_vendor("sage_attn_3", wanted))),
    "sliding_tile_torch": _sliding_tile_torch,
    "sliding_tile_attn": _sliding_tile_attn,
    "block_sparse_torch": lambda wanted: _everywhere(BlockSparse(wanted.sparsity)),
    "video_sparse_attn": lambda wanted: _everywhere(VendorBlockSparse(_vendor("video_sparse_attn", wanted), wanted.sparsity)),
}


# the vendor's function behind each backend, and the arguments it is given by name, which not all versions have
VARLEN = ("flash_attn_varlen_func", ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal"))
FUNCTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "fa": VARLEN,
    "aiter": VARLEN,
    "sage_attn": ("sageattn", ("tensor_layout", "is_causal")),
    "sage_attn_3": ("sageattn3_blackwell", ("is_causal",)),
    "sliding_tile_attn": ("sliding_tile_attention", ()),
    "video_sparse_attn": ("video_sparse_attn", ("variable_block_sizes", "topk", "block_size", "compress_attn_weight")),
}


def _vendor(name: str, wanted: Wanted) -> Any:
    """The function of the vendor's library that was chosen for a backend; `find_broken` saw that it can be had."""
    library = library_of(BACKENDS[name], wanted.site)
    assert library is not None
    logger.info("attention backend %s: %s.%s", name, library.module, FUNCTIONS[name][0])
    return vars(importlib.import_module(library.module))[FUNCTIONS[name][0]]


def find_broken(plan: Plan, hardware: Hardware) -> dict[str, str]:
    """The vendors' libraries that a plan's kernels want and can't use: module -> what is wrong with it. Imports them."""
    site = Site(plan.device.value, plan.dit_precision.value, hardware)
    found = {}
    for name in FUNCTIONS.keys() & {plan.attention.value, *(choice.value for _, choice in plan.attention_parts)}:
        library = library_of(BACKENDS[name], site)
        reason = None if library is None else _wrong_with(library.module, *FUNCTIONS[name])
        if library is not None and reason is not None:
            found[library.module] = reason
    return found


def _wrong_with(module: str, function: str, arguments: tuple[str, ...]) -> str | None:
    try:
        made = vars(importlib.import_module(module)).get(function)
    except Exception as error:  # built for another torch, another CUDA, another driver: each breaks in its own way
        return f"can't be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if made is None:
        return f"has no {function}"
    missing = [argument for argument in arguments if not _takes(made, argument)]
    return f"is of a version whose {function} takes no {missing[0]}" if missing else None


def _takes(function: Callable[..., Any], argument: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # compiled, and silent about itself
        return True
    return argument in parameters
