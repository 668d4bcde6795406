"""An engine that writes what it is told to, in pieces of a chosen size: for what a random model would never write."""

from __future__ import annotations

from collections.abc import AsyncIterator

from stepwell.engine.api import Control, EngineInfo, QueueReply, Reply, StatsReply
from stepwell.engine.intake import complete
from stepwell.types import (
    Chunk,
    DiffusionParams,
    Done,
    Event,
    Frames,
    Limits,
    ModelInfo,
    Output,
    Queued,
    Request,
    SamplingParams,
    Task,
    TextInfo,
    TextResult,
    TextUsage,
)

SCRIBE = ModelInfo(
    id="scribe",
    path="scribe",
    family="fake",
    pipeline_class="Fake",
    tasks=(Task.TEXT_TO_TEXT,),
    defaults=SamplingParams(num_outputs=1),
    limits=Limits(),
    dit_precision="fp32",
    vae_precision="fp32",
    text=TextInfo(vocabulary=256, block=8, context=1024, max_tokens=64, defaults=DiffusionParams()),
)


class Scripted:
    """Implements `Engine`: every text is `text`, ended for the reason `finish`. `asked` holds the requests."""

    def __init__(self) -> None:
        self.text, self.finish, self.piece = "", "stop", 1
        self.asked: list[Request] = []

    async def start(self) -> EngineInfo:
        return EngineInfo((SCRIBE,), ())

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        request = complete(request, SCRIBE)
        self.asked.append(request)
        yield Queued(request.id, 0)
        outputs = []
        for index in range(request.sampling.num_outputs or 1):
            for start in range(0, len(self.text), self.piece):
                yield Chunk(request.id, index, start, self.text[start : start + self.piece])
            result = TextResult(self.text, self.finish, TextUsage(4, 0, len(self.text), 2, 0))
            outputs.append(Output(index, index, Frames(b"", 0, 0, 0), {"total": 1.0}, text=result))
        yield Done(request.id, tuple(outputs))

    async def abort(self, request_id: str) -> None: ...

    async def control(self, message: Control) -> Reply:
        return QueueReply((), 0.0) if type(message).__name__ == "Queue" else StatsReply(0, 0, 0, 0, 0)

    async def close(self) -> None: ...
