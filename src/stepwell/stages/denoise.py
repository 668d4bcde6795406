"""Denoise: one step of any mix of samples in one packed forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.cache.memory import report
from stepwell.guidance import branch_prompts, combine
from stepwell.ops.packing import Lane
from stepwell.samplers.base import Memory, Schedule
from stepwell.stages.base import Item, Stage, State
from stepwell.stages.latents import PackedLatents
from stepwell.stages.preview import LatentPreview
from stepwell.types import Frames, Request, skipped_steps


class Denoise(Stage):
    """The denoiser over a packed batch, the guidance, and the sampler's update, each sample at its own step."""

    name = "denoise"
    kinds = ("dit",)
    resumes = True

    def __init__(self, denoiser: nn.Module, latents: PackedLatents, preview: LatentPreview):
        self.denoiser: Any = denoiser
        self.latents = latents
        self.preview = preview
        self._packed: tuple[list[Lane], Any] = ([], None)  # the last set of lanes and its layout

    def steps(self, request: Request) -> int:
        assert request.sampling.num_inference_steps is not None
        return request.sampling.num_inference_steps - skipped_steps(request)

    def tokens(self, request: Request) -> int:
        assert request.sampling.max_sequence_length is not None
        tokens = self.latents.tokens(request) + request.sampling.max_sequence_length
        return tokens * len(branch_prompts(request))

    def needs(self, items: Sequence[Item]) -> tuple[str, ...]:
        is_first = not self.preview.is_fitted and any(state.request.preview_every > 0 for state, _ in items)
        return (*self.kinds, "vae") if is_first else self.kinds

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        # neighbours of equal lengths are computed as one batch
        in_order = sorted(items, key=lambda item: (item[0].lanes[0].prefix, item[0].lanes[0].grid))
        lanes: list[Lane] = []
        for state, step in in_order:
            for lane in state.lanes:
                lane.step = step
                lanes.append(lane)
        tokens = [_latents(item).to(self.denoiser.dtype) for item in in_order for _ in item[0].lanes]
        velocity = self.denoiser(torch.cat(tokens) if len(tokens) > 1 else tokens[0], self._pack(lanes))
        predictions = iter(velocity.split([len(t) for t in tokens]))
        updates = [self._update(item, [next(predictions) for _ in item[0].lanes]) for item in in_order]
        for (state, step), (latents, memory, preview) in zip(in_order, updates, strict=True):
            state.latents, state.memory, state.preview = latents, memory, preview
            if step + 1 == _schedule(state).steps:
                state.cache = report([lane.cache for lane in state.lanes], len(self.denoiser.blocks))
        return [step + 1 >= _schedule(state).steps for state, step in items]

    def _update(self, item: Item, predictions: list[Tensor]) -> tuple[Tensor, Memory, Frames | None]:
        """The sample's next latents and sampler memory and, where one is due, a preview from its estimate of the clean ones."""
        state, step = item
        sampling, every = state.request.sampling, state.request.preview_every
        assert sampling.true_cfg_scale is not None
        velocity = combine(predictions, sampling.true_cfg_scale)
        preview = None
        if every > 0 and (step + 1) % every == 0:
            estimate = _schedule(state).estimate(_latents(item), velocity, step)
            preview = self.preview(self.latents.unpack(estimate, self.latents.grid(state.request)))
        return *_schedule(state).step(_latents(item), velocity, step, state.memory), preview

    def _pack(self, lanes: list[Lane]) -> Any:
        """The layout of this set of lanes; the same as last step's as long as nobody joins or leaves."""
        last, packed = self._packed
        if len(last) != len(lanes) or any(a is not b for a, b in zip(last, lanes, strict=True)):
            packed = self.denoiser.pack(lanes)
            self._packed = (lanes, packed)
        return packed

    def release(self) -> None:
        """Drop the last layout, and with it the tensors of samples it held on to."""
        self._packed = ([], None)


def _schedule(state: State) -> Schedule:
    assert state.schedule is not None
    return state.schedule


def _latents(item: Item) -> Tensor:
    latents = item[0].latents
    assert latents is not None
    return latents
