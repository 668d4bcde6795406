"""Tensor parallelism: every rank has a part of each layer's weights, and they add up what their parts make.

Reference: M. Shoeybi et al. 2019, "Megatron-LM", §3: attention is split by heads, feed-forwards by inner channels, so a layer of
two takes two sums. Parts are added in the order of the ranks, so all have the same bits of a sum and go on alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from stepwell.ops.linear import Linear
from stepwell.ops.split import Split, Splittable
from stepwell.parallel.team import Team

Part = Callable[[str, Tensor], Tensor]  # the name of a parameter and the whole of it -> what this rank has of it


def split(model: nn.Module, team: Team) -> Part:
    """Linear seam, before the weights are there: make every layer that can be split this rank's part. Raises InvalidRequest."""
    if team.tensor == 1:
        return lambda name, whole: whole
    splits: dict[str, Split] = {}
    for name, layer in _layers(model):
        splits |= {f"{name}.{weight}": how for weight, how in layer.split(team.tensor).items()}

    def part(name: str, whole: Tensor) -> Tensor:
        return splits[name].part(whole, team.member, team.tensor) if name in splits else whole

    return part


def join(model: nn.Module, team: Team) -> None:
    """Linear seam, once the parts of the weights are there: have what they make added up."""
    if team.tensor == 1:
        return
    for module in model.modules():
        if isinstance(module, Linear):
            module.out_features, module.in_features = module.weight.shape
    for name, layer in list(_layers(model)):
        model.set_submodule(name, Summed(layer, team))


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The layers that can be split, by name; what is within one is its own affair."""
    for name, child in model.named_children():
        if isinstance(child, Splittable):
            yield prefix + name, child
        else:
            yield from _layers(child, f"{prefix}{name}.")


class Summed(nn.Module):
    """A layer of which each rank makes a part of a sum."""

    def __init__(self, layer: Any, team: Team):
        super().__init__()
        self.layer, self.team = layer, team

    def forward(self, *given: Any) -> Tensor:
        return self.team.sum(self.layer(*given))
