"""The table of schemes, and which layers they replace. What a device can run is decided in `config.resolve`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from stepwell.ops.blocks import Blocks
from stepwell.ops.linear import Linear
from stepwell.quant.fp8 import Fp8
from stepwell.quant.int8 import Int8Dynamic, Int8WeightOnly


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to hold weights. `convert` makes a layer's replacement; in and out features must be multiples of `multiple`."""

    name: str
    convert: Callable[[nn.Linear], nn.Module]
    multiple: int = 1


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8_weight_only", Int8WeightOnly),
        Scheme("int8_dynamic", Int8Dynamic),
        Scheme("fp8", Fp8, multiple=16),
    )
}


def layers_for(denoiser: nn.Module, scheme: Scheme | None) -> list[str]:
    """Names of the layers a scheme replaces: the linears of the blocks, where nearly all weights are.

    Those before and after the blocks hold few weights and all of the picture, and keep their precision, as everywhere in
    the field; embedders and modulations run once per request and are no `Linear`. Small layers are not spared: for
    int8_dynamic they gain time in fp32 at nearly any size, in bf16 only from about 1024 features on (`benchmarks.quant`).
    """
    if scheme is None:
        return []
    return [
        f"{place}.{name}"
        for place, blocks in denoiser.named_modules()
        if isinstance(blocks, Blocks)
        for name, layer in blocks.named_modules()
        if isinstance(layer, Linear) and not (layer.in_features % scheme.multiple or layer.out_features % scheme.multiple)
    ]


def quantiser(denoiser: nn.Module, scheme: Scheme | None) -> Callable[[str], None]:
    """What replaces a layer by its name once its weights are there, if it is one of them.

    Done while loading, a model in its own precision is never held whole.
    """
    chosen = frozenset(layers_for(denoiser, scheme))

    def quantise(name: str) -> None:
        if scheme is not None and name in chosen:
            denoiser.set_submodule(name, scheme.convert(denoiser.get_submodule(name)))  # type: ignore[arg-type]

    return quantise
