"""What a video job shows while it runs and leaves behind: previews, progress over all stages, files of a real length and size."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from openai.types import Video
from PIL import Image

from stepwell.media.video import preview, probe
from stepwell.types import Frames
from tests.support.sdk import Sdk, details, made, shown, until
from tests.support.server import Running, fake, running

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(fake("video", step_ms=15), tmp_path_factory.mktemp("data")) as made:
        yield made


@pytest.fixture
def sdk(server: Running) -> Sdk:
    return Sdk("sync", f"{server.url}/v1")


def events(server: Running, id: str, **query: Any) -> list[dict[str, Any]]:
    """All events of a job; the last one is its end."""
    with httpx.stream("GET", f"{server.url}/v1/videos/{id}/events", params=query, timeout=30) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def create(server: Running, **body: Any) -> str:
    answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "x", "size": "64x32", **body})
    assert answer.status_code == 200, answer.text
    id: str = answer.json()["id"]
    return id


# --------------------------------------------------------------------------------------------------------- while it runs
def test_previews_are_small_animated_pictures(server: Running) -> None:
    id = create(server, nvext={"num_inference_steps": 60, "num_frames": 33, "fps": 11})
    seen = events(server, id, previews="true")
    previews = [event for event in seen if event["type"] == "video.preview"]
    assert 2 <= len(previews) <= 6 and seen[-1]["type"] == "video.completed"
    assert {(event["id"], event["output_format"]) for event in previews} == {(id, "webp")}
    steps = [event["step"] for event in previews]
    assert steps == sorted(set(steps)) and all(step % 10 == 0 for step in steps)
    for event in previews:
        content = base64.b64decode(event["b64_json"])
        with Image.open(io.BytesIO(content)) as picture:
            assert (picture.format, picture.size, getattr(picture, "n_frames", 1)) == ("WEBP", (16, 16), 9)
            milliseconds = 0.0
            for index in range(9):
                picture.seek(index)
                picture.load()
                milliseconds += picture.info["duration"]
            assert milliseconds == pytest.approx(3000, abs=2)  # as long as the video will be
    assert server.server.jobs.previews == {}
    assert "video.preview" not in {event["type"] for event in events(server, create(server, num_inference_steps=10))}
    assert httpx.get(f"{server.url}/v1/videos/{id}/events", params={"previews": "some"}).json()["error"]["param"] == "previews"


def test_a_preview_is_bounded_whatever_the_video() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (121, 90, 160, 3), dtype=np.uint8)  # what compresses worst
    frames = Frames(noise.tobytes(), *noise.shape[:3])
    wide = Frames(bytes(4 * 40 * 800 * 3), 4, 40, 800)
    for given, size, most in ((frames, (160, 90), 32), (wide, (256, 13), 4)):
        with Image.open(io.BytesIO(preview(given, 5.0))) as picture:
            assert picture.size == size and getattr(picture, "n_frames", 1) <= most
    assert len(preview(frames, 5.0)) < 2**20


def test_progress_counts_every_stage(server: Running) -> None:
    """Decoding 129 frames takes 33 steps here, denoising 2."""
    percents = [event["progress"] for event in events(server, create(server, num_inference_steps=2, num_frames=129))]
    assert percents == sorted(percents) and percents[-1] == 100 and all(percent <= 99 for percent in percents[:-1])
    assert max(later - earlier for earlier, later in pairwise(percents[1:])) < 75  # two steps of denoising are not all


# --------------------------------------------------------------------------------------------------------- what it leaves
@pytest.fixture(scope="module")
def long(server: Running) -> Video:
    """As Dynamo's documents ask for one, at the size and length of Wan 2.1."""
    nvext = {"fps": 16, "num_frames": 81, "num_inference_steps": 2, "guidance_scale": 5.0, "guidance_scale_2": 4.0, "seed": 3,
             "negative_prompt": "blur"}  # fmt: skip
    sdk = Sdk("sync", f"{server.url}/v1", timeout=60)
    id = create(server, seconds=2, size="832x480", response_format="url", nvext=nvext)
    return until(sdk, id, "completed", "failed")


def test_a_file_of_real_size(sdk: Sdk, long: Video) -> None:
    assert (long.status, long.size, long.seconds) == ("completed", "832x480", "5.0625")
    content = sdk("videos.download_content", long.id).content
    assert details(content) == (81, (832, 480), 16.0)
    info = probe(content)
    assert (info.width, info.height, info.frames, info.fps, info.seconds) == (832, 480, 81, 16.0, 5.0625)
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        said = json.loads(container.metadata["comment"])
    wanted = {"num_frames": 81, "fps": 16, "seed": 3, "guidance_scale": 5.0, "guidance_scale_2": 4.0, "negative_prompt": "blur"}
    assert wanted.items() <= said.items()


def test_its_pictures(sdk: Sdk, long: Video) -> None:
    first = shown(sdk("videos.download_content", long.id, variant="thumbnail").content)
    assert (first.format, first.size) == ("WEBP", (256, 148))
    sheet = shown(sdk("videos.download_content", long.id, variant="spritesheet").content)
    assert sheet.size == (4 * 128, 4 * 74)
    tiles = {sheet.crop((x * 128, y * 74, x * 128 + 128, y * 74 + 74)).tobytes() for x in range(4) for y in range(4)}
    assert len(tiles) == 16  # it moves


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"guidance_scale_2": 1.0, "nvext": {"guidance_scale_2": 2.0}}, "guidance_scale_2", "contradicts"),
        ({"guidance_scale_2": -1}, "guidance_scale_2", "between 0 and 1000"),
        ({"nvext": {"guidance_scale_2": "high"}}, "nvext.guidance_scale_2", "number"),
        ({"nvext": {"frames": 1}}, "nvext.frames", "unknown"),
    ],
)
def test_what_is_refused(server: Running, body: dict[str, Any], param: str, words: str) -> None:
    answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "x", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], error


def test_a_first_picture_keeps_its_shape_within_the_models_size(server: Running, sdk: Sdk, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 4000)).save(tmp_path / "photo.jpg")
    done = made(sdk, prompt="x", input_reference=tmp_path / "photo.jpg", extra_body={"num_frames": 1, "num_inference_steps": 1})
    assert (done.status, done.size) == ("completed", "48x64")  # 64 × 64 pixels at most, as the model makes by itself
