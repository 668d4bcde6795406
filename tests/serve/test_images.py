"""The HTTP API by the real openai SDK, over an engine without a model and over the bundled one."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from stepwell import DiffGenerator
from stepwell.engine.local import LocalEngine
from tests.support.server import fake, serving


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    made = fake(step_ms=2)
    made.open()
    yield made
    made.shut()


@pytest.fixture(scope="module")
def url(engine: LocalEngine) -> Iterator[str]:
    with serving(engine, "my-model") as base:
        yield base


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0)


def decode(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_generate(client: OpenAI) -> None:
    answer = client.images.generate(
        prompt="a calico cat", size="48x32", n=2, response_format="b64_json", extra_body={"seed": 7, "num_inference_steps": 3}
    )
    assert answer.data is not None and len(answer.data) == 2
    assert [decode(item.b64_json).size for item in answer.data] == [(48, 32)] * 2
    assert [item.seed for item in answer.data] == [7, 8]  # type: ignore[attr-defined]
    assert answer.data[0].timings_ms["total"] > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "format"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(client: OpenAI, name: str, format: str) -> None:
    answer = client.images.generate(prompt="x", output_format=name, output_compression=80)  # type: ignore[call-overload]
    assert decode(answer.data[0].b64_json).format == format


def test_nvext(client: OpenAI) -> None:
    answer = client.images.generate(
        prompt="x", extra_body={"nvext": {"num_inference_steps": 2, "seed": 3, "guidance_scale": 0.0}}
    )
    assert answer.data is not None and answer.data[0].seed == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": 5}, "prompt", "string"),
        ({}, "prompt", "missing"),
        ({"prompt": "x", "size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "x", "size": "33x32"}, "width", "multiple of 16; 32 or 48"),
        ({"prompt": "x", "size": "4096x4096"}, "size", "at most"),
        ({"prompt": "x", "size": "0x0"}, "width", "between 16"),
        ({"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "x", "n": 11}, "n", "less than or equal to 10"),
        ({"prompt": "x", "n": "2"}, "n", "integer"),
        ({"prompt": "x", "seed": -1}, "seed", "between 0"),
        ({"prompt": "x", "seed": True}, "seed", "integer"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps", "between 1"),
        ({"prompt": "x", "guidance_scale": "high"}, "guidance_scale", "number"),
        ({"prompt": "x", "width": 32, "size": "64x64"}, "width", "contradicts"),
        ({"prompt": "x", "seed": 1, "nvext": {"seed": 2}}, "seed", "contradicts"),
        ({"prompt": "x", "nvext": {"num_steps": 2}}, "nvext.num_steps", "unknown"),
        ({"prompt": "x", "num_inference_step": 5}, "num_inference_step", "did you mean 'num_inference_steps'"),
        ({"prompt": "x", "response_format": "url", "stream": True}, "response_format", "b64_json"),
        ({"prompt": "x", "partial_images": 2}, "partial_images", "stream = true"),
        ({"prompt": "x", "background": "transparent"}, "background", "opaque"),
        ({"prompt": "x" * 40_000}, "prompt", "at most 32000"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ],
)
def test_bad_bodies_name_the_field(url: str, body: dict[str, object], param: str, words: str) -> None:
    answer = httpx.post(f"{url}/v1/images/generations", content=json.dumps(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"], error
    assert error["type"] == "invalid_request_error" and error["code"]
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe"])
def test_bodies_that_are_no_object(url: str, content: bytes) -> None:
    answer = httpx.post(f"{url}/v1/images/generations", content=content)
    assert answer.status_code == 400 and "body" in answer.json()["error"]["message"]


def test_a_huge_body(url: str) -> None:
    answer = httpx.post(f"{url}/v1/images/generations", content=b"x" * (5 * 2**20))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_another_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.images.generate(prompt="x", model="dall-e-3")
    assert error.value.code == "model_not_found" and "my-model" in error.value.message
    assert client.images.generate(prompt="x", model="my-model").data


def test_models(client: OpenAI, url: str) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("my-model", "model", "stepwell")
    assert client.models.retrieve("my-model").id == "my-model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    described = httpx.get(f"{url}/models").json()
    assert list(described) == [
        "model_path", "task_type", "pipeline_name", "pipeline_class", "num_gpus", "dit_precision", "vae_precision",
        "models",
    ]  # fmt: skip
    assert described.pop("models") == [described]
    assert described["task_type"] == "T2I"


def test_request_ids(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert httpx.get(f"{url}/nowhere").headers["x-request-id"]


def test_unknown_routes(url: str) -> None:
    answer = httpx.get(f"{url}/images/generations")
    assert answer.status_code == 404 and "end in /v1" in answer.json()["error"]["message"]


def test_a_failed_step_is_not_retried(url: str) -> None:
    answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "poison"})
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "step_failed"


def test_an_api_key() -> None:
    engine = fake()
    engine.open()
    with serving(engine, "m", api_key="secret") as url:
        with pytest.raises(openai.AuthenticationError):
            OpenAI(api_key="wrong", base_url=f"{url}/v1").models.list()
        assert OpenAI(api_key="secret", base_url=f"{url}/v1").models.list().data
        assert httpx.get(f"{url}/livez").status_code == 200 and httpx.get(f"{url}/health").status_code == 401
    engine.shut()


def test_hanging_up_aborts(engine: LocalEngine, url: str) -> None:
    body = {"prompt": "x", "num_inference_steps": 1000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=0.2)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if httpx.get(f"{url}/health").json()["running"] == 0:
            return
        time.sleep(0.02)
    raise AssertionError("the request went on although nobody waits for it")


def test_a_full_queue_is_429() -> None:
    engine = fake(step_ms=20, max_running=1, max_queued=1)
    engine.open()
    with serving(engine, "m") as url, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: httpx.post(f"{url}/v1/images/generations", json={"prompt": "x"}, timeout=30), range(4)))
    engine.shut()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and all(float(answer.headers["retry-after"]) > 0 for answer in refused)
    assert {answer.status_code for answer in answers} == {200, 429}


def test_many_at_once(client: OpenAI) -> None:
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(client.images.generate(prompt="x", n=2))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 12


def test_the_bundled_model_gives_the_same_picture_over_http(tiny: DiffGenerator) -> None:
    wanted = tiny.generate("a red circle on a white background", seed=3, width=64, height=64)[0]
    with serving(tiny._engine, "stepwell/tiny-flux") as url:
        client = OpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0)
        answer = client.images.generate(
            prompt="a red circle on a white background", size="64x64", extra_body={"seed": 3}, response_format="b64_json"
        )
    assert answer.data is not None
    picture = decode(answer.data[0].b64_json)
    assert picture.tobytes() == wanted.frames[0].tobytes()
    assert "a red circle" in picture.info["stepwell"]


def test_metrics_count_steps_their_time_and_their_tokens(client: OpenAI, url: str) -> None:
    def value(name: str) -> float:
        text = httpx.get(f"{url}/metrics").text
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    labels = f'model="{client.models.list().data[0].id}",stage="denoise"'
    steps, tokens = f"stepwell_step_seconds_count{{{labels}}}", f"stepwell_step_tokens_sum{{{labels}}}"
    before = value(steps), value(tokens)
    client.images.generate(prompt="a star", size="64x64", extra_body={"num_inference_steps": 7})
    assert value(steps) - before[0] == 7 and value(tokens) - before[1] == 7 * 64 * 64 * 4 // 1024
    assert value(f'stepwell_step_seconds_bucket{{le="+Inf",{labels}}}') == value(steps)
    assert value("stepwell_engine_up") == 1 and value("stepwell_http_requests_total") > 0
