"""The openai SDK, sync or async, behind one way of calling it; and pictures to send and to look at."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal

import av
import httpx2
import openai
from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream
from openai.pagination import AsyncConversationCursorPage, SyncConversationCursorPage
from openai.types import Video
from PIL import Image

Kind = Literal["sync", "async"]
KINDS: tuple[Kind, ...] = ("sync", "async")


class Sdk:
    """A client of a server at `url`, which ends in /v1 or ought to. The first `lost` answers never reach it.

    `sent` are the requests of the latest call, retries included; `seen` the events of its stream, or the items of its pages,
    even where they broke off.
    """

    def __init__(self, kind: Kind, url: str, lost: int = 0, **options: Any):
        self.kind = kind
        self.sent: list[Any] = []
        self.seen: list[Any] = []
        self._lost = lost
        self._options = {"api_key": "any", "base_url": url, "max_retries": 0, "timeout": 20, **options}

    def __call__(self, method: str, *arguments: Any, **named: Any) -> Any:
        """`client.<method>(…)`. The events of a stream and the items of all pages come as lists."""
        self.sent, self.seen = [], []
        run = self._sync if self.kind == "sync" else self._async
        return run(method, arguments, named)

    def _sync(self, method: str, arguments: Any, named: Any) -> Any:
        def ask(request: Any) -> None:
            request.read()
            self.sent.append(request)

        http = openai.DefaultHttpxClient(event_hooks={"request": [ask], "response": [self._lose]}, verify=False)
        with OpenAI(http_client=http, **self._options) as client:
            found = attrgetter(method)(client)(*arguments, **named)
            if isinstance(found, Stream | SyncConversationCursorPage):
                for item in found:
                    self.seen.append(item)
                return self.seen
            return found

    def _async(self, method: str, arguments: Any, named: Any) -> Any:
        async def ask(request: Any) -> None:
            await request.aread()
            self.sent.append(request)

        async def answer(response: Any) -> None:
            self._lose(response)

        async def run() -> Any:
            http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [ask], "response": [answer]}, verify=False)
            async with AsyncOpenAI(http_client=http, **self._options) as client:
                found = await attrgetter(method)(client)(*arguments, **named)
                if isinstance(found, AsyncStream | AsyncConversationCursorPage):
                    async for item in found:
                        self.seen.append(item)
                    return self.seen
                return found

        return asyncio.run(run())

    def _lose(self, response: Any) -> None:
        if len(self.sent) <= self._lost:
            raise httpx2.ReadError("the answer got lost", request=response.request)


def eventually(holds: Callable[[], object], limit_s: float = 10) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def shown(data: bytes | str | None) -> Image.Image:
    """The picture in a file, or in base64; every pixel was read."""
    assert data
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True) if isinstance(data, str) else data))
    picture.load()
    return picture


def drawn(width: int = 48, height: int = 32, format: str = "PNG") -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, format)
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def made(sdk: Sdk, **body: Any) -> Video:
    """A video that is finished."""
    found = sdk("videos.create_and_poll", poll_interval_ms=10, **body)
    assert isinstance(found, Video)
    return found


def until(sdk: Sdk, id: str, *statuses: str) -> Video:
    """A video once it has one of these states."""
    seen: list[Video] = []

    def is_there() -> bool:
        seen.append(sdk("videos.retrieve", id))
        return seen[-1].status in statuses

    eventually(is_there, 20)
    return seen[-1]


def details(content: bytes) -> tuple[int, tuple[int, int], float]:
    """Frames, size and rate of a video that decodes."""
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.average_rate is not None and {(frame.width, frame.height) for frame in frames} == {
            (stream.width, stream.height)
        }
        return len(frames), (stream.width, stream.height), float(stream.average_rate)
