"""What the scheduler tells the worker, and what comes back: plain data, no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from stepwell.types import CacheReport, Chunk, Frames, ModelInfo, Request, TextPreview, TextResult


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of one request: its steps, what one of them costs in tokens, and whether it may share a call. `weight` is
    what a token costs beside one of the largest model that is loaded, 0 to 1."""

    name: str
    steps: int
    tokens: int
    packs: bool
    weight: float = 1.0

    @property
    def cost(self) -> int:
        """Of one step, comparable across models."""
        return math.ceil(self.tokens * self.weight)


@dataclass(frozen=True, slots=True)
class NewSample:
    """A sample the worker has not seen: what it is an output of."""

    sample_id: str
    request: Request
    index: int


@dataclass(frozen=True, slots=True)
class Step:
    """One call of one stage of one model: which samples advance, at which step each. `new` ones the worker has not seen."""

    stage: str
    items: tuple[tuple[str, int], ...]
    new: tuple[NewSample, ...] = ()
    model: str = ""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What became of one sample in a step. `resumed`: of a new one the steps, by stage, that an earlier process took."""

    sample_id: str
    is_done: bool = False
    error: Exception | None = None
    preview: Frames | None = None
    frames: Frames | None = None
    cache: CacheReport | None = None
    resumed: dict[str, int] = field(default_factory=dict)
    chunk: Chunk | None = None
    text_preview: TextPreview | None = None
    text: TextResult | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of a step. `memory_mb` is as `Output`'s, and empty unless a sample is done with the stage."""

    items: tuple[ItemResult, ...]
    elapsed_ms: float
    memory_mb: dict[str, float] = field(default_factory=dict)


class StepExecutor(Protocol):
    """A worker, or several, as the core loop sees it. `batch_tokens` are those one step may hold, by the model's id."""

    @property
    def models(self) -> tuple[ModelInfo, ...]: ...

    @property
    def batch_tokens(self) -> Mapping[str, int]: ...

    @property
    def choices(self) -> tuple[tuple[str, str, str], ...]: ...

    def plan(self, request: Request) -> tuple[StagePlan, ...]: ...

    def execute(self, step: Step) -> StepResult: ...

    def free(self, sample_ids: tuple[str, ...]) -> None: ...

    def forget(self, request: Request) -> None: ...

    def held(self) -> int: ...

    def close(self) -> None:
        """The last call: end what would outlive it."""
        ...
