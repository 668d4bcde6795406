"""The OpenAPI document: it says all that the server does, and nothing else."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema_rs
import pytest
import schemathesis
from PIL import Image

from stepwell.config.schema import EngineOptions
from stepwell.engine.api import Engine
from stepwell.generator import open_engine
from stepwell.serve.docs import FORM, JSON
from tests.support.llada2 import text_repository
from tests.support.server import Running, fake, running

Kind = Literal["image", "video", "text"]
KEY = {"Authorization": "Bearer secret"}
OF_KIND = {
    "image": "^/v1/(images|models)",
    "text": "^/v1/(chat|completions)",
    "video": "^/(?!v1/sleep)",
}  # who sleeps refuses
OWN = {"image": ("/v1/images",), "video": ("/v1/videos",), "text": ("/v1/chat", "/v1/completions")}
# data that fits the document may still be refused: sizes, lengths and the like are limits of the model that is served
UNCHECKED = "positive_data_acceptance"


def engine_of(kind: Kind, folder: Path) -> Engine:
    if kind != "text":
        return fake(kind, step_ms=0)
    path = text_repository(folder / "model", {"max_position_embeddings": 80, "num_hidden_layers": 2})
    (path / "quick.yaml").write_text("threshold: 0.0")  # fills a block at once: what is asked here is not how it writes
    return open_engine(EngineOptions(model_path=str(path), threads=1, dllm_algorithm_config=str(path / "quick.yaml")))


@pytest.fixture(scope="module", params=["image", "video", "text"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kind, Running]]:
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    options = {"api_key": "secret", "served_model_name": "m/n", "max_upload_mb": 1}
    with running(engine_of(kind, folder), folder, **options) as made:
        yield kind, made


@pytest.fixture(scope="module")
def document(server: tuple[Kind, Running]) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server[1].url}/openapi.json", headers=KEY).json()
    return found


def closed(node: Any) -> Any:
    """A schema in which every object has the properties it names and no others."""
    if isinstance(node, dict):
        inner = {key: closed(value) for key, value in node.items()}
        return {**inner, "additionalProperties": False} if isinstance(node.get("properties"), dict) else inner
    return [closed(item) for item in node] if isinstance(node, list) else node


class Conversation:
    """Requests whose answers are held against a document; `reached` are the statuses of each operation that came."""

    def __init__(self, url: str, document: dict[str, Any]):
        self.client = httpx.Client(base_url=url, headers=KEY, timeout=20)
        self.document = document
        self.reached: set[tuple[str, str, int]] = set()

    def __call__(self, method: str, path: str, wanted: int = 200, at: str = "", **options: Any) -> httpx.Response:
        """Ask for `path`, which has its parameters replaced by `at` or, without it, none."""
        answer = self.client.request(method, re.sub(r"\{\w+\}", at, path), **options)
        assert answer.status_code == wanted, answer.text
        self.reached.add((method, path, wanted))
        described = self.document["paths"][path][method.lower()]["responses"][str(wanted)]
        for name, header in described["headers"].items():
            assert name in answer.headers and (header["schema"]["type"] == "string" or answer.headers[name].isdigit())
        kind = answer.headers.get("content-type", "").split(";")[0]
        assert kind in described.get("content", {"": None})
        if kind == JSON:
            schema = {**described["content"][kind]["schema"], "components": self.document["components"]}
            jsonschema_rs.validator_for(closed(schema)).validate(answer.json())
        return answer

    def refused(self, method: str, path: str, status: int, at: str = "", **options: Any) -> None:
        error = self(method, path, status, at, **options).json()["error"]
        assert error["message"] and error["code"] and error["type"].endswith("_error")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(buffer, "PNG")
    return buffer.getvalue()


def common(ask: Conversation) -> None:
    for path in ("/livez", "/readyz", "/health", "/metrics", "/v1/queue", "/models", "/v1/models"):
        ask("GET", path)
        ask.refused("GET", path, 400, params={"verbose": "1"})
        if path != "/livez":
            ask.refused("GET", path, 401, headers={"Authorization": "Bearer wrong"})
            ask.refused("GET", path, 403, headers={"Origin": "https://elsewhere.example"})
    ask("GET", "/v1/models/{name}", at="m/n")
    ask.refused("GET", "/v1/models/{name}", 404, at="other")
    ask.refused("DELETE", "/v1/queue/{request_id}", 404, at="other")
    ask.refused("POST", "/v1/sleep", 400, json={"mode": "deep"})
    ask.refused("POST", "/v1/sleep", 413, content=bytes(5 * 2**20), headers={"Content-Type": JSON})
    ask.refused("POST", "/v1/sleep", 415, content=b"abort", headers={"Content-Type": "text/plain"})
    for options in ({}, {"json": {}}, {"json": {"mode": "abort"}}):
        assert ask("POST", "/v1/sleep", **options).json()["state"] == "asleep"
    assert ask("GET", "/health").json()["status"] == "asleep"
    ask.refused("GET", "/readyz", 503)
    assert ask("POST", "/v1/wake").json()["state"] == "awake"


def of_files(ask: Conversation, path: str, at: str, **options: Any) -> None:
    """Whole, in part, not at all, and what can't be."""
    whole = ask("GET", path, at=at, **options)
    tag = whole.headers["etag"]
    part = ask("GET", path, 206, at, headers={"Range": "bytes=2-5", "If-Range": tag}, **options)
    assert part.content == whole.content[2:6]
    ask("GET", path, 304, at, headers={"If-None-Match": tag}, **options)
    ask("GET", path, 416, at, headers={"Range": "bytes=99999999-"}, **options)
    ask.refused("GET", path, 404, at="other")


def of_images(ask: Conversation) -> None:
    path = "/v1/images/generations"
    ask("POST", path, json={"prompt": "x", "n": 2})
    for format in ("png", "jpeg", "webp"):
        answer = ask("POST", path, json={"prompt": "x", "response_format": "url", "output_format": format})
        image_id = answer.json()["data"][0]["url"].split("/")[3]
        of_files(ask, "/v1/images/{image_id}/content", image_id)
    streamed = ask("POST", path, json={"prompt": "x", "stream": True, "partial_images": 1, "progress_events": True})
    assert "event: image_generation.completed\ndata: {" in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
    ask("POST", "/v1/images/edits", data={"prompt": "x"}, files={"image": png()})
    ask("POST", "/v1/images/edits", data={"prompt": "x", "stream": "true"}, files={"image[]": png()})
    ask.refused("POST", path, 400, json={})
    ask.refused("POST", path, 413, content=bytes(5 * 2**20))
    ask.refused("POST", "/v1/images/edits", 400, data={"prompt": "x"})
    ask.refused("POST", "/v1/images/edits", 413, data={"prompt": "x"}, files={"image": bytes(2 * 2**20)})
    for route, other in ((path, FORM), ("/v1/images/edits", JSON)):
        for kind in ("text/xml", other):
            ask.refused("POST", route, 415, content=b"<x/>", headers={"Content-Type": kind})
    ask.refused("POST", "/v1/images/generations", 404, json={"prompt": "x", "model": "other"})


def of_videos(ask: Conversation) -> None:
    body = {"prompt": "x", "num_frames": 5}
    video = ask("POST", "/v1/videos", json=body, headers={"Idempotency-Key": "one"}).json()
    ask.refused("POST", "/v1/videos", 400, json={"prompt": "y"}, headers={"Idempotency-Key": "one"})
    for prompt in "xy":  # an empty key is none
        ask("POST", "/v1/videos", json={**body, "prompt": prompt}, headers={"Idempotency-Key": ""})
    ask("POST", "/v1/videos", data={"prompt": "x"}, files={"input_reference": png()})
    failed = ask("POST", "/v1/videos", json={**body, "prompt": "poison"}).json()
    endless = ask("POST", "/v1/videos", json={**body, "num_inference_steps": 1000}).json()
    ask.refused("GET", "/v1/videos/{video_id}/content", 400, at=endless["id"])
    ask("GET", "/v1/queue")
    ask("DELETE", "/v1/queue/{request_id}", at=endless["id"])
    for made in (video, failed):
        path = "/v1/videos/{video_id}"
        while (found := ask("GET", path, at=made["id"]).json())["status"] in ("queued", "in_progress"):
            time.sleep(0.02)
        events = ask("GET", f"{path}/events", at=made["id"]).text
        assert f"event: video.{found['status']}\ndata: {{" in events
    for variant in ("video", "thumbnail", "spritesheet"):
        of_files(ask, "/v1/videos/{video_id}/content", video["id"], params={"variant": variant})
    ask("POST", "/v1/videos/{video_id}/remix", at=video["id"], json={"prompt": "y"})
    ask.refused("POST", "/v1/videos/{video_id}/remix", 404, at="other", json={"prompt": "y"})
    assert ask("GET", "/v1/videos", params={"limit": 1, "order": "asc"}).json()["has_more"]
    for query in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "video_none"}):
        ask.refused("GET", "/v1/videos", 400, params=query)
    ask("DELETE", "/v1/videos/{video_id}", at=video["id"])
    for below in ("", "/content", "/events"):
        ask.refused("GET", "/v1/videos/{video_id}" + below, 404, at=video["id"])
    ask.refused("POST", "/v1/videos", 415, content=b"<x/>", headers={"Content-Type": "text/xml"})


def of_texts(ask: Conversation) -> None:
    """Calls of tools are left to the tests of a scripted engine."""
    chat, prompts = "/v1/chat/completions", "/v1/completions"
    hello = {"messages": [{"role": "user", "content": ""}], "max_tokens": 2}
    ask("POST", chat, json={**hello, "n": 2, "logprobs": True, "top_logprobs": 2})
    ask("POST", prompts, json={"prompt": ["x", "y"], "n": 2, "logprobs": 2, "max_tokens": 9})
    ask("POST", prompts, json={"prompt": [5, 6], "max_tokens": 0})
    for path, body in ((chat, hello), (prompts, {"prompt": "x", "max_tokens": 2, "echo": True})):
        streamed = ask("POST", path, json={**body, "stream": True, "diffusing": True, "stream_options": {"include_usage": True}})
        assert '"usage": {' in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
        ask.refused("POST", path, 400, json={})
        ask.refused("POST", path, 404, json={**body, "model": "other"})
        ask.refused("POST", path, 413, content=bytes(5 * 2**20))
        ask.refused("POST", path, 415, content=b"<x/>", headers={"Content-Type": "text/xml"})


def test_every_answer_is_described_and_every_description_answered(server: tuple[Kind, Running], document: dict[str, Any]) -> None:
    kind, made = server
    ask = Conversation(made.url, document)
    common(ask)
    {"image": of_images, "video": of_videos, "text": of_texts}[kind](ask)
    good = {
        (method.upper(), path, int(status))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for status in operation["responses"]
        if int(status) < 400 or status == "416"
    }
    others = tuple(path for other, paths in OWN.items() if other != kind for path in paths)
    missed = {(method, path, status) for method, path, status in good - ask.reached if not path.startswith(others)}
    assert not missed if kind == "video" else missed <= {("DELETE", "/v1/queue/{request_id}", 200)}


def test_what_holds_for_every_operation(document: dict[str, Any]) -> None:
    assert document["components"]["securitySchemes"] == {"bearerAuth": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"bearerAuth": []}]
    schemathesis.openapi.from_dict(document).validate()
    names = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(names) == len(set(names)) == 23
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            if path == "/livez":
                assert operation["security"] == [] and list(responses) == ["200", "400"]
                continue
            assert {"200", "400", "401", "403", "500", "503"} <= set(responses) and "422" not in responses
            for status, response in responses.items():
                if int(status) >= 400 and status != "416":
                    assert response["content"] == {JSON: {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
                elif status not in ("304", "416"):
                    assert all(media["schema"] for media in response["content"].values())
            assert (method == "post") == ("requestBody" in operation) == ("415" in responses)
            assert ("{" in path) <= ("404" in responses)


def test_bodies(document: dict[str, Any]) -> None:
    def body(path: str) -> dict[str, Any]:
        found = document["paths"][path]["post"]["requestBody"]
        assert found["required"] is True
        return {kind: media["schema"] for kind, media in found["content"].items()}

    assert list(body("/v1/images/generations")) == [JSON] and list(body("/v1/images/edits")) == [FORM]
    assert list(body("/v1/videos")) == [FORM, JSON] and list(body("/v1/videos/{video_id}/remix")) == [JSON]
    binary = {"type": "string", "format": "binary"}
    edit = body("/v1/images/edits")[FORM]["properties"]
    assert edit["image"] == edit["image[]"] == body("/v1/videos")[FORM]["properties"]["input_reference"] == binary
    for schemas in map(body, ("/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/videos/{video_id}/remix")):
        for schema in schemas.values():
            assert schema["additionalProperties"] is False and "$ref" not in json.dumps(schema)
            assert schema["required"] == ["prompt"]
    for path, needed in (("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")):
        assert list(body(path)) == [JSON]
        (schema,) = body(path).values()
        assert schema["additionalProperties"] is False and "$ref" not in json.dumps(schema)
        assert schema["required"] == [needed] and schema["properties"]["diffusion"]["anyOf"][0]["additionalProperties"] is False


def test_without_keys_none_is_asked_for(tmp_path: Path) -> None:
    with running(fake(), tmp_path) as made:
        document = httpx.get(f"{made.url}/openapi.json").json()
    assert "security" not in document and "bearerAuth" in document["components"]["securitySchemes"]


# ------------------------------------------------------------------------------------------------------------------ random
def hold_against_its_document(kind: Kind, url: str, folder: Path, examples: int, seed: int) -> int:
    """Let schemathesis ask what fits the document and what does not, alone and in sequences; the number of its requests."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    options = {
        "--header": f"Authorization: {KEY['Authorization']}",
        "--exclude-checks": UNCHECKED,
        "--max-examples": str(examples),
        "--include-path-regex": OF_KIND[kind],
        "--generation-database": "none",
        "--seed": str(seed),
    }
    result = subprocess.run(
        [*command, *(part for option in options.items() for part in option)], cwd=folder, capture_output=True, text=True
    )
    found = re.search(r"(\d+) generated, (\d+) passed", result.stdout)
    assert result.returncode == 0 and found is not None, result.stdout[-8000:] + result.stderr[-2000:]
    assert found[1] == found[2]
    return int(found[1])


def test_random_requests(server: tuple[Kind, Running], tmp_path: Path) -> None:
    kind, made = server
    assert hold_against_its_document(kind, made.url, tmp_path, 3, 1) > {"image": 300, "video": 700, "text": 200}[kind]
    assert httpx.get(f"{made.url}/readyz", headers=KEY).status_code == 200


@pytest.mark.long
def test_many_random_requests(server: tuple[Kind, Running], tmp_path: Path) -> None:
    kind, made = server
    count = hold_against_its_document(kind, made.url, tmp_path, 300, int(time.time()))
    print(f"{count} requests to the server of the {kind} model")
    assert count >= 1000
    assert httpx.get(f"{made.url}/readyz", headers=KEY).status_code == 200
