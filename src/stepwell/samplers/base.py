"""What a sampler is to the step loop: a table made once per request, and an update that owns no state."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Generator, Tensor

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
