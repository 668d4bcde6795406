"""The few-step sampler of models distilled by distribution matching (DMD2, Yin et al. 2024, arXiv 2405.14867): FastWan.

Reference: FastVideo's `DmdDenoisingStage`. Each step predicts the clean latents and noises them afresh for the next of the
timesteps the model was distilled for. The timesteps go to the model as they are; sigmas are those of the nearest of the 1000
timesteps of a shifted flow. The reference's shift is 8 for every model, whatever its scheduler config says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepwell.errors import InvalidRequest
from stepwell.samplers.base import Memory, noised_at

FASTWAN_TIMESTEPS = (1000, 757, 522)
SHIFT = 8.0


@dataclass(frozen=True, slots=True)
class DmdTable:
    """The schedule of one request: sigmas (steps + 1 floats, 1 is pure noise, the last 0) and timesteps (steps,).

    Memory: the state of the sample's generator.
    """

    sigmas: tuple[float, ...]
    timesteps: Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def after(self, skipped: int) -> DmdTable:
        """The schedule without its first steps."""
        return replace(self, sigmas=self.sigmas[skipped:], timesteps=self.timesteps[skipped:]) if skipped else self

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Where a clean sample starts on this schedule."""
        return noised_at(self.sigmas[0], clean, noise)

    def begin(self, generator: torch.Generator) -> Memory:
        return (generator.get_state(),)

    def step(self, latents: Tensor, velocity: Tensor, index: int, memory: Memory) -> tuple[Tensor, Memory]:
        """The clean latents, under fresh noise but for the last step; float32. Noise is drawn in the order of the latents."""
        clean = self.estimate(latents, velocity, index)
        if index + 1 == self.steps:
            return clean, ()
        generator = torch.Generator("cpu")
        generator.set_state(memory[0].cpu())
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        return noised_at(self.sigmas[index + 1], clean, noise), (generator.get_state(),)

    def estimate(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        """The clean latents the model heads for: x₀ = x_i − σ_i v"""
        return latents.float() - self.sigmas[index] * velocity.float()


class Dmd:
    """Makes a request's table from the timesteps a model was distilled for, which are all it can do."""

    def __init__(self, timesteps: Sequence[int] = FASTWAN_TIMESTEPS, shift: float = SHIFT):
        grid = torch.arange(1000, 0, -1) / 1000
        grid = shift * grid / (1 + (shift - 1) * grid)
        asked = torch.tensor(timesteps, dtype=torch.float32)
        nearest = (grid * 1000 - asked.unsqueeze(1)).abs().argmin(1)
        self._table = DmdTable((*grid[nearest].tolist(), 0.0), asked)

    def table(self, steps: int, tokens: int) -> DmdTable:
        """The table. Raises InvalidRequest for any number of steps but the one it was distilled for."""
        if steps != self._table.steps:
            timesteps = ", ".join(f"{timestep:g}" for timestep in self._table.timesteps.tolist())
            raise InvalidRequest(
                f"num_inference_steps = {steps}: this model is distilled for {self._table.steps} steps "
                f"(at timesteps {timesteps}); use {self._table.steps}",
                param="num_inference_steps",
            )
        return self._table
