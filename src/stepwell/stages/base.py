"""What a stage is, and the state it advances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from stepwell.ops.packing import Lane
from stepwell.parallel.ranks import ALONE, Ranks
from stepwell.samplers.base import Memory, Schedule
from stepwell.types import CacheReport, Chunk, Frames, Request, TextPreview, TextResult


@dataclass(slots=True)
class State:
    """The tensors of one sample in flight. Each field says which stage fills it; nobody but stages looks inside."""

    request: Request
    index: int
    seed: int
    generator: Generator | None = None  # encode image: where its draws have left it
    image_latents: Tensor | None = None  # encode image: (image tokens, channels), to be noised
    given: Tensor | None = None  # encode image: (tokens, channels), the first of the latents, which never change
    beside: Tensor | None = None  # encode image: (tokens, channels), what the denoiser sees beside the latents
    conditioning: tuple[Any, ...] = ()  # encode text: one entry per guidance branch
    lanes: tuple[Lane, ...] = ()  # prepare latents: one per guidance branch
    schedule: Schedule | None = None  # prepare latents: the sampler's table
    memory: Memory = ()  # prepare latents, denoise: what the sampler's last update hands to the next
    latents: Tensor | None = None  # prepare latents, denoise: (image tokens, channels)
    cache: CacheReport | None = None  # denoise, at its last step
    decoding: Any = None  # decode: what the decoder hands to its next step
    decoded: tuple[Frames, ...] = ()  # decode: what is finished
    frames: Frames | None = None  # decode
    preview: Frames | None = None  # denoise, when asked for; the worker takes it
    prompt: Any = None  # encode text, of a text model: token ids of all that is given
    draft: Any = None  # denoise, of a text model: the text in the making
    chunk: Chunk | None = None  # denoise, when there is more text; the worker takes it
    text_preview: TextPreview | None = None  # denoise, when asked for; the worker takes it
    text: TextResult | None = None  # denoise, at its last step

    def given_first(self, latents: Tensor) -> Tensor:
        """The same latents, those that are given in their place."""
        return latents if self.given is None else torch.cat((self.given.to(latents), latents[len(self.given) :]))


Item = tuple[State, int]  # a sample's state and the index of the step to take


class Stage(ABC):
    """One part of a pipeline, advanced step by step.

    `name` appears in progress and timings. `steps` and `tokens` are asked once, at intake: how many steps a request
    needs (0 passes the stage by), and the cost of one in tokens (what batches are filled by). `packs` is False where
    one call may hold only one sample. `kinds` are those of the parts it computes with (`models.spec.Part.kind`). `resumes` is
    True where all that its steps change is the latents, the sampler's memory and the lanes' step caches (with their report):
    a sample is saved between two of them. A stage that does not is run again, and has to make the same again. `is_shared` is
    False where only the first of several ranks runs it, as nothing follows that they all need.
    """

    name: str
    packs: bool = True
    resumes: bool = False
    is_shared: bool = True
    kinds: tuple[str, ...] = ()

    def steps(self, request: Request) -> int:
        return 1

    def needs(self, items: Sequence[Item]) -> tuple[str, ...]:
        """The kinds of parts that have to be on the device for a step of these."""
        return self.kinds

    @abstractmethod
    def tokens(self, request: Request) -> int:
        """The cost of one step of one sample, in tokens."""

    @abstractmethod
    def run(self, items: Sequence[Item]) -> list[bool]:
        """Take one step of every item and say which are done with this stage.

        A call that raises must leave every state as it was, so that its items can be tried one by one.
        """

    def release(self) -> None:  # noqa: B027  (most stages keep nothing)
        """Forget whatever was kept from the last step; a sample is over."""


@dataclass(frozen=True, slots=True)
class StageSettings:
    """What the plan decided for stages: the size of the prompt cache, what the model's step cache rescales by, the
    repository's model_index.json, this process's place among those that run the model, and among those that decode a video."""

    prompt_cache_bytes: int = 256 * 2**20
    teacache: tuple[float, ...] = ()
    index: Mapping[str, Any] = field(default_factory=dict)
    ranks: Ranks = ALONE
    decoding: Ranks = ALONE
