"""Denoise: one step of any mix of samples in one packed forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from msgspec import msgpack
from torch import Tensor

from stepwell.cache.memory import Note, joined, note, report
from stepwell.guidance import Guider
from stepwell.ops.packing import Lane
from stepwell.samplers.base import Memory
from stepwell.stages.base import Item, Stage, State
from stepwell.stages.latents import Lanes
from stepwell.stages.preview import LatentPreview
from stepwell.types import CacheReport, Frames, Request


class Denoise(Stage):
    """The denoiser over a packed batch, the guidance, and the sampler's update, each sample at its own step.

    text_in_sequence: whether the denoiser's sequences hold the text too, which counts in a step's cost.
    """

    name = "denoise"
    kinds = ("dit",)
    resumes = True
    is_late = False

    def __init__(self, lanes: Lanes, guider: Guider, preview: LatentPreview, *, text_in_sequence: bool):
        self.denoiser = lanes.denoiser
        self.phase = lanes.phase
        self.ranks = lanes.ranks
        self.latents = lanes.phase.latents
        self.guider = guider
        self.preview = preview
        self.text_in_sequence = text_in_sequence
        self._packed: tuple[list[Lane], Any] = ([], None)  # the last set of lanes and its layout

    def steps(self, request: Request) -> int:
        return self.phase.count(request)

    def tokens(self, request: Request) -> int:
        assert request.sampling.max_sequence_length is not None
        text = request.sampling.max_sequence_length if self.text_in_sequence else 0
        return (self.latents.tokens(request) + text) * len(self.guider.prompts(request))

    def needs(self, items: Sequence[Item]) -> tuple[str, ...]:
        shows = self.ranks.is_first and any(state.request.preview_every > 0 for state, _ in items)
        return (*self.kinds, "vae") if shows and not self.preview.is_fitted else self.kinds

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        # neighbours of equal lengths are computed as one batch
        in_order = sorted(items, key=lambda item: item[0].lanes[0].shape)
        lanes: list[Lane] = []
        for state, step in in_order:
            for lane in state.lanes:
                lane.step = step
                lanes.append(lane)
        tokens = [_seen(state).to(self.denoiser.dtype) for state, _ in in_order for _ in state.lanes]
        own = self.ranks.together(lambda: self.ranks.team.together(lambda: self._predict(tokens, lanes)))
        predictions = iter(self.ranks.exchange(own, lanes))
        updates = self.ranks.together(
            lambda: [self._update(item, [next(predictions) for _ in item[0].lanes]) for item in in_order]
        )
        for (state, step), (latents, memory, preview) in zip(in_order, updates, strict=True):
            state.latents, state.memory, state.preview = latents, memory, preview
            if step + 1 == state.lanes[0].steps:
                state.cache = joined(state.cache, self._report(state))
        return [step + 1 >= state.lanes[0].steps for state, step in items]

    def _predict(self, tokens: list[Tensor], lanes: list[Lane]) -> Tensor:
        """The predictions of what is this rank's of all lanes, of (tokens, channels) each, one after the other."""
        own = [place for place, lane in enumerate(lanes) if self.ranks.is_mine(lane)]
        if not own:
            return tokens[0].new_empty(0, self.latents.channels * math.prod(self.latents.patch))
        rows = [tokens[place] if (cut := lanes[place].cut) is None else tokens[place][cut.rows[1]] for place in own]
        packed = torch.cat(rows) if len(rows) > 1 else rows[0]
        velocity: Tensor = self.denoiser(packed, self._pack([lanes[place] for place in own]))
        return velocity

    def _report(self, state: State) -> CacheReport | None:
        """What the step caches of all lanes did, each of which its own rank knows."""
        if state.lanes[0].cache is None:
            return None
        own = [note(lane.cache) for lane in state.lanes if self.ranks.is_mine(lane)]
        of_ranks = [iter(msgpack.decode(notes, type=list[Note])) for notes in self.ranks.every(msgpack.encode(own))]
        of_teams = of_ranks[:: self.ranks.team.size]  # the first of a team has a part of all its lanes
        return report([next(of_teams[lane.team]) for lane in state.lanes], len(self.denoiser.blocks))

    def _update(self, item: Item, predictions: list[Tensor]) -> tuple[Tensor, Memory, Frames | None]:
        """The sample's next latents and sampler memory and, where one is due, a preview from its estimate of the clean ones."""
        state, step = item
        schedule, latents, every = state.schedule, state.latents, state.request.preview_every
        assert schedule is not None and latents is not None
        index = step + self.phase.steps(schedule).start
        velocity = self.guider.combine(predictions, state.request, is_late=self.is_late)
        preview = None
        if every > 0 and (index + 1) % every == 0 and self.ranks.is_first:
            estimate = state.given_first(schedule.estimate(latents, velocity, index))
            preview = self.preview(self.latents.unpack(estimate, self.latents.grid(state.request)))
        latents, memory = schedule.step(latents, velocity, index, state.memory)
        return state.given_first(latents), memory, preview

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


def _seen(state: State) -> Tensor:
    """What the denoiser sees of a sample: (tokens, channels)"""
    assert state.latents is not None
    return state.latents if state.beside is None else torch.cat((state.latents, state.beside.to(state.latents)), dim=-1)


class DenoiseLate(Denoise):
    """The steps of a second denoiser, which takes over when little noise is left (Wan 2.2's two experts)."""

    name = "denoise_late"
    kinds = ("dit_2",)
    is_late = True
