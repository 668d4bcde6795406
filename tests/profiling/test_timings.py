"""What every answer over HTTP says of its time."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from stepwell import DiffGenerator
from tests.support.server import fake, running, serving

STAGES = ["encode_text", "prepare_latents", "denoise", "decode"]
BODY = {"prompt": "a star", "size": "32x32", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def url(tiny: DiffGenerator) -> Iterator[str]:
    with serving(tiny._engine, "stepwell/tiny-flux") as made:
        yield f"{made}/v1"


def check(timings_ms: dict[str, float], names: list[str]) -> None:
    assert list(timings_ms) == ["queued", *names, "total"]
    assert all(ms > 0 for ms in timings_ms.values())
    assert sum(timings_ms.values()) - timings_ms["total"] <= timings_ms["total"] + 0.01  # they are rounded


def test_pictures(url: str) -> None:
    answer = httpx.post(f"{url}/images/generations", json={**BODY, "n": 2}, timeout=60).json()
    assert len(answer["data"]) == 2
    for picture in answer["data"]:
        check(picture["timings_ms"], STAGES)
    began = time.perf_counter()
    answer = httpx.post(f"{url}/images/generations", json={**BODY, "response_format": "url"}, timeout=60).json()
    took_ms = (time.perf_counter() - began) * 1e3
    check(answer["data"][0]["timings_ms"], STAGES)
    assert answer["data"][0]["timings_ms"]["total"] < took_ms


def test_streamed_pictures(url: str) -> None:
    answer = httpx.post(f"{url}/images/generations", json={**BODY, "n": 2, "stream": True}, timeout=60).text
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    completed = [event for event in events if event["type"] == "image_generation.completed"]
    assert len(completed) == 2
    for event in completed:
        check(event["timings_ms"], STAGES)


def test_edited_pictures(url: str) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    form = {"prompt": "a star", "num_inference_steps": "2"}
    answer = httpx.post(f"{url}/images/edits", data=form, files={"image": picture.getvalue()}, timeout=60).json()
    check(answer["data"][0]["timings_ms"], ["encode_text", "encode_image", "prepare_latents", "denoise", "decode"])


def test_videos(tmp_path: Path) -> None:
    with running(fake("video"), tmp_path) as server, httpx.Client(base_url=f"{server.url}/v1") as http:
        video = http.post("/videos", json={"prompt": "a star"}).json()
        assert video["timings_ms"] is None
        deadline = time.monotonic() + 30
        while video["status"] != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.02)
            video = http.get(f"/videos/{video['id']}").json()
        check(video["timings_ms"], ["encode_text", "denoise", "decode"])  # all the stages the fake has


def test_they_are_documented(url: str) -> None:
    schemas = httpx.get(f"{url.removesuffix('/v1')}/openapi.json").json()["components"]["schemas"]
    for name in ("Picture", "Video"):
        said = json.dumps(schemas[name]["properties"]["timings_ms"])
        assert "milliseconds" in said and "queued" in said and "total" in said
