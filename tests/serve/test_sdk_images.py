"""What programs written for OpenAI's Images API do, done by the real SDK, sync and async, over a socket."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
    Model,
)

from tests.support.sdk import KINDS, Sdk, data_url, drawn, eventually, shown
from tests.support.server import Running, fake, running

pytestmark = pytest.mark.filterwarnings("ignore:(deprecated|The Sora API):DeprecationWarning")
GENERATE, EDIT = "images.generate", "images.edit"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(fake("image"), tmp_path_factory.mktemp("data"), served_model_name="org/my-model") as made:
        yield made


@pytest.fixture(params=KINDS)
def sdk(request: pytest.FixtureRequest, server: Running) -> Sdk:
    return Sdk(request.param, f"{server.url}/v1")


@pytest.fixture
def one(server: Running) -> Sdk:
    """For what does not depend on which of the two clients asks."""
    return Sdk("sync", f"{server.url}/v1")


def parameters(item: Any) -> dict[str, Any]:
    """What a PNG says it was made with."""
    found: dict[str, Any] = json.loads(shown(item.b64_json).info["stepwell"])
    return found


# --------------------------------------------------------------------------------------------------------------- pictures
def test_pictures_as_base64(sdk: Sdk) -> None:
    before = int(time.time())
    answer = sdk(GENERATE, prompt="a calico cat", model="org/my-model", size="48x32", n=2, response_format="b64_json")
    assert isinstance(answer, ImagesResponse) and answer.data is not None
    assert [shown(item.b64_json).size for item in answer.data] == [(48, 32)] * 2
    assert [(item.url, item.revised_prompt) for item in answer.data] == [(None, None)] * 2
    assert (answer.size, answer.output_format, answer.background, answer.usage) == ("48x32", "png", "opaque", None)
    assert before <= answer.created <= time.time()


def test_pictures_by_url(sdk: Sdk, server: Running) -> None:
    answer = sdk(GENERATE, prompt="a cat", n=2, response_format="url", output_format="webp", extra_body={"seed": 5})
    assert len({item.url for item in answer.data}) == 2 and {item.b64_json for item in answer.data} == {None}
    for item in answer.data:
        got = httpx.get(httpx.URL(server.url).join(item.url))
        assert (got.status_code, got.headers["content-type"]) == (200, "image/webp")
        picture = shown(got.content)
        head = httpx.head(got.url)
        assert (head.status_code, head.content, int(head.headers["content-length"])) == (200, b"", len(got.content))
        assert (picture.format, picture.size) == ("WEBP", (64, 64))
        again = httpx.get(httpx.URL(server.url).join(item.url), headers={"if-none-match": got.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_a_picture_that_can_not_be_stored(tmp_path: Path) -> None:
    with running(fake("image", step_ms=1), tmp_path, media_ttl_seconds=1) as made:
        shutil.rmtree(tmp_path / "media")
        with pytest.raises(openai.InternalServerError) as caught:
            Sdk("sync", f"{made.url}/v1")(GENERATE, prompt="x", response_format="url")
        assert caught.value.code == "storage_failed"
        eventually(lambda: made.server.jobs.store.list("image", None) == ([], False))  # no record of what is not there


def test_a_picture_that_is_not_there(one: Sdk) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        one("get", "/images/image_unknown/content", cast_to=object)
    assert (caught.value.code, caught.value.param) == ("not_found", "id")


@pytest.mark.parametrize("n", [1, 3, 10])
def test_each_picture_has_its_own_seed(one: Sdk, n: int) -> None:
    answer = one(GENERATE, prompt="x", n=n, size="32x32", extra_body={"seed": 40})
    assert [item.seed for item in answer.data] == [*range(40, 40 + n)]
    assert [parameters(item)["seed"] for item in answer.data] == [*range(40, 40 + n)]
    assert len({item.b64_json for item in answer.data}) == n


def test_a_seed_is_a_picture(sdk: Sdk) -> None:
    def pixels(**body: Any) -> list[bytes]:
        return [shown(item.b64_json).tobytes() for item in sdk(GENERATE, prompt="x", **body).data]

    (first,) = pixels(extra_body={"seed": 11})
    assert pixels(extra_body={"seed": 11}) == [first]
    assert pixels(extra_body={"seed": 10}, n=2)[1] == first
    assert pixels(extra_body={"seed": 12}) != [first]


def test_without_a_seed_pictures_differ(one: Sdk) -> None:
    seeds = {one(GENERATE, prompt="x").data[0].seed for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, (64, 64)),
        ({"size": "auto"}, (64, 64)),
        ({"size": None}, (64, 64)),
        ({"size": "128x32"}, (128, 32)),
        ({"size": "32×48"}, (32, 48)),
        ({"size": "1024x1024"}, (1024, 1024)),
        ({"extra_body": {"width": 96}}, (96, 64)),
        ({"extra_body": {"width": 32, "height": 16}}, (32, 16)),
        ({"size": "32x16", "extra_body": {"width": 32, "height": 16}}, (32, 16)),
    ],
)
def test_sizes(one: Sdk, body: dict[str, Any], wanted: tuple[int, int]) -> None:
    answer = one(GENERATE, prompt="x", **body)
    assert shown(answer.data[0].b64_json).size == wanted and answer.size == "{}x{}".format(*wanted)


@pytest.mark.parametrize("by", ["b64_json", "url"])
@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(one: Sdk, server: Running, by: Any, format: Any, kind: str) -> None:
    answer = one(GENERATE, prompt="x", output_format=format, output_compression=60, response_format=by)
    item = answer.data[0]
    content = item.b64_json if by == "b64_json" else httpx.get(server.url + item.url).content
    assert shown(content).format == kind and answer.output_format == format


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_compression_makes_smaller_files(one: Sdk, format: Any) -> None:
    def size(compression: int) -> int:
        body = {"output_format": format, "output_compression": compression, "extra_body": {"seed": 77}}
        return len(one(GENERATE, prompt="x", size="256x256", **body).data[0].b64_json)

    assert size(0) < size(50) < size(100)


@pytest.mark.parametrize("background", ["auto", "opaque"])
def test_backgrounds(sdk: Sdk, background: Any) -> None:
    answer = sdk(GENERATE, prompt="x", background=background)
    assert answer.background == "opaque" and shown(answer.data[0].b64_json).mode == "RGB"


@pytest.mark.parametrize("where", ["top", "nvext"])
@pytest.mark.parametrize(
    ("name", "value"), [("num_inference_steps", 7), ("guidance_scale", 2.5), ("seed", 2**53 + 1), ("negative_prompt", "blur")]
)
def test_fields_of_diffusion_servers(one: Sdk, where: str, name: str, value: object) -> None:
    body = {name: value} if where == "top" else {"nvext": {name: value}}
    (item,) = one(GENERATE, prompt="x", extra_body={"true_cfg_scale": 2.0, **body}).data
    assert parameters(item)[name] == value


@pytest.mark.parametrize("given", [{"quality": "high"}, {"style": "vivid", "user": "u"}, {"moderation": "low"}])
def test_fields_without_effect_are_named(sdk: Sdk, given: dict[str, Any]) -> None:
    raw = sdk("images.with_raw_response.generate", prompt="x", **given)
    assert set(raw.headers["x-ignored-params"].split(", ")) == set(given)
    assert raw.http_response.request.url.path == "/v1/images/generations" and raw.headers["x-request-id"]
    assert shown(raw.parse().data[0].b64_json)


def test_nothing_ignored_says_nothing(one: Sdk) -> None:
    raw = one("images.with_raw_response.generate", prompt="x", output_format="jpeg", output_compression=50)
    assert "x-ignored-params" not in raw.headers
    raw = one("images.with_raw_response.generate", prompt="x", output_format="png", output_compression=50)
    assert raw.headers["x-ignored-params"] == "output_compression"


def test_models(sdk: Sdk, server: Running) -> None:
    (model,) = sdk("models.list").data
    assert isinstance(model, Model) and (model.id, model.object, model.owned_by) == ("org/my-model", "model", "stepwell")
    assert sdk("models.retrieve", "org/my-model") == model
    assert model.supported_task_types == ["T2I", "I2I"] and model.defaults["width"] == 64  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError) as caught:
        sdk("models.retrieve", "gpt-image-1")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# ---------------------------------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize("partials", [0, 1, 2, 3])
def test_a_stream(sdk: Sdk, partials: int) -> None:
    body = {"num_inference_steps": 12, "seed": 3}
    *early, last = sdk(GENERATE, prompt="x", stream=True, partial_images=partials, size="64x32", extra_body=body)
    assert [type(event) for event in early] == [ImageGenPartialImageEvent] * partials
    assert [event.type for event in early] == ["image_generation.partial_image"] * partials
    assert [event.partial_image_index for event in early] == [*range(partials)]
    assert isinstance(last, ImageGenCompletedEvent) and last.type == "image_generation.completed"
    assert [shown(event.b64_json).size for event in (*early, last)] == [(64, 32)] * (partials + 1)
    assert {(event.size, event.output_format, event.background) for event in (*early, last)} == {("64x32", "png", "opaque")}
    whole = sdk(GENERATE, prompt="x", size="64x32", extra_body=body)
    assert shown(last.b64_json).tobytes() == shown(whole.data[0].b64_json).tobytes()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_have_few_previews(one: Sdk, steps: int) -> None:
    *early, last = one(GENERATE, prompt="x", stream=True, partial_images=3, extra_body={"num_inference_steps": steps})
    assert len(early) <= min(3, steps) and last.type == "image_generation.completed"
    assert [event.partial_image_index for event in early] == [*range(len(early))]


def test_a_stream_of_two(sdk: Sdk) -> None:
    events = sdk(GENERATE, prompt="x", n=2, stream=True, partial_images=2, extra_body={"num_inference_steps": 9, "seed": 4})
    for index in (0, 1):
        mine = [event for event in events if event.index == index]
        assert [event.type.split(".")[1] for event in mine] == ["partial_image", "partial_image", "completed"]
        assert [event.partial_image_index for event in mine[:2]] == [0, 1]
        assert mine[-1].seed == 4 + index
    assert len(events) == 6 and len({event.b64_json for event in events if event.type.endswith("completed")}) == 2


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_stream_in_another_format(one: Sdk, format: Any, kind: str) -> None:
    events = one(GENERATE, prompt="x", stream=True, partial_images=1, output_format=format, output_compression=40)
    assert {(shown(event.b64_json).format, event.output_format) for event in events} == {(kind, format)}


def test_progress_in_a_stream(one: Sdk) -> None:
    events = one(GENERATE, prompt="x", stream=True, extra_body={"num_inference_steps": 5, "progress_events": True})
    steps = [event.step for event in events if event.type == "image_generation.progress" and event.stage == "denoise"]
    assert steps == sorted(steps) and steps[-1] == 5
    assert events[-1].type == "image_generation.completed"


def test_a_stream_that_fails_midway(sdk: Sdk) -> None:
    with pytest.raises(openai.APIError) as caught:
        sdk(GENERATE, prompt="poison", stream=True, partial_images=3, extra_body={"num_inference_steps": 4})
    error = caught.value
    assert not isinstance(error, openai.APIStatusError) and "poison" in error.message
    assert (error.code, error.type) == ("step_failed", "server_error")
    assert [event.type for event in sdk.seen] == ["image_generation.partial_image"]  # the step before


def test_a_stream_refused(sdk: Sdk) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk(GENERATE, prompt="x", stream=True, size="33x32")
    assert caught.value.param == "width" and sdk.seen == []


def test_a_stream_left_early_stops(server: Running) -> None:
    client = openai.OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=0)
    with client.images.generate(
        prompt="x", stream=True, partial_images=3, extra_body={"num_inference_steps": 1000, "progress_events": True}
    ) as stream:
        next(iter(stream))
    eventually(lambda: not server.server.live)


# ------------------------------------------------------------------------------------------------------------------ edits
def as_file(folder: Path) -> Any:
    (folder / "p.png").write_bytes(drawn())
    return (folder / "p.png").open("rb")


def as_path(folder: Path) -> Any:
    (folder / "p.png").write_bytes(drawn())
    return folder / "p.png"


SENT: dict[str, Callable[[Path], Any]] = {
    "file": as_file,
    "path": as_path,
    "bytes": lambda _: drawn(),
    "stream": lambda _: io.BytesIO(drawn()),
    "named": lambda _: ("p.jpg", drawn(format="JPEG"), "image/jpeg"),
    "webp": lambda _: drawn(format="WEBP"),
    "list": lambda _: [drawn()],
    "list-of-files": lambda folder: [as_file(folder)],
}


@pytest.mark.parametrize("how", SENT)
def test_an_edit(sdk: Sdk, how: str, tmp_path: Path) -> None:
    answer = sdk(EDIT, image=SENT[how](tmp_path), prompt="brighter", extra_body={"seed": 9})
    assert isinstance(answer, ImagesResponse) and answer.data is not None
    assert (shown(answer.data[0].b64_json).size, answer.size) == ((48, 32), "48x32")
    field = b'name="image[]"' if how.startswith("list") else b'name="image"'
    assert field in sdk.sent[0].content and answer.data[0].seed == 9  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sides", "size", "wanted"),
    [
        ((48, 32), "auto", (48, 32)),
        ((48, 32), "64x96", (64, 96)),
        ((50, 33), None, (48, 32)),
        ((5, 3), None, (16, 16)),
        ((2000, 1500), None, (1168, 880)),
    ],
)
def test_sizes_of_edits(one: Sdk, sides: tuple[int, int], size: Any, wanted: tuple[int, int]) -> None:
    answer = one(EDIT, image=drawn(*sides), prompt="x", size=size)
    assert shown(answer.data[0].b64_json).size == wanted


def test_an_edit_of_a_data_url(sdk: Sdk) -> None:
    answer = sdk(EDIT, image=[], prompt="x", extra_body={"url": data_url(drawn(80, 64))})
    assert shown(answer.data[0].b64_json).size == (80, 64)


def test_fields_of_an_edit(sdk: Sdk) -> None:
    raw = sdk(
        "images.with_raw_response.edit", image=drawn(), prompt="x", n=2, input_fidelity="high", quality="low",
        extra_body={"strength": 0.75, "num_inference_steps": 8, "seed": 21, "nvext": {"guidance_scale": 1.5}},
    )  # fmt: skip
    assert set(raw.headers["x-ignored-params"].split(", ")) == {"input_fidelity", "quality"}
    data = raw.parse().data
    assert [item.seed for item in data] == [21, 22]
    found = parameters(data[0])
    assert {name: found[name] for name in ("strength", "num_inference_steps", "guidance_scale")} == {
        "strength": 0.75, "num_inference_steps": 8, "guidance_scale": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"mask": drawn()}, "mask", "leave the mask out"),
        ({"image": [drawn(), drawn()]}, "image", "exactly one"),
        ({"image": []}, "image", "0 pictures"),
        (
            {"image": [], "extra_body": {"image": "cat.png"}},
            "image",
            "image = 'cat.png': must be a file; url takes a picture's URL",
        ),
        ({"image": drawn(), "extra_body": {"url": data_url(drawn())}}, "image", "exactly one"),
        ({"image": b"no picture"}, "image", "image"),
        ({"image": b""}, "image", "image"),
        ({"image": drawn()[:60]}, "image", "image"),
        ({"image": drawn(format="GIF")}, "image", "image"),
        ({"image": [], "extra_body": {"url": "http://127.0.0.1/p.png"}}, "url", "fetching URLs is off"),
        ({"image": [], "extra_body": {"url": "data:image/png;base64,AAAA"}}, "url", "url"),
        ({"extra_body": {"strength": 0}}, "strength", "strength"),
        ({"extra_body": {"strength": 1.5}}, "strength", "between 0 and 1"),
        ({"extra_body": {"strength": "much"}}, "strength", "number"),
        ({"extra_body": {"strenth": 0.5}}, "strenth", "did you mean 'strength'"),
        ({"size": "50x33"}, "width", "multiple of 16"),
    ],
)
def test_edits_refused(one: Sdk, body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        one(EDIT, **{"image": drawn(), "prompt": "x", **body})
    assert caught.value.param == param and words in caught.value.message, caught.value.message


def test_an_edit_as_a_stream(sdk: Sdk) -> None:
    *early, last = sdk(
        EDIT, image=drawn(), prompt="x", stream=True, partial_images=2, extra_body={"num_inference_steps": 9, "strength": 1}
    )
    assert [type(event) for event in early] == [ImageEditPartialImageEvent] * 2
    assert [(event.type, event.partial_image_index) for event in early] == [("image_edit.partial_image", i) for i in (0, 1)]
    assert isinstance(last, ImageEditCompletedEvent) and last.type == "image_edit.completed"
    assert {shown(event.b64_json).size for event in (*early, last)} == {(48, 32)} and last.size == "48x32"


def test_an_edit_that_fails_midway(sdk: Sdk) -> None:
    with pytest.raises(openai.APIError, match="poison") as caught:
        sdk(EDIT, image=drawn(), prompt="poison", stream=True)
    assert caught.value.code == "step_failed"


# ----------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("body", "kind", "param", "code"),
    [
        ({"size": "huge"}, openai.BadRequestError, "size", "invalid_value"),
        ({"n": 11}, openai.BadRequestError, "n", "invalid_value"),
        ({"background": "transparent"}, openai.BadRequestError, "background", "unsupported"),
        ({"partial_images": 2}, openai.BadRequestError, "partial_images", "invalid_value"),
        ({"stream": True, "partial_images": 4}, openai.BadRequestError, "partial_images", "invalid_value"),
        ({"stream": True, "response_format": "url"}, openai.BadRequestError, "response_format", "unsupported"),
        ({"extra_body": {"steps": 3}}, openai.BadRequestError, "steps", None),
        ({"extra_body": {"nvext": {"steps": 3}}}, openai.BadRequestError, "nvext.steps", None),
        ({"model": "gpt-image-1"}, openai.NotFoundError, "model", "model_not_found"),
        ({"prompt": "poison"}, openai.InternalServerError, None, "step_failed"),
        ({"prompt": "gluttony"}, openai.InternalServerError, None, "out_of_memory"),
    ],
)
def test_errors(sdk: Sdk, body: dict[str, Any], kind: type[openai.APIStatusError], param: str | None, code: str | None) -> None:
    with pytest.raises(kind) as caught:
        sdk(GENERATE, **{"prompt": "x", **body}, extra_headers={"x-request-id": "req.1"})
    error = caught.value
    assert type(error) is kind and error.param == param and error.message
    assert error.request_id == "req.1" and (code is None or error.code == code)
    assert error.type == ("server_error" if error.status_code == 500 else "invalid_request_error")


def test_a_base_url_without_v1(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="base_url must end in /v1"):
        Sdk("sync", server.url)(GENERATE, prompt="x")


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("images.create_variation", {"image": drawn()}, "images/edits"),
        ("videos.create", {"prompt": "x"}, "makes pictures"),
        ("chat.completions.create", {"model": "org/my-model", "messages": [{"role": "user", "content": "x"}]}, "makes pictures"),
        ("completions.create", {"model": "org/my-model", "prompt": "x"}, "makes pictures; use POST /v1/images/generations"),
    ],
)
def test_what_is_not_offered_says_so(one: Sdk, method: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        one(method, **arguments)
    assert caught.value.code == "unsupported"


# ---------------------------------------------------------------------------------------------------------------- retries
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["poison", "gluttony"])
def test_a_failed_generation_is_not_repeated(server: Running, kind: Any, prompt: str) -> None:
    sdk = Sdk(kind, f"{server.url}/v1", max_retries=4)
    with pytest.raises(openai.InternalServerError) as caught:
        sdk(GENERATE, prompt=prompt)
    assert len(sdk.sent) == 1 and caught.value.response.headers["x-should-retry"] == "false"


def has_work(server: Running, running: int, queued: int) -> bool:
    health = httpx.get(f"{server.url}/health").json()
    return (health["running"], health["queued"]) == (running, queued)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_queue_is_waited_for(kind: Any, tmp_path: Path) -> None:
    limits = {"max_running": 1, "max_queued": 1}
    with running(fake("image", step_ms=20, **limits), tmp_path) as full, ThreadPoolExecutor(2) as pool:
        body, busy = {"prompt": "x", "num_inference_steps": 30}, []
        for running_and_queued in ((1, 0), (1, 1)):
            busy.append(pool.submit(httpx.post, f"{full.url}/v1/images/generations", json=body, timeout=20))
            eventually(partial(has_work, full, *running_and_queued))
        with pytest.raises(openai.RateLimitError) as caught:
            Sdk(kind, f"{full.url}/v1")(GENERATE, prompt="x")
        error = caught.value
        assert (error.code, error.type) == ("queue_full", "rate_limit_error")
        assert 0 < float(error.response.headers["retry-after-ms"]) <= 1000 * float(error.response.headers["retry-after"])
        patient = Sdk(kind, f"{full.url}/v1", max_retries=8)
        assert shown(patient(GENERATE, prompt="x").data[0].b64_json)
        assert len(patient.sent) > 1 and {answer.result().status_code for answer in busy} == {200}


def test_a_timeout_ends_the_work(server: Running) -> None:
    with pytest.raises(openai.APITimeoutError):
        Sdk("sync", f"{server.url}/v1", timeout=0.2)(GENERATE, prompt="x", extra_body={"num_inference_steps": 1000})
    eventually(lambda: not server.server.live)


def test_one_key_is_one_generation(sdk: Sdk) -> None:
    def ask(prompt: str, key: str) -> Any:
        return sdk(GENERATE, prompt=prompt, extra_headers={"idempotency-key": f"{key}-{id(sdk)}"})

    first = ask("x", "a")
    assert ask("x", "a") == first and ask("x", "b").data[0].seed != first.data[0].seed
    with pytest.raises(openai.BadRequestError) as caught:
        ask("y", "a")
    assert (caught.value.code, caught.value.param) == ("idempotency_mismatch", "Idempotency-Key")


@pytest.mark.parametrize("first_leaves", [False, True])
def test_a_retry_joins_its_first_attempt(server: Running, first_leaves: bool) -> None:
    body = {"prompt": f"retried {first_leaves}", "num_inference_steps": 150}
    address, seeds = f"{server.url}/v1/images/generations", []

    def attempt(count: int, timeout: float) -> None:
        answer = httpx.post(address, json=body, timeout=timeout, headers={"x-stainless-retry-count": str(count)})
        seeds.append(answer.json()["data"][0]["seed"])

    def first() -> None:
        try:
            attempt(0, 0.2 if first_leaves else 20)
        except httpx.ReadTimeout:
            assert first_leaves

    thread = threading.Thread(target=first)
    thread.start()
    eventually(lambda: server.server.live)
    attempt(1, 20)
    thread.join()
    assert len(seeds) == (1 if first_leaves else 2) and len(set(seeds)) == 1


# ------------------------------------------------------------------------------------------------------------------- keys
def test_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# two\nred\n\ngreen\n")
    with running(fake("image"), tmp_path / "data", api_key_file=str(tmp_path / "keys")) as keyed:
        red, green, blue = (Sdk("sync", f"{keyed.url}/v1", api_key=key) for key in ("red", "green", "blue"))
        with pytest.raises(openai.AuthenticationError) as caught:
            blue(GENERATE, prompt="x")
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")
        assert caught.value.request_id
        url = red(GENERATE, prompt="x", response_format="url").data[0].url.removeprefix("/v1")
        assert shown(red("get", url, cast_to=openai._legacy_response.HttpxBinaryResponseContent).content)
        with pytest.raises(openai.NotFoundError):
            green("get", url, cast_to=object)
