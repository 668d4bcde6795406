"""What an engine is to its frontends: five verbs, and events that always end in exactly one terminal one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stepwell.errors import ModelNotFound
from stepwell.types import Event, ModelInfo, Request, Task


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What `start` answers: the models, and every automatic choice as (what, value, reason)."""

    models: tuple[ModelInfo, ...]
    choices: tuple[tuple[str, str, str], ...] = ()

    @property
    def model(self) -> ModelInfo:
        """The first."""
        return self.models[0]

    def of(self, request: Request) -> ModelInfo:
        """The model a request asks for, else the first that does its task. Raises ModelNotFound."""
        if request.model:
            for model in self.models:
                if model.id == request.model:
                    return model
            known = ", ".join(repr(model.id) for model in self.models)
            raise ModelNotFound(f"model = {request.model!r}: loaded is {known}", param="model")

        def fits(task: Task) -> bool:
            return task is request.task if request.task else task.takes_image == (request.image is not None)

        return next((model for model in self.models if any(map(fits, model.tasks))), self.models[0])


Kind = tuple[str, str]  # of steps: the model's id and the stage


@dataclass(slots=True)
class Tally:
    """How often a quantity was at most each of some bounds and above the one before; the last count is of what exceeds all."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def add(self, value: float) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(frozen=True, slots=True)
class Stats:
    """Control message: how busy is the engine? Answered with `StatsReply`."""


Wakefulness = Literal["awake", "drowsy", "asleep", "waking"]


@dataclass(frozen=True, slots=True)
class StatsReply:
    """Samples waiting and under way, requests alive, and steps taken since the start.

    `held_samples` are those whose tensors the worker holds; `batch_sizes` counts the steps of each size per kind,
    `step_seconds` and `step_tokens` how long and how large they were; `memory_bytes` is the worker process's resident memory.
    An engine that is drowsy takes nothing new in and falls asleep once what is under way has ended.
    """

    queued_samples: int
    running_samples: int
    requests: int
    steps: int
    held_samples: int
    batch_sizes: dict[Kind, dict[int, int]] = field(default_factory=dict)
    step_seconds: dict[Kind, Tally] = field(default_factory=dict)
    step_tokens: dict[Kind, Tally] = field(default_factory=dict)
    tokens: int = 0
    restarts: int = 0
    memory_bytes: int = 0
    state: Wakefulness = "awake"


@dataclass(frozen=True, slots=True)
class Queue:
    """Control message: who is waiting, and for how much? Answered with `QueueReply`."""


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """One live request. Work is counted in tokens: its own that is left, and that of others which will go first."""

    request_id: str
    is_running: bool
    tokens_left: int
    tokens_ahead: int


@dataclass(frozen=True, slots=True)
class QueueReply:
    """Live requests in the order in which they are expected to end. `tokens_per_s` is measured, 0 before the first step."""

    entries: tuple[QueueEntry, ...]
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Control message: let go of the model and its memory, until `Wake`. New requests are refused from now on, and those
    that only wait; what is under way ends first, or, with `abort`, at once. Answered with `SleepReply`: asleep, or awake if
    it was woken before it got there. An engine that sleeps stays as it is."""

    abort: bool = False


@dataclass(frozen=True, slots=True)
class Wake:
    """Control message: load the model again, and take requests. Answered with `SleepReply` once it does. Raises what
    `Engine.start` raises, and sleeps on, if the model can't be loaded. An engine that is awake stays as it is."""


@dataclass(frozen=True, slots=True)
class SleepReply:
    """Whether the engine sleeps now."""

    state: Wakefulness


Control = Stats | Queue | Sleep | Wake
Reply = StatsReply | QueueReply | SleepReply


class Engine(Protocol):
    """Implementations: `LocalEngine` in this process, `RemoteEngine` in a supervised one."""

    async def start(self) -> EngineInfo:
        """Load the model. Raises StepwellError if that fails."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Event]:
        """Events of one request; the last is `Done` or `Failed`. Leaving the iterator early aborts the request.

        Raises InvalidRequest, Unsupported, QueueFull or EngineClosed before the first event.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request before its next step. Unknown or ended ids are no error."""
        ...

    async def control(self, message: Control) -> Reply:
        """Everything that is not a generation."""
        ...

    async def close(self) -> None:
        """End every request with `Failed`, free everything. May be called twice, or before `start`."""
        ...
