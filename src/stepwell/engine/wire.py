"""The words two processes of one engine exchange: plain dataclasses as msgpack. No pickle, no code, no type from outside.

A message is `[name, body]`; the name picks a dataclass from a fixed table, and msgspec checks every field of the body.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from stepwell.engine.api import EngineInfo, Queue, QueueReply, Stats, StatsReply
from stepwell.engine.steps import Step
from stepwell.errors import StepwellError, by_code
from stepwell.types import Chunk, Done, Event, Failed, Preview, Progress, Queued, Request, TextPreview


# ------------------------------------------------------------------------------------------------ to the engine's process
@dataclass(frozen=True, slots=True)
class Open:
    """Build the worker. `options` are EngineOptions as JSON."""

    options: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a completed request. Answered by `Refusal`, or by its events."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request before its next step."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Shut:
    """End every request and leave."""


# ----------------------------------------------------------------- from the first of several ranks to the others: this, or a Step
@dataclass(frozen=True, slots=True)
class Free:
    """Drop the tensors of samples that are over."""

    sample_ids: tuple[str, ...]


# ---------------------------------------------------------------------------------------------- from the engine's process
@dataclass(frozen=True, slots=True)
class Opened:
    """The worker is ready."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error on its way: of a request that was not taken in, or, without an id, of the worker's build."""

    code: str
    message: str
    param: str | None
    retry_after_s: float | None
    request_id: str | None = None

    @classmethod
    def of(cls, error: StepwellError, request_id: str | None = None) -> Refusal:
        return cls(error.code, error.message, error.param, error.retry_after_s, request_id)

    def error(self) -> StepwellError:
        return by_code(self.code, self.message, self.param, self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Pulse:
    """Sent twice a second. `busy_s` is how long the step under way has taken, `usual_s` what such a step should take."""

    busy_s: float
    usual_s: float | None


Command = Open | Submit | Abort | Stats | Queue | Shut
Order = Step | Free | Shut
Report = Opened | Refusal | Pulse | Event | StatsReply | QueueReply
_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(Open, Submit, Abort, Stats, Queue, Shut, Step, Free),
        *(Opened, Refusal, Pulse, Queued, Progress, Preview, TextPreview, Chunk, Done, Failed, StatsReply, QueueReply),
    )
}


def pack(message: Command | Order | Report) -> bytes:
    """A message as msgpack."""
    return msgspec.msgpack.encode((type(message).__name__, message))


def unpack(data: bytes) -> Command | Order | Report:
    """The message again. Raises ValueError for anything that is not one."""
    try:
        name, body = msgspec.msgpack.decode(data, type=tuple[str, msgspec.Raw])
        message: Command | Order | Report = msgspec.msgpack.decode(body, type=_KINDS[name])
    except (msgspec.DecodeError, KeyError) as error:
        raise ValueError(f"not a message: {error}") from None
    return message
