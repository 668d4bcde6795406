"""What a sampler is to the step loop: a table made once per request, and an update that owns no state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Generator, Tensor

from stepwell.errors import WeightsError

# What one update hands to the next: nothing for Euler, earlier predictions for multistep methods, a generator's state for
# stochastic ones. Plain tensors, so that a sample can be saved between two steps and go on elsewhere.
Memory = tuple[Tensor, ...]


class Schedule(Protocol):
    """The noise schedule of one request, and how a prediction moves its latents along it. Never changes.

    sigmas: (steps + 1) floats, 1 is pure noise; timesteps: (steps,) in [0, 1000].
    """

    @property
    def sigmas(self) -> tuple[float, ...]: ...

    @property
    def timesteps(self) -> Tensor: ...

    @property
    def steps(self) -> int: ...

    def after(self, skipped: int) -> Self:
        """The schedule without its first steps."""
        ...

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Where a clean sample starts on this schedule."""
        ...

    def begin(self, generator: Generator) -> Memory:
        """The memory before the first step; `generator` is the sample's own, its initial noise already drawn."""
        ...

    def step(self, latents: Tensor, prediction: Tensor, index: int, memory: Memory) -> tuple[Tensor, Memory]:
        """The latents after step `index`, and what the next step needs. Changes none of its arguments."""
        ...

    def estimate(self, latents: Tensor, prediction: Tensor, index: int) -> Tensor:
        """The clean latents the model heads for."""
        ...


class Sampler(Protocol):
    """Makes a request's table from a checkpoint's scheduler config."""

    def table(self, steps: int, tokens: int) -> Schedule:
        """The table for `steps` steps over `tokens` tokens."""
        ...


def noised_at(sigma: float, clean: Tensor, noise: Tensor) -> Tensor:
    """A clean sample under noise: σ ε + (1 − σ) x, in the samples' precision"""
    level = torch.tensor(sigma, dtype=clean.dtype)
    return level * noise + (1.0 - level) * clean


def check_config(config: Mapping[str, Any], supported: Mapping[str, tuple[object, ...]]) -> None:
    """Raise WeightsError for the first field of a scheduler's config that is none of what is supported."""
    for field, values in supported.items():
        if config.get(field) not in values:
            right = " or ".join(json.dumps(value) for value in values if value is not None or len(values) == 1)
            raise WeightsError(
                f"scheduler/scheduler_config.json asks for {field} = {json.dumps(config.get(field), default=str)}, "
                f"which is not supported: set it to {right}",
                param=field,
            )
