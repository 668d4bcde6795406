"""Pictures and videos through Dynamo's frontend."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from benchmarks.cluster import Cluster
from stepwell import DiffGenerator
from stepwell.media.images import read_parameters
from tests.spec_commands import FRONTEND
from tests.support.dynamo import FAKE_IMAGE, FAKE_VIDEO, FLUX, WAN, Deployment, needs_dynamo
from tests.support.sdk import data_url, details, drawn, shown

pytestmark = needs_dynamo
PICTURES, VIDEOS = "/v1/images/generations", "/v1/videos"


def picture(**more: Any) -> dict[str, Any]:
    return {"model": FAKE_IMAGE, "prompt": "a red circle", "response_format": "b64_json", **more}


def video(**more: Any) -> dict[str, Any]:
    return {"model": FAKE_VIDEO, "prompt": "a red circle", "response_format": "b64_json", **more}


def written(content: str) -> dict[str, Any]:
    """The parameters that a picture in base64 carries."""
    file = io.BytesIO(base64.b64decode(content))
    return dict(json.loads(Image.open(file).info["stepwell"]))


def test_a_picture_is_that_of_the_engine(dynamo: Deployment, tiny: DiffGenerator) -> None:
    body = picture(model=FLUX, size="64x64", n=2, nvext={"num_inference_steps": 2, "seed": 7})
    answer = dynamo.post(PICTURES, body).json()
    wanted = tiny.generate(prompt="a red circle", width=64, height=64, num_inference_steps=2, seed=7, num_outputs_per_prompt=2)
    assert [shown(item["b64_json"]).tobytes() for item in answer["data"]] == [output.image.tobytes() for output in wanted]
    assert (answer["size"], answer["output_format"]) == ("64x64", "png")


def test_what_the_frontend_has_no_field_for(dynamo: Deployment) -> None:
    annotations = ["num_inference_steps:300", "true_cfg_scale:1.5", "negative_prompt:blur: all of it", "llm_metrics"]
    body = picture(nvext={"guidance_scale": 0, "annotations": annotations}, output_format="png", max_sequence_length=32)
    found = written(dynamo.post(PICTURES, body).json()["data"][0]["b64_json"])
    assert (found["num_inference_steps"], found["guidance_scale"], found["true_cfg_scale"]) == (300, 0, 1.5)
    assert (found["negative_prompt"], found["max_sequence_length"]) == ("blur: all of it", 32)


def test_numbers_are_those_that_were_written(dynamo: Deployment) -> None:
    found = written(dynamo.post(PICTURES, picture(nvext={"guidance_scale": 7.1})).json()["data"][0]["b64_json"])
    assert found["guidance_scale"] == 7.1  # the frontend has 32 bits for it


def test_a_picture_that_starts_from_one(dynamo: Deployment) -> None:
    body = picture(input_reference=data_url(drawn(48, 32)), strength=0.5, nvext={"seed": 1})
    answer = dynamo.post("/v1/images/edits", body).json()
    assert answer["size"] == "48x32" and written(answer["data"][0]["b64_json"])["strength"] == 0.5


@pytest.mark.parametrize(("user", "folder"), [
    ("alice-1", "users/alice-1/"), ("../../etc", r"users/______etc-[0-9a-f]{16}/"), ("a b", r"users/a_b-[0-9a-f]{16}/"),
    (".", r"users/_-[0-9a-f]{16}/"), ("x" * 500, r"users/x{48}-[0-9a-f]{16}/"), ("", ""), (None, ""),
])  # fmt: skip
def test_a_user_gets_a_folder_of_a_plain_name(dynamo: Deployment, user: str | None, folder: str) -> None:
    body = {
        "model": FAKE_IMAGE,
        "prompt": "a red circle",
        "nvext": {"num_inference_steps": 1},
    }  # a URL is what it has a place for
    url = dynamo.post(PICTURES, body if user is None else {**body, "user": user}).json()["data"][0]["url"]
    key = re.fullmatch(rf"https://cdn\.example\.com/media/({folder}image-[0-9a-f]{{44}}\.png)", url)
    assert key is not None, url
    assert read_parameters(dynamo.media / key[1])["prompt"] == "a red circle"


@pytest.mark.parametrize("path", [PICTURES, VIDEOS])
def test_no_format_is_what_there_is_a_place_for(dynamo: Deployment, path: str) -> None:
    body = (picture if path == PICTURES else video)(response_format=None, nvext={"num_inference_steps": 1})
    assert dynamo.post(path, body).json()["data"][0]["url"]


def test_a_place_without_an_address_of_its_own(dynamo: Deployment) -> None:
    body = picture(model=FLUX, size="32x32", response_format="url", output_format="jpeg", nvext={"num_inference_steps": 1})
    url = dynamo.post(PICTURES, body).json()["data"][0]["url"]
    path = Path(url.removeprefix("file://"))
    assert path.parent == dynamo.media and path.suffix == ".jpg" and Image.open(path).size == (32, 32)


@pytest.mark.parametrize(("body", "message"), [
    ({"size": "huge"}, "size = 'huge': must be 'WIDTHxHEIGHT'"),
    ({"size": "100000x8"}, "size = '100000x8'"),
    ({"size": "8192x8192"}, "at most 1048576 pixels"),
    ({"n": 11}, "n = 11"),
    ({"n": 0}, "n = 0"),
    ({"response_format": "pigeon"}, "unknown variant `pigeon`, expected `url` or `b64_json`"),
    ({"prompt": "x" * 40_000}, "40000 characters: at most 32000"),
    ({"stpes": 4}, "unknown name 'stpes'"),
    ({"nvext": {"annotations": ["stpes:4"]}}, "unknown name 'stpes'"),
    ({"nvext": {"annotations": ["sign"]}}, "annotations: 'sign' has no value; write 'name:value'"),
    ({"nvext": {"annotations": ["nvext:5"]}}, "'nvext' is no annotation"),
    ({"nvext": {"num_inference_steps": 3, "annotations": ["num_inference_steps:300"]}}, "num_inference_steps = 300 contradicts"),
    ({"nvext": {"num_inference_steps": 0}}, "num_inference_steps = 0: must be between 1 and 1000"),
    ({"nvext": {"annotations": ["num_inference_steps:300", "num_inference_steps:301"]}}, "contradicts"),
    ({"stream": True}, "sends pictures whole"),
    ({"input_reference": "https://example.com/a.png"}, "fetching URLs is off"),
    ({"input_reference": "/etc/passwd"}, "fetching URLs is off"),
    ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference"),
])  # fmt: skip
def test_what_is_wrong_is_told(dynamo: Deployment, body: dict[str, Any], message: str) -> None:
    assert message in dynamo.refused(PICTURES, picture(**body))


@pytest.mark.parametrize(("body", "message"), [
    ({"nvext": {"num_frames": 16}}, "num_frames = 16: must be a multiple of 4 and one more; 13 or 17 would do"),
    ({"seconds": 4000}, "seconds = 4000.0: must be a number above 0 and at most 3600"),
    ({"nvext": {"annotations": ["stream:true"]}}, "'stream' is no annotation"),
    ({"output_format": "mjpeg"}, "output_format = 'mjpeg': videos are made as mp4"),
    ({"size": "64"}, "size = '64'"),
])  # fmt: skip
def test_what_is_wrong_with_a_video_is_told(dynamo: Deployment, body: dict[str, Any], message: str) -> None:
    assert message in dynamo.refused(VIDEOS, video(**body))


def test_a_video_of_random_weights(dynamo: Deployment) -> None:
    body = {"model": WAN, "prompt": "a red circle", "size": "32x32", "response_format": "url", "user": "bob",
            "nvext": {"fps": 8, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 0}}  # fmt: skip
    answer = dynamo.post(VIDEOS, body).json()
    (data,) = answer["data"]
    path = Path(data["url"].removeprefix("file://"))
    assert path.parent == dynamo.media / "users" / "bob"
    assert details(path.read_bytes()) == (5, (32, 32), 8.0)
    assert (answer["object"], answer["model"], answer["status"], answer["progress"]) == ("video", WAN, "completed", 100)
    assert (data["output_format"], data["fps"]) == ("mp4", 8) and answer["inference_time_s"] > 0


def test_seconds_decide_where_frames_do_not(dynamo: Deployment) -> None:
    answer = dynamo.post(VIDEOS, video(seconds=1, nvext={"fps": 16, "num_inference_steps": 1})).json()
    assert details(base64.b64decode(answer["data"][0]["b64_json"])) == (17, (64, 64), 16.0)


def test_progress_is_for_who_streams(dynamo: Deployment) -> None:
    body = video(nvext={"num_inference_steps": 12})
    assert dynamo.post(VIDEOS, body).json()["status"] == "completed"
    lines = dynamo.post(VIDEOS, {**body, "stream": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    seen = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [event["status"] for event in seen] == ["in_progress"] * (len(seen) - 1) + ["completed"]
    shares = [event["progress"] for event in seen]
    assert len(seen) > 10 and shares == sorted(set(shares)) and shares[0] < 10 and shares[-1] == 100
    assert details(base64.b64decode(seen[-1]["data"][0]["b64_json"]))[0] == 17


@pytest.mark.long
def test_the_video_of_the_documents(dynamo: Deployment) -> None:
    """A minute of a CPU core to itself."""
    (row,) = (row for row in FRONTEND if row.path == VIDEOS)
    assert row.body is not None and row.body["model"] == WAN
    answer = dynamo.post(VIDEOS, row.body, timeout=1200).json()
    assert details(Path(answer["data"][0]["url"].removeprefix("file://")).read_bytes()) == (17, (832, 480), 8.0)


def test_a_failure_is_an_error(dynamo: Deployment) -> None:
    assert dynamo.post(VIDEOS, video(prompt="poison")).status_code == 500
    assert dynamo.post(PICTURES, picture(prompt="gluttony")).status_code == 500
    text = dynamo.post(VIDEOS, video(prompt="poison", stream=True)).text
    assert '"error"' in text and '"status":"failed"' not in text and "completed" not in text


def test_nobody_else_is_harmed_by_a_crash(dynamo: Deployment) -> None:
    assert dynamo.post(PICTURES, picture(prompt="crash")).status_code == 500  # twice the engine's process died of it
    assert dynamo.post(PICTURES, picture(nvext={"num_inference_steps": 1})).status_code == 200


def test_a_model_nobody_serves(dynamo: Deployment) -> None:
    answer = dynamo.post(PICTURES, picture(model="who/knows"))
    assert answer.status_code == 404 and "not found" in answer.json()["message"].lower()


def test_the_models_are_listed(dynamo: Deployment) -> None:
    found = {model["id"] for model in httpx.get(f"{dynamo.url}/v1/models", trust_env=False).json()["data"]}
    assert {FLUX, WAN, FAKE_IMAGE, FAKE_VIDEO} <= found


def test_a_place_that_is_gone_is_for_another_worker_to_have(tmp_path: Path) -> None:
    """A 503, which RetryingClient takes to the next one; the same worker is fine once the place is."""
    media = tmp_path / "media"
    with Cluster() as cluster:
        cluster.worker(*("--model-path", "stepwell/fake-image?step_ms=1", "--served-model-name", FAKE_IMAGE),
                       "--media-output-fs-url", f"file://{media}")  # fmt: skip
        url = cluster.frontend()
        cluster.wait_for(url, FAKE_IMAGE)

        def asked() -> int:
            return httpx.post(f"{url}{PICTURES}", json=picture(response_format="url"), timeout=60, trust_env=False).status_code

        assert asked() == 200
        shutil.rmtree(media)
        media.write_text("in the way")
        assert asked() == 503
        media.unlink()
        media.mkdir()
        assert asked() == 200
