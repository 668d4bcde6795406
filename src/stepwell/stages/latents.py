"""Prepare latents: the noise a sample starts from, its schedule, and everything its denoising steps share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.cache.memory import CacheMemory
from stepwell.errors import WeightsError
from stepwell.ops.packing import Lane
from stepwell.samplers.flow import FlowMatchEuler
from stepwell.stages.base import Item, Stage, State
from stepwell.types import Request, skipped_steps


class PackedLatents:
    """FLUX's latent layout: the VAE's latents in 2 × 2 patches, one token each.

    channels: of the VAE's latents. Sizes come from the VAE's own down-sampling factor.
    """

    def __init__(self, channels: int, vae: Any):
        self.channels = channels
        self.factor = downsampling(vae.config)
        self.scaling, self.shift = float(vae.config.scaling_factor), float(vae.config.get("shift_factor") or 0.0)

    @property
    def multiple(self) -> int:
        """What a picture's width and height must divide by, in pixels."""
        return 2 * self.factor

    def grid(self, request: Request) -> tuple[int, int]:
        """Rows and columns of tokens."""
        width, height = request.sampling.width, request.sampling.height
        assert width is not None and height is not None
        return height // self.multiple, width // self.multiple

    def tokens(self, request: Request) -> int:
        rows, columns = self.grid(request)
        return rows * columns

    def noise(self, request: Request, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """(tokens, 4 · channels) from the sample's own CPU generator, as diffusers draws it."""
        rows, columns = self.grid(request)
        return self.pack(torch.randn((self.channels, 2 * rows, 2 * columns), generator=generator, dtype=dtype))

    def pack(self, latents: Tensor) -> Tensor:
        """(channels, height, width) -> (tokens, 4 · channels)"""
        channels, height, width = latents.shape
        patches = latents.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
        return patches.reshape((height // 2) * (width // 2), 4 * channels)

    def unpack(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(tokens, 4 · channels) -> (channels, height, width)"""
        rows, columns = grid
        patches = tokens.view(rows, columns, self.channels, 2, 2).permute(2, 0, 3, 1, 4)
        return patches.reshape(self.channels, 2 * rows, 2 * columns)

    def from_vae(self, latents: Tensor) -> Tensor:
        """Normalise the VAE's latents as the denoiser was trained with."""
        return (latents - self.shift) * self.scaling

    def to_vae(self, latents: Tensor) -> Tensor:
        """Undo the normalisation the denoiser was trained with."""
        return latents / self.scaling + self.shift


def downsampling(config: Mapping[str, Any]) -> int:
    """Pixels of a picture's side for each of its latents', from the VAE's config. Raises WeightsError where it does not say."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if not isinstance(blocks, list | tuple):
        raise WeightsError(f"the VAE's config.json: block_out_channels = {blocks!r}: must be a list", param="block_out_channels")
    return 2 ** (len(blocks) - 1)


class PrepareLatents(Stage):
    """Makes the schedule, draws noise, which covers the input picture if there is one, and lets the denoiser prepare
    each guidance branch."""

    name = "prepare_latents"
    kinds = ("dit",)

    def __init__(self, denoiser: nn.Module, latents: PackedLatents, sampler: FlowMatchEuler, teacache: tuple[float, ...] = ()):
        self.denoiser: Any = denoiser
        self.latents = latents
        self.sampler = sampler
        self.teacache = teacache

    def tokens(self, request: Request) -> int:
        return self.latents.tokens(request)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        shared: dict[tuple[str, int], tuple[Any, ...]] = {}  # the outputs of one request prepare once
        made = [self._prepare(state, shared) for state, _ in items]
        for (state, _), (schedule, lanes, latents) in zip(items, made, strict=True):
            state.schedule, state.lanes, state.latents = schedule, lanes, latents
        return [True] * len(items)

    def _prepare(self, state: State, shared: dict[tuple[str, int], tuple[Any, ...]]) -> tuple[Any, tuple[Lane, ...], Tensor]:
        request, sampling = state.request, state.request.sampling
        assert sampling.num_inference_steps is not None and sampling.guidance_scale is not None and sampling.cache is not None
        schedule = self.sampler.table(sampling.num_inference_steps, self.latents.tokens(request)).after(skipped_steps(request))
        dtype = state.conditioning[0].states.dtype
        key = (request.id, id(state.conditioning[0]))
        grid = self.latents.grid(request)
        if key not in shared:
            # rounded as the reference pipeline rounds: to the latents' precision, then to a fraction of 1000
            timesteps = schedule.timesteps.to(dtype) / 1000
            shared[key] = tuple(
                self.denoiser.prepare(branch, timesteps, grid, sampling.guidance_scale) for branch in state.conditioning
            )
        lanes = tuple(
            Lane(
                prepared,
                schedule.steps,
                prefix=len(branch.states),
                grid=(1, *grid),
                cache=CacheMemory.of(sampling.cache, schedule.steps, self.teacache),
            )
            for branch, prepared in zip(state.conditioning, shared[key], strict=True)
        )
        generator = state.generator or torch.Generator("cpu").manual_seed(state.seed)
        latents = self.latents.noise(request, generator, dtype).to(self.denoiser.device)
        if state.image_latents is not None:
            latents = schedule.noised(state.image_latents.to(latents), latents)
        return schedule, lanes, latents
