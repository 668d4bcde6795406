"""Euler steps of a rectified flow (Liu et al. 2022; Esser et al. 2024), on the schedule diffusers computes.

Reference: diffusers `FlowMatchEulerDiscreteScheduler`, with `FluxPipeline`'s shift that grows with the picture or, as in
`HunyuanVideoPipeline`, a fixed one; or, as `WanPipeline` asks it, with its own levels of noise, the least of which is not a
step above 0. The schedule object makes the table once per request; the update is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stepwell.samplers.base import Memory, check_config, noised_at

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True, slots=True)
class FlowTable:
    """The schedule of one request: sigmas (steps + 1 floats, 1 is pure noise) and timesteps (steps,) in [0, 1000]. A clean sample
    starts at `most_noise` where the first sigma is above it."""

    sigmas: tuple[float, ...]
    timesteps: Tensor
    most_noise: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def after(self, skipped: int) -> FlowTable:
        """The schedule without its first steps."""
        return replace(self, sigmas=self.sigmas[skipped:], timesteps=self.timesteps[skipped:]) if skipped else self

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Where a clean sample starts on this schedule."""
        return noised_at(min(self.sigmas[0], self.most_noise), clean, noise)

    def begin(self, generator: torch.Generator) -> Memory:
        return ()

    def step(self, latents: Tensor, velocity: Tensor, index: int, memory: Memory) -> tuple[Tensor, Memory]:
        """x_{i+1} = x_i + (σ_{i+1} − σ_i) v, summed in float32 and kept in the prediction's precision"""
        return (latents.float() + (self.sigmas[index + 1] - self.sigmas[index]) * velocity).to(velocity.dtype), memory

    def estimate(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        """The clean latents the model heads for: x₀ = x_i − σ_i v"""
        return latents.float() - self.sigmas[index] * velocity.float()


class FlowMatchEuler:
    """Makes a request's table from a checkpoint's scheduler config; `has_own_levels`: evenly from its largest σ to its least;
    `most_noise`: what a picture starts under, at most."""

    def __init__(self, schedule: FlowMatchEulerDiscreteScheduler, *, has_own_levels: bool = False, most_noise: float = 1.0):
        check_config(schedule.config, {"stochastic_sampling": (False,), "invert_sigmas": (False,)})
        self._schedule = schedule
        self._most_noise = most_noise
        self._has_own_levels = has_own_levels or bool(schedule.config.get("use_flow_sigmas"))

    def table(self, steps: int, tokens: int) -> FlowTable:
        """The table for `steps` steps over `tokens` tokens (a dynamic shift grows with the picture)."""
        config = self._schedule.config
        shift = None
        if config.use_dynamic_shifting:
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            shift = tokens * slope + config.base_shift - slope * config.base_image_seq_len
        sigmas = None if self._has_own_levels else np.linspace(1.0, 1 / steps, steps)
        self._schedule.set_timesteps(None if sigmas is not None else steps, sigmas=sigmas, mu=shift)
        return FlowTable(
            sigmas=tuple(self._schedule.sigmas.tolist()),
            timesteps=self._schedule.timesteps.to(torch.float32).clone(),
            most_noise=self._most_noise,
        )
