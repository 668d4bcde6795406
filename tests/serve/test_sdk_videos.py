"""What programs written for OpenAI's Videos API do, done by the real SDK, sync and async, over a socket."""

from __future__ import annotations

import io
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest
from openai import AsyncStream, Stream
from openai.types import Video, VideoDeleteResponse

from stepwell.config.schema import EngineOptions
from tests.support.sdk import KINDS, Sdk, data_url, details, drawn, eventually, made, shown, until
from tests.support.server import Running, fake, running

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
CREATE, POLL, RETRIEVE, DELETE = "videos.create", "videos.create_and_poll", "videos.retrieve", "videos.delete"
BY_URL = {"input_reference": {"image_url": "https://x.org/p.png"}}
LONG = {"num_inference_steps": 500}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(fake("video", step_ms=1), tmp_path_factory.mktemp("data"), served_model_name="my-model") as made:
        yield made


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(fake("video", step_ms=20), tmp_path_factory.mktemp("data")) as made:
        yield made


@pytest.fixture(params=KINDS)
def sdk(request: pytest.FixtureRequest, server: Running) -> Sdk:
    return Sdk(request.param, f"{server.url}/v1")


@pytest.fixture(params=KINDS)
def waiting(request: pytest.FixtureRequest, slow: Running) -> Sdk:
    """A client of the slow server."""
    return Sdk(request.param, f"{slow.url}/v1")


@pytest.fixture
def one(server: Running) -> Sdk:
    """For what does not depend on which of the two clients asks."""
    return Sdk("sync", f"{server.url}/v1")


@pytest.fixture(scope="module")
def video(server: Running) -> Video:
    """One that is finished, for those who only look."""
    return made(Sdk("sync", f"{server.url}/v1"), prompt="a moving gradient", size="64x48", extra_body={"seed": 8})


# --------------------------------------------------------------------------------------------------------------- one video
def test_create(sdk: Sdk) -> None:
    before = int(time.time())
    answer = sdk(CREATE, prompt="a cat", model="my-model", seconds="4", size="64x32")
    assert sdk.sent[0].headers["content-type"].startswith("multipart/form-data")
    assert isinstance(answer, Video) and answer.id.startswith("video_")
    assert (answer.object, answer.model, answer.prompt, answer.size) == ("video", "my-model", "a cat", "64x32")
    assert answer.status in ("queued", "in_progress") and answer.progress < 100
    assert before <= answer.created_at <= time.time()
    assert (answer.completed_at, answer.error, answer.remixed_from_video_id) == (None, None, None)
    done = until(sdk, answer.id, "completed", "failed")
    assert (done.status, done.progress, done.error, done.prompt) == ("completed", 100, None, "a cat")
    assert done.completed_at is not None and done.expires_at is not None
    assert answer.created_at <= done.completed_at < done.expires_at


def test_create_and_poll(sdk: Sdk) -> None:
    answer = sdk(POLL, prompt="a cat")
    assert (answer.status, answer.progress, answer.size, answer.seconds) == ("completed", 100, "64x64", "2.125")
    assert [request.method for request in sdk.sent[:2]] == ["POST", "GET"]


def test_what_it_is_made_of(sdk: Sdk) -> None:
    body = {"seed": 5, "fps": 12, "num_frames": 9, "num_inference_steps": 3, "negative_prompt": "blur", "true_cfg_scale": 2}
    answer = made(sdk, prompt="x", size="96x64", extra_body=body)
    assert (answer.seed, answer.fps, answer.num_frames) == (5, 12, 9)  # type: ignore[attr-defined]
    content = sdk("videos.download_content", answer.id).content
    assert details(content) == (9, (96, 64), 12.0)
    with av.open(io.BytesIO(content)) as container:
        comment = json.loads(container.metadata["comment"])
    assert {name: comment[name] for name in ("prompt", "seed", "num_inference_steps", "negative_prompt")} == {
        "prompt": "x", "seed": 5, "num_inference_steps": 3, "negative_prompt": "blur",
    }  # fmt: skip
    url = httpx.URL(str(sdk.sent[0].url)).join(answer.data[0]["url"])  # type: ignore[attr-defined]
    assert httpx.get(url).content == content


def test_a_video_keeps_the_name_of_its_model(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with running(fake("video", step_ms=1), tmp_path, served_model_name=name) as server:
            sdk = Sdk("sync", f"{server.url}/v1")
            made(sdk, prompt=name)
            assert {video.prompt: video.model for video in sdk("videos.list")} == {"first": "first"} | {name: name}


def test_a_seed_is_a_video(one: Sdk) -> None:
    def content(seed: int) -> bytes:
        found: bytes = one("videos.download_content", made(one, prompt="x", extra_body={"seed": seed}).id).content
        return found

    first = content(3)
    assert content(3) == first != content(4)


@pytest.mark.parametrize(
    ("body", "frames", "fps"),
    [
        ({}, 17, 8),
        ({"seconds": "4"}, 33, 8),
        ({"seconds": 1}, 9, 8),
        ({"extra_body": {"seconds": 0.1}}, 1, 8),
        ({"seconds": "2", "extra_body": {"fps": 16}}, 33, 16),
        ({"seconds": "2", "extra_body": {"num_frames": 5}}, 5, 8),
        ({"extra_body": {"num_frames": 21, "fps": 24}}, 21, 24),
        ({"extra_body": {"nvext": {"num_frames": 5, "fps": 30}}}, 5, 30),
        ({"extra_body": {"nvext": json.dumps({"num_frames": 13, "fps": 3})}}, 13, 3),
    ],
)
def test_lengths(one: Sdk, body: dict[str, Any], frames: int, fps: int) -> None:
    answer = made(one, prompt="x", size="32x32", **body)
    assert (answer.num_frames, answer.fps) == (frames, fps)  # type: ignore[attr-defined]
    assert float(answer.seconds) == pytest.approx(frames / fps, abs=1e-4)
    assert details(one("videos.download_content", answer.id).content) == (frames, (32, 32), fps)


@pytest.mark.parametrize(
    ("variant", "kind"), [("video", "video/mp4"), ("thumbnail", "WEBP"), ("spritesheet", "JPEG"), (None, "")]
)
def test_variants(sdk: Sdk, video: Video, variant: Any, kind: str) -> None:
    answer = sdk("videos.download_content", video.id, **({} if variant is None else {"variant": variant}))
    content, type = answer.read() if sdk.kind == "sync" else answer.content, answer.response.headers["content-type"]
    if variant in ("video", None):
        assert type == "video/mp4" and details(content) == (17, (64, 48), 8.0)
    else:
        picture = shown(content)
        assert (picture.format, type) == (kind, f"image/{kind.lower()}")
        assert picture.size == ((64, 48) if variant == "thumbnail" else (256, 192))


def test_queries_are_known_and_said_once(server: Running, one: Sdk, video: Video) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown name 'limt' in the query; did you mean 'limit'") as caught:
        list(one("videos.list", extra_query={"limt": 2}))
    assert caught.value.param == "limt"
    with pytest.raises(openai.BadRequestError, match="unknown name 'stream' in the query"):
        one(CREATE, prompt="x", extra_query={"stream": True})
    twice = httpx.get(f"{server.url}/v1/videos/{video.id}/content?variant=video&variant=thumbnail")
    assert (twice.status_code, twice.json()["error"]["message"]) == (400, "variant is given twice")
    for method, path in (("HEAD", f"/v1/videos/{video.id}/content?varient=x"), ("DELETE", f"/v1/videos/{video.id}?force=1")):
        assert httpx.request(method, server.url + path).status_code == 400
    one(RETRIEVE, video.id)


def test_an_unknown_variant(one: Sdk, video: Video) -> None:
    with pytest.raises(openai.BadRequestError, match="thumbnail") as caught:
        one("videos.download_content", video.id, variant="gif")
    assert caught.value.param == "variant"


def test_json_instead_of_a_form(server: Running, one: Sdk) -> None:
    body = {"prompt": "x", "size": "32x32", "nvext": {"seed": 2, "fps": 4, "num_frames": 5}, "user": "me"}
    answer = httpx.post(f"{server.url}/v1/videos", json=body)
    assert answer.status_code == 200 and answer.headers["x-ignored-params"] == "user"
    done = until(one, answer.json()["id"], "completed")
    assert details(one("videos.download_content", done.id).content) == (5, (32, 32), 4.0)


@pytest.mark.parametrize("how", ["bytes", "stream", "named", "url", "fields"])
def test_a_first_picture(sdk: Sdk, how: str) -> None:
    picture = drawn(96, 48)
    given: dict[str, Any] = {
        "bytes": {"input_reference": picture},
        "stream": {"input_reference": io.BytesIO(picture)},
        "named": {"input_reference": ("first.jpg", drawn(96, 48, "JPEG"), "image/jpeg")},
        "url": {"extra_body": {"input_reference": {"image_url": data_url(picture)}}},
        "fields": {"extra_body": {"image_reference": json.dumps({"image_url": data_url(picture)})}},
    }[how]
    done = made(sdk, prompt="x", **given)
    assert (done.status, done.size) == ("completed", "80x32")  # its shape, no larger than the model's own size


def test_a_failed_video(sdk: Sdk) -> None:
    failed = made(sdk, prompt="poison")
    assert failed.status == "failed" and failed.error is not None and failed.completed_at is not None
    assert failed.error.code == "step_failed" and "poison" in failed.error.message
    with pytest.raises(openai.BadRequestError, match="the video is failed") as caught:
        sdk("videos.download_content", failed.id)
    assert caught.value.code == "not_ready"


@pytest.mark.parametrize(
    ("body", "kind", "param", "words"),
    [
        ({"size": "33x32"}, openai.BadRequestError, "width", "multiple of 16"),
        ({"size": "big"}, openai.BadRequestError, "size", "WIDTHxHEIGHT"),
        ({"seconds": "soon"}, openai.BadRequestError, "seconds", "number"),
        ({"seconds": "60"}, openai.BadRequestError, "seconds", "at most 257"),
        ({"seconds": "0"}, openai.BadRequestError, "seconds", "above 0"),
        ({"seconds": "nan"}, openai.BadRequestError, "seconds", "above 0"),
        ({"extra_body": {"num_frames": 18}}, openai.BadRequestError, "num_frames", "17 or 21"),
        ({"extra_body": {"fps": 0}}, openai.BadRequestError, "fps", "between 1 and 240"),
        ({"extra_body": {"fps": 4, "nvext": {"fps": 5}}}, openai.BadRequestError, "fps", "contradicts"),
        ({"extra_body": {"frames": 5}}, openai.BadRequestError, "frames", "unknown"),
        ({"extra_body": {"nvext": "{"}}, openai.BadRequestError, "nvext", "JSON"),
        ({"extra_body": {"cache": "5"}}, openai.BadRequestError, "cache", "cache = '5': must be an object"),
        ({"model": "sora-2"}, openai.NotFoundError, "model", "my-model"),
        ({"input_reference": b"no picture"}, openai.BadRequestError, "input_reference", "input_reference"),
        ({"extra_body": BY_URL}, openai.BadRequestError, "input_reference", "URLs is off"),
        ({"extra_body": BY_URL, "input_reference": drawn()}, openai.BadRequestError, "input_reference", "starts from one"),
        (
            {"extra_body": {**BY_URL, "image_reference": BY_URL["input_reference"]}},
            openai.BadRequestError,
            "input_reference",
            "one",
        ),
        (
            {"extra_body": {"input_reference": {"file_id": "file_1"}}},
            openai.BadRequestError,
            "input_reference.image_url",
            "missing",
        ),
    ],
)
def test_videos_refused(one: Sdk, body: dict[str, Any], kind: type[openai.APIStatusError], param: str, words: str) -> None:
    with pytest.raises(kind) as caught:
        one(CREATE, prompt="x", **body)
    assert caught.value.param == param and words in caught.value.message, caught.value.message
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/v1/videos", "application/json or multipart/form-data"),
        ("/v1/videos/x/remix", "application/json"),
        ("/v1/images/generations", "application/json"),
        ("/v1/images/edits", "multipart/form-data"),
        ("/v1/chat/completions", "application/json"),
    ],
)
def test_bodies_of_another_kind(server: Running, path: str, wanted: str) -> None:
    answer = httpx.post(server.url + path, content='{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (415, f"content-type 'text/plain': send {wanted}")


def test_a_reference_that_is_a_name(server: Running) -> None:
    for name in ("input_reference", "image_reference"):
        body = {"prompt": "x", name: "cat.png"}
        for how in ({"json": body}, {"data": body}, {"files": {key: (None, value) for key, value in body.items()}}):
            error = httpx.post(f"{server.url}/v1/videos", **how).json()["error"]  # type: ignore[arg-type]
            wanted = f"{name} = 'cat.png': must be a picture's file in a form, or an object, {{\"image_url\": URL}}"
            assert (error["param"], error["message"]) == (name, wanted)


def test_pictures_are_not_offered(one: Sdk) -> None:
    with pytest.raises(openai.BadRequestError, match="POST /v1/videos"):
        one("images.generate", prompt="x")


# ------------------------------------------------------------------------------------------------------------------ remix
def test_a_remix(sdk: Sdk) -> None:
    source = made(sdk, prompt="a cat", size="48x32", input_reference=drawn(), extra_body={"seed": 6, "num_frames": 5, "fps": 9})
    answer = sdk("videos.remix", source.id, prompt="a dog")
    assert isinstance(answer, Video) and answer.id != source.id
    assert (answer.remixed_from_video_id, answer.prompt) == (source.id, "a dog")
    done = until(sdk, answer.id, "completed")
    assert (done.size, done.seed, done.remixed_from_video_id) == ("48x32", 6, source.id)  # type: ignore[attr-defined]
    sdk(DELETE, source.id)
    assert details(sdk("videos.download_content", answer.id).content) == (5, (48, 32), 9.0)
    again = sdk("videos.remix", answer.id, prompt="a bird")
    assert until(sdk, again.id, "completed", "failed").status == "completed"


@pytest.mark.parametrize(
    ("id", "body", "param"),
    [(None, {"seconds": "4"}, "seconds"), (None, {"prompt": 5}, "prompt"), ("video_unknown", {}, "id")],
)
def test_remixes_refused(one: Sdk, video: Video, id: str | None, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        one("videos.remix", id or video.id, **{"prompt": "x", "extra_body": body})
    assert (caught.value.status_code, caught.value.param) == (404 if id else 400, param)


# ----------------------------------------------------------------------------------------------------------- while it runs
def test_progress(waiting: Sdk) -> None:
    id = waiting(CREATE, prompt="x", size="32x32", extra_body={"num_inference_steps": 20}).id
    seen: list[tuple[str, int]] = []
    while not seen or seen[-1][0] in ("queued", "in_progress"):
        found = waiting(RETRIEVE, id)
        seen.append((found.status, found.progress))
        time.sleep(0.01)
    percents = [progress for _, progress in seen]
    assert percents == sorted(percents) and seen[-1] == ("completed", 100)
    assert len(set(percents)) > 5 and all(0 <= progress <= 99 for status, progress in seen if status != "completed")
    order = ["queued", "in_progress", "completed"]
    assert [order.index(status) for status, _ in seen] == sorted(order.index(status) for status, _ in seen)


def test_when_to_ask_again(waiting: Sdk) -> None:
    raw = waiting("videos.with_raw_response.create", prompt="x", extra_body={"num_inference_steps": 10})
    assert 500 <= int(raw.headers["openai-poll-after-ms"]) <= 5000
    id = raw.parse().id
    raw = waiting("videos.with_raw_response.retrieve", id)
    assert 500 <= int(raw.headers["openai-poll-after-ms"]) <= 5000
    until(waiting, id, "completed")
    assert "openai-poll-after-ms" not in waiting("videos.with_raw_response.retrieve", id).headers


def test_events(waiting: Sdk) -> None:
    id = waiting(CREATE, prompt="x", size="32x32", extra_body={"num_inference_steps": 20}).id
    kind = Stream[Video] if waiting.kind == "sync" else AsyncStream[Video]
    events = waiting("get", f"/videos/{id}/events", cast_to=Video, stream=True, stream_cls=kind)
    assert {event.id for event in events} == {id} and [event.type for event in events] == [f"video.{e.status}" for e in events]
    assert events[-1].type == "video.completed" and len(events) > 2
    percents = [event.progress for event in events]
    assert percents == sorted(percents) and percents[-1] == 100
    again = waiting("get", f"/videos/{id}/events", cast_to=Video, stream=True, stream_cls=kind)
    assert [event.type for event in again] == ["video.completed"]


def is_idle(server: Running) -> bool:
    health = httpx.get(f"{server.url}/health").json()
    return (health["running"], health["queued"], health["jobs"]) == (0, 0, 0)


def test_deleting_what_runs(slow: Running, waiting: Sdk) -> None:
    id = waiting(CREATE, prompt="x", extra_body=LONG).id
    until(waiting, id, "in_progress")
    with pytest.raises(openai.BadRequestError, match="in_progress"):
        waiting("videos.download_content", id)
    answer = waiting(DELETE, id)
    assert isinstance(answer, VideoDeleteResponse)
    assert (answer.id, answer.deleted, answer.object) == (id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        waiting(RETRIEVE, id)
    eventually(lambda: is_idle(slow), 5)  # 500 steps would take twice as long


def test_events_of_what_is_deleted(slow: Running, waiting: Sdk) -> None:
    id = waiting(CREATE, prompt="x", extra_body=LONG).id
    with httpx.stream("GET", f"{slow.url}/v1/videos/{id}/events") as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("event: video.")
        waiting(DELETE, id)
        rest = [line for line in lines if line.startswith("data:")]
    assert json.loads(rest[-1].removeprefix("data:"))["error"]["code"] == "not_found"


def test_cancelling_in_the_queue(slow: Running, waiting: Sdk) -> None:
    id = waiting(CREATE, prompt="x", extra_body=LONG).id
    assert id in [entry["id"] for entry in httpx.get(f"{slow.url}/v1/queue").json()["data"]]
    assert httpx.delete(f"{slow.url}/v1/queue/{id}").json()["deleted"] is True
    failed = waiting(RETRIEVE, id)
    assert failed.status == "failed" and failed.error is not None and failed.error.code == "cancelled"
    waiting(DELETE, id)


# ------------------------------------------------------------------------------------------------------------------- many
@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The base URL of a server with seven videos, and their ids from the oldest on."""
    with running(fake("video", step_ms=1), tmp_path_factory.mktemp("data")) as served:
        client = Sdk("sync", f"{served.url}/v1")
        ids = [client(CREATE, prompt=str(n), size="32x32", extra_body={"num_frames": 1}).id for n in range(7)]
        yield f"{served.url}/v1", ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 3, 7, 100, None])
@pytest.mark.parametrize("order", ["asc", "desc", None])
def test_all_pages(many: tuple[str, list[str]], kind: Any, limit: Any, order: Any) -> None:
    given = {name: value for name, value in (("limit", limit), ("order", order)) if value is not None}
    url, ids = many
    sdk = Sdk(kind, url)
    found = sdk("videos.list", **given)
    assert {type(item) for item in found} == {Video}
    assert [item.id for item in found] == (ids if order == "asc" else ids[::-1])
    assert len(sdk.sent) == -(-7 // (limit or 20))


@pytest.mark.parametrize("kind", KINDS)
def test_pages_after_one(many: tuple[str, list[str]], kind: Any) -> None:
    url, ids = many
    assert [item.id for item in Sdk(kind, url)("videos.list", after=ids[2], order="asc", limit=2)] == ids[3:]
    assert [item.id for item in Sdk(kind, url)("videos.list", after=ids[2])] == ids[1::-1]
    page = httpx.get(f"{url}/videos", params={"limit": 2, "order": "asc"}).json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[0], ids[1], True)


@pytest.mark.parametrize(
    ("given", "param"),
    [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"limit": "few"}, "limit"), ({"order": "up"}, "order"),
     ({"after": "video_unknown"}, "after")],
)  # fmt: skip
def test_pages_refused(one: Sdk, given: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        one("videos.list", **given)
    assert caught.value.param == param


def test_deleting_a_finished_video(server: Running, sdk: Sdk) -> None:
    done = made(sdk, prompt="x", input_reference=drawn())
    files = list((Path(server.server.options.data_path) / "media").rglob("*.*"))
    assert sdk(DELETE, done.id).deleted
    left = list((Path(server.server.options.data_path) / "media").rglob("*.*"))
    assert len(files) - len(left) == 4  # the video, its two pictures, and the one it began with
    for method in (RETRIEVE, DELETE, "videos.download_content"):
        with pytest.raises(openai.NotFoundError) as caught:
            sdk(method, done.id)
        assert (caught.value.code, caught.value.param) == ("not_found", "id")
    assert done.id not in [item.id for item in sdk("videos.list")]


# --------------------------------------------------------------------------------------------------------------- downloads
@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, None),
        ("bytes=-50", -50, None),
        ("bytes=10-10", 10, 11),
        ("bytes=5-99999999", 5, None),
        ("bytes=-99999999", 0, None),
    ],
)
def test_parts(server: Running, video: Video, asked: str, start: int, stop: int | None) -> None:
    url = f"{server.url}/v1/videos/{video.id}/content"
    whole = httpx.get(url)
    part = httpx.get(url, headers={"range": asked})
    wanted = whole.content[start:stop]
    assert part.content == wanted and part.headers["content-length"] == str(len(wanted))
    assert part.status_code == (200 if wanted == whole.content else 206)
    if part.status_code == 206:
        first = start % len(whole.content)
        assert part.headers["content-range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(whole.content)}"
    assert part.headers["etag"] == whole.headers["etag"] and whole.headers["accept-ranges"] == "bytes"


def test_head_is_get_without_the_content(server: Running, video: Video) -> None:
    for path in ("?variant=video", "?variant=thumbnail", ""):
        url = f"{server.url}/v1/videos/{video.id}/content{path}"
        whole = httpx.get(url)
        for asked in ({}, {"range": "bytes=2-5"}):
            head = httpx.head(url, headers=asked)
            assert (head.status_code, head.content) == (200, b"")
            for name in ("content-length", "content-type", "etag", "accept-ranges", "cache-control"):
                assert head.headers[name] == whole.headers[name]
        assert httpx.head(url, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    for path, status in (("/v1/videos/none/content", 404), ("/livez", 200), ("/readyz", 200), ("/health", 200)):
        head = httpx.head(server.url + path)
        assert (head.status_code, head.content) == (status, b"") and int(head.headers["content-length"]) > 0


def test_parts_that_are_not_there(server: Running, video: Video) -> None:
    url = f"{server.url}/v1/videos/{video.id}/content"
    size = len(httpx.get(url).content)
    for asked in (f"bytes={size}-", "bytes=-0"):
        answer = httpx.get(url, headers={"range": asked})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
    for asked in ("bytes=9-5", "lines=1-2", "bytes=-", "bytes=0-1,4-5", "nonsense"):
        assert httpx.get(url, headers={"range": asked}).status_code == 200


def test_what_the_client_has_is_not_sent(server: Running, video: Video) -> None:
    url = f"{server.url}/v1/videos/{video.id}/content"
    etag = httpx.get(url).headers["etag"]
    for tag, status in ((etag, 304), (f'"x", {etag}', 304), (f"W/{etag}", 304), ("*", 304), ('"other"', 200)):
        assert httpx.get(url, headers={"if-none-match": tag}).status_code == status, tag
    assert httpx.get(url, headers={"range": "bytes=0-9", "if-range": '"other"'}).status_code == 200
    assert httpx.get(url, headers={"range": "bytes=0-9", "if-range": etag}).status_code == 206


# ---------------------------------------------------------------------------------------------------------- said only once
def test_one_key_is_one_job(sdk: Sdk) -> None:
    def ask(key: str = f"key-{time.time_ns()}", **body: Any) -> str:
        answer: Video = sdk(CREATE, **{"prompt": "x", **body}, extra_headers={"Idempotency-Key": key})
        return answer.id

    first = ask(input_reference=drawn())
    assert ask(input_reference=drawn()) == first
    until(sdk, first, "completed")
    assert ask(input_reference=drawn()) == first
    assert ask(f"other-{first}", input_reference=drawn()) != first
    for body in ({"prompt": "y", "input_reference": drawn()}, {}, {"input_reference": drawn(64, 64)}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**body)
        assert (caught.value.code, caught.value.param) == ("idempotency_mismatch", "Idempotency-Key")


def test_a_refused_key_leaves_no_picture(server: Running, one: Sdk) -> None:
    media = Path(server.server.options.data_path) / "media"
    headers = {"Idempotency-Key": "kept"}
    one(CREATE, prompt="x", input_reference=drawn(), extra_headers=headers)
    before = len(list(media.rglob("input-*")))
    one(CREATE, prompt="x", input_reference=drawn(), extra_headers=headers)
    with pytest.raises(openai.BadRequestError):
        one(CREATE, prompt="y", input_reference=drawn(), extra_headers=headers)
    assert len(list(media.rglob("input-*"))) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [{}, {"input_reference": drawn()}])
def test_a_lost_answer_makes_no_second_job(slow: Running, kind: Any, given: dict[str, Any]) -> None:
    sdk = Sdk(kind, f"{slow.url}/v1", lost=1, max_retries=2)
    prompt = f"lost {kind} {len(given)}"
    answer = sdk(CREATE, prompt=prompt, size="32x32", **given)
    assert [request.headers["x-stainless-retry-count"] for request in sdk.sent] == ["0", "1"]
    client = Sdk(kind, f"{slow.url}/v1")
    assert [item.id for item in client("videos.list") if item.prompt == prompt] == [answer.id]
    assert client(CREATE, prompt=prompt, size="32x32", **given).id != answer.id  # not a retry but a second wish


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_queue(kind: Any, tmp_path: Path) -> None:
    limits = EngineOptions(max_queued_samples=1)
    with running(fake("video", step_ms=20), tmp_path, limits) as full:
        sdk = Sdk(kind, f"{full.url}/v1")
        headers = {"Idempotency-Key": "first"}
        id = sdk(CREATE, prompt="x", extra_body=LONG, extra_headers=headers).id
        with pytest.raises(openai.RateLimitError) as caught:
            sdk(CREATE, prompt="y")
        assert caught.value.code == "queue_full" and float(caught.value.response.headers["retry-after-ms"]) > 0
        assert sdk(CREATE, prompt="x", extra_body=LONG, extra_headers=headers).id == id  # asks for no room
        sdk(DELETE, id)
        assert until(sdk, sdk(CREATE, prompt="y").id, "completed")


def test_a_burst_takes_no_more_room_than_there_is(tmp_path: Path) -> None:
    with running(fake("video", step_ms=20), tmp_path, EngineOptions(max_queued_samples=3)) as full:
        body = {"prompt": "x", **LONG}
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: httpx.post(f"{full.url}/v1/videos", json=body), range(20)))
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 17


def test_a_file_that_can_not_be_erased_is_not_called_deleted(tmp_path: Path) -> None:
    with running(fake("video", step_ms=1), tmp_path) as broken:
        sdk = Sdk("sync", f"{broken.url}/v1")
        id = made(sdk, prompt="x").id
        (file,) = (tmp_path / "media").glob("*.mp4")
        file.rename(tmp_path / "aside")
        file.mkdir()
        with pytest.raises(openai.InternalServerError) as caught:
            sdk(DELETE, id)
        assert caught.value.code == "storage_failed" and sdk(RETRIEVE, id).id == id
        file.rmdir()
        (tmp_path / "aside").rename(file)
        assert sdk(DELETE, id).deleted
        assert not file.exists() and sdk("videos.list") == []


def test_deleting_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(fake("video", step_ms=1), tmp_path) as slow_disk:
        sdk = Sdk("sync", f"{slow_disk.url}/v1")
        put, writing = slow_disk.server.files._storage.put, threading.Event()

        def slowly(key: str, content: bytes) -> None:
            writing.set()
            time.sleep(0.3)
            put(key, content)

        monkeypatch.setattr(slow_disk.server.files._storage, "put", slowly)
        id = sdk(CREATE, prompt="x").id
        assert writing.wait(10)
        assert sdk(DELETE, id).deleted
        time.sleep(0.5)
        assert list((tmp_path / "media").iterdir()) == []


def test_a_job_ends_although_its_store_failed_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell.serve.jobs.BUSY_S", 0.05)
    with running(fake("video", step_ms=20), tmp_path) as busy, closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as other:
        sdk = Sdk("sync", f"{busy.url}/v1")
        id = sdk(CREATE, prompt="x", extra_body={"num_inference_steps": 20}).id
        until(sdk, id, "in_progress")
        other.execute("BEGIN IMMEDIATE")
        time.sleep(1.5)  # the video is made meanwhile
        assert sdk(RETRIEVE, id).status == "in_progress"
        other.rollback()
        error = until(sdk, id, "failed").error
        assert error is not None and error.code == "store_failed"


# ------------------------------------------------------------------------------------------------------------------- keys
@pytest.mark.parametrize("kind", KINDS)
def test_keys_see_their_own(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("red\ngreen\n")
    with running(fake("video"), tmp_path / "data", api_key_file=str(tmp_path / "keys")) as keyed:
        red, green, blue = (Sdk(kind, f"{keyed.url}/v1", api_key=key) for key in ("red", "green", "blue"))
        with pytest.raises(openai.AuthenticationError):
            blue(CREATE, prompt="x")
        mine = made(red, prompt="x")
        with pytest.raises(openai.BadRequestError, match="no such"):
            green("videos.list", after=mine.id)
        for method, more in ((RETRIEVE, {}), (DELETE, {}), ("videos.download_content", {}), ("videos.remix", {"prompt": "y"})):
            with pytest.raises(openai.NotFoundError):
                green(method, mine.id, **more)
        assert green("videos.list") == []
        headers = {"Idempotency-Key": "same"}
        ids = [client(CREATE, prompt="x", extra_headers=headers).id for client in (red, green, red, green)]
        assert ids[:2] == ids[2:] and ids[0] != ids[1]
        assert [item.id for item in red("videos.list")] == [ids[0], mine.id]
        assert [item.id for item in green("videos.list")] == [ids[1]]


def test_a_base_url_without_v1(server: Running) -> None:
    for method, given in ((CREATE, {"prompt": "x"}), ("videos.list", {})):
        with pytest.raises(openai.NotFoundError, match="base_url must end in /v1"):
            Sdk("sync", server.url)(method, **given)
