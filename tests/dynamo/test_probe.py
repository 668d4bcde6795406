"""The request by which Dynamo's runtime tries a worker, without Dynamo."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from stepwell.config.schema import WorkerOptions
from stepwell.dynamo.live import Live
from stepwell.dynamo.media import Media
from stepwell.dynamo.requests import PROBE
from stepwell.engine.fake import FAKES, FakeWorker
from stepwell.engine.local import LocalEngine
from stepwell.media.incoming import Incoming
from stepwell.types import ModelInfo, Task

IMAGE, VIDEO = FAKES["stepwell/fake-image"], FAKES["stepwell/fake-video"]


class Asking:
    """A client that stays."""

    def id(self) -> str:
        return "1"

    def is_stopped(self) -> bool:
        return False


async def probed(model: ModelInfo) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The probe of a worker for a model, and its answers."""
    engine = LocalEngine(lambda: FakeWorker(0, model))
    media = Media(Live(engine), await engine.start(), {"served": model}, Incoming(WorkerOptions()), None)
    probe = media.probe()
    answers = [answer async for answer in media.answers({**probe, PROBE: True}, Asking())]
    await engine.close()
    media.close()
    return probe, answers


@pytest.mark.parametrize("model", [
    IMAGE, VIDEO, replace(VIDEO, tasks=(Task.IMAGE_TO_VIDEO,)), replace(IMAGE, tasks=(Task.IMAGE_TO_IMAGE,)),
    replace(IMAGE, limits=replace(IMAGE.limits, min_side=40, multiple=32)),
    replace(VIDEO, limits=replace(VIDEO.limits, min_steps=3, max_steps=3)),
], ids=["T2I", "T2V", "I2V only", "I2I only", "odd sizes", "three steps"])  # fmt: skip
def test_a_probe_makes_the_least_there_is(model: ModelInfo) -> None:
    probe, answers = asyncio.run(probed(model))
    (answer,) = answers
    assert answer["data"][0]["b64_json"]
    assert probe["nvext"]["num_inference_steps"] == model.limits.min_steps
