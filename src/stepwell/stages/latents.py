"""Prepare latents: the noise a sample starts from, its schedule, and everything its denoising steps share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.cache.memory import CacheMemory
from stepwell.ops.packing import Lane
from stepwell.samplers.base import Memory, Sampler, Schedule
from stepwell.stages.base import Item, Stage, StageSettings, State
from stepwell.types import Request, skipped_steps

Grid = tuple[int, int, int]  # frames, rows, columns of tokens


@dataclass(frozen=True, slots=True)
class Latents:
    """How latents become tokens: one per patch of the VAE's grid, which it holds as (channel, frame, row, column).

    channels: of the VAE's latents; factor, frame_factor: pixels and frames that one of theirs stands for; patch: frames,
    rows and columns of them in a token. The denoiser sees (latents − shift) · scaling, with numbers or (channels, 1, 1, 1).
    dtype: the precision they have between steps; None for that of the text's states. lead: latent frames before the video's
    own, which nobody gets to see.
    """

    channels: int
    factor: int
    scaling: float | Tensor
    shift: float | Tensor
    frame_factor: int = 1
    patch: Grid = (1, 2, 2)
    dtype: torch.dtype | None = None
    lead: int = 0

    @property
    def multiple(self) -> int:
        """What a picture's width and height must divide by, in pixels."""
        return self.factor * math.lcm(*self.patch[1:])

    @property
    def frame_multiple(self) -> int:
        """What a video's frames but one must divide by."""
        return self.frame_factor * self.patch[0]

    def grid(self, request: Request) -> Grid:
        """Frames, rows and columns of tokens."""
        sampling, (frames, rows, columns) = request.sampling, self.patch
        assert sampling.width is not None and sampling.height is not None and sampling.num_frames is not None
        latent_frames = self.lead + (sampling.num_frames - 1) // self.frame_factor + 1
        return latent_frames // frames, sampling.height // (self.factor * rows), sampling.width // (self.factor * columns)

    def tokens(self, request: Request) -> int:
        return math.prod(self.grid(request))

    def noise(self, request: Request, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """(tokens, channels · patch) from the sample's own CPU generator, as diffusers draws it."""
        sizes = [count * size for count, size in zip(self.grid(request), self.patch, strict=True)]
        return self.pack(torch.randn((self.channels, *sizes), generator=generator, dtype=dtype))

    def pack(self, latents: Tensor) -> Tensor:
        """(channels, frames, height, width) -> (tokens, channels · patch), whatever the channels are"""
        patches = latents
        for axis, size in zip((1, 3, 5), self.patch, strict=True):
            patches = patches.unflatten(axis, (-1, size))
        return patches.permute(1, 3, 5, 0, 2, 4, 6).flatten(3).flatten(0, 2)

    def unpack(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(tokens, channels · patch) -> (channels, frames, height, width)"""
        patches = tokens.view(*grid, -1, *self.patch).permute(3, 0, 4, 1, 5, 2, 6)
        return patches.flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def from_vae(self, latents: Tensor) -> Tensor:
        """Normalise the VAE's latents as the denoiser was trained with."""
        return (latents - _like(self.shift, latents)) * _like(self.scaling, latents)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Undo the normalisation the denoiser was trained with."""
        return latents / _like(self.scaling, latents) + _like(self.shift, latents)


def _like(factor: float | Tensor, latents: Tensor) -> float | Tensor:
    return factor.to(latents) if isinstance(factor, Tensor) else factor


@dataclass(frozen=True, slots=True)
class Phase:
    """The steps of a schedule that one denoiser takes: those at timesteps of at least `low` and below `high`."""

    sampler: Sampler
    latents: Latents
    low: float = 0.0
    high: float = math.inf

    def table(self, request: Request) -> Schedule:
        """The whole schedule of a complete request."""
        steps = request.sampling.num_inference_steps
        assert steps is not None
        return self.sampler.table(steps, self.latents.tokens(request)).after(skipped_steps(request))

    def steps(self, schedule: Schedule) -> range:
        """Which of a schedule's steps these are."""
        if self.low <= 0 and self.high == math.inf:
            return range(schedule.steps)
        times = schedule.timesteps.tolist()
        return range(sum(time >= self.high for time in times), sum(time >= self.low for time in times))

    def count(self, request: Request) -> int:
        """How many steps these are of a request."""
        assert request.sampling.num_inference_steps is not None
        if self.low <= 0 and self.high == math.inf:
            return request.sampling.num_inference_steps - skipped_steps(request)
        return len(self.steps(self.table(request)))


class Lanes:
    """Lets a denoiser prepare each guidance branch for the steps it is going to take."""

    def __init__(self, denoiser: nn.Module, phase: Phase, settings: StageSettings):
        self.denoiser: Any = denoiser
        self.phase = phase
        self.teacache = settings.teacache
        self.ranks = settings.ranks

    def of(self, state: State, schedule: Schedule, shared: dict[tuple[str, int], Any]) -> tuple[Lane, ...]:
        """One lane per branch; what the outputs of a request share is in `shared`."""
        sampling, grid = state.request.sampling, self.phase.latents.grid(state.request)
        assert sampling.guidance_scale is not None and sampling.cache is not None
        steps = self.phase.steps(schedule)
        timesteps = schedule.timesteps[steps.start : steps.stop]
        lanes = []
        for place, branch in enumerate(state.conditioning):
            key = (state.request.id, id(branch))
            if key not in shared:
                whole = self.denoiser.prepare(branch, timesteps, grid, sampling.guidance_scale)
                cut = self.ranks.team.cut(whole.prefix, math.prod(grid))
                shared[key] = (whole if cut is None else whole.part(*cut.rows)), cut
            prepared, cut = shared[key]
            memory = CacheMemory.of(sampling.cache, len(steps), self.teacache)
            team = self.ranks.team_of(state.seed, place, len(state.conditioning))
            lanes.append(Lane(prepared, len(steps), prefix=prepared.prefix, grid=grid, cache=memory, team=team, cut=cut))
        return tuple(lanes)


class PrepareLatents(Stage):
    """Makes the schedule, draws noise, which covers the input picture if there is one, and prepares the first lanes."""

    name = "prepare_latents"
    kinds = ("dit",)

    def __init__(self, lanes: Lanes):
        self.lanes = lanes
        self.latents = lanes.phase.latents

    def tokens(self, request: Request) -> int:
        return self.latents.tokens(request)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        shared: dict[tuple[str, int], Any] = {}
        made = [self._prepare(state, shared) for state, _ in items]
        for (state, _), (schedule, lanes, latents, memory) in zip(items, made, strict=True):
            state.schedule, state.lanes, state.latents, state.memory = schedule, lanes, latents, memory
        return [True] * len(items)

    def _prepare(self, state: State, shared: dict[tuple[str, int], Any]) -> tuple[Schedule, tuple[Lane, ...], Tensor, Memory]:
        schedule = self.lanes.phase.table(state.request)
        lanes = self.lanes.of(state, schedule, shared)
        generator = state.generator or torch.Generator("cpu").manual_seed(state.seed)
        dtype = self.latents.dtype or state.conditioning[0].states.dtype
        latents = self.latents.noise(state.request, generator, dtype).to(self.lanes.denoiser.device)
        if state.image_latents is not None:
            latents = schedule.noised(state.image_latents.to(latents), latents)
        return schedule, lanes, state.given_first(latents), schedule.begin(generator)


class SwitchDenoiser(Stage):
    """Hands a sample to the denoiser that takes the rest of its steps."""

    name = "prepare_late"
    kinds = ("dit_2",)

    def __init__(self, lanes: Lanes):
        self.lanes = lanes

    def steps(self, request: Request) -> int:
        return min(1, self.lanes.phase.count(request))

    def tokens(self, request: Request) -> int:
        return self.lanes.phase.latents.tokens(request)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        shared: dict[tuple[str, int], Any] = {}
        made = []
        for state, _ in items:
            assert state.schedule is not None
            made.append(self.lanes.of(state, state.schedule, shared))
        for (state, _), lanes in zip(items, made, strict=True):
            state.lanes = lanes
        return [True] * len(items)
