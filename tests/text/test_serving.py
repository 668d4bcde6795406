"""A server of texts under load and in trouble: nothing hangs, nobody's text depends on others, whoever leaves is forgotten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from stepwell.config.schema import EngineOptions
from stepwell.engine.remote import RemoteEngine
from stepwell.generator import open_engine
from tests.support.answers import check_refusal
from tests.support.llada2 import TINY, dense_logits, random_tensors, text_repository, write_model, write_tokenizer
from tests.support.sdk import Sdk, eventually, shown
from tests.support.server import Running, running

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
SLOW = {"ignore_eos": True, "diffusion": {"threshold": 1.0}}  # a token a forward


def load(writer: Running) -> tuple[int, int]:
    health = httpx.get(f"{writer.url}/health").json()
    return health["running"], health["queued"]


def metric(running: Running, name: str) -> float:
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{running.url}/metrics").text.splitlines())
    return float(lines.get(name, 0))


# ------------------------------------------------------------------------------------------------------------ many at once
def test_64_streams_at_once_are_each_what_they_are_alone(writer: Running) -> None:
    """Prompts of all lengths, some sampled, some greedy; some end in mid-block."""
    bodies = [
        {
            "prompt": "the same beginning for many, " * (place % 3) + "x" * (place % 11),
            "max_tokens": 4 + place % 9,
            "temperature": float(place % 2),
            "seed": place,
            "extra_body": {"ignore_eos": True, "diffusion": {"threshold": (0.0, 0.05)[place % 2]}},
        }
        for place in range(64)
    ]

    async def stream(client: AsyncOpenAI, body: dict[str, Any]) -> str:
        events = await client.completions.create(model="writer", stream=True, **body)
        return "".join([event.choices[0].text async for event in events])

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(api_key="any", base_url=f"{writer.url}/v1", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(stream(client, body) for body in bodies))

    together = asyncio.run(all_at_once())
    with OpenAI(api_key="any", base_url=f"{writer.url}/v1", max_retries=0) as client:
        alone = [client.completions.create(model="writer", **body).choices[0].text for body in bodies]  # type: ignore[call-overload]
    assert together == alone and len(set(alone)) > 32
    assert load(writer) == (0, 0)


# --------------------------------------------------------------------------------------------------------- who leaves early
def test_hanging_up_in_mid_block_frees_everything(writer: Running) -> None:
    before = metric(writer, "stepwell_aborts_total")
    for count in (1, 3):
        body = {"prompt": ["x", "y"], "n": count, "stream": True, "max_tokens": 900, **SLOW}
        with httpx.stream("POST", f"{writer.url}{COMPLETE}", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert load(writer)[0] == 2 * count
        eventually(lambda: load(writer) == (0, 0) and metric(writer, "stepwell_held_samples") == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{writer.url}{CHAT}", json={"messages": [{"role": "user", "content": "x"}], **SLOW}, timeout=0.1)
    eventually(lambda: load(writer) == (0, 0))
    assert metric(writer, "stepwell_aborts_total") >= before + 4


def test_a_text_is_cancelled_by_its_id(writer: Running) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 900, **SLOW}
    with httpx.stream("POST", f"{writer.url}{CHAT}", json=body) as answer:
        lines = answer.iter_lines()
        id = json.loads(next(lines).removeprefix("data: "))["id"]
        (entry,) = httpx.get(f"{writer.url}/v1/queue").json()["data"]
        assert entry["id"] == id and entry["status"] == "in_progress"
        assert httpx.delete(f"{writer.url}/v1/queue/{id}").json()["deleted"]
        *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "aborted"


# ------------------------------------------------------------------------------------------------------------- odd models
def test_a_model_that_predicts_only_masks_ends_without_one(tmp_path: Path) -> None:
    config = {**TINY, "vocab_size": 272, "block_size": 8}
    tensors = random_tensors(config)
    mask = 1
    tensors["model.word_embeddings.weight"][:, 0] = 60.0  # of every token, so that the head can rely on it
    tensors["lm_head.weight"][mask, 0] = 60.0
    best = dense_logits(tensors, config, [mask] * 16, 8).argmax(-1)
    assert set(best.tolist()) == {mask}
    path = write_model(tmp_path / "model", config, tensors)
    write_tokenizer(path)
    options = EngineOptions(model_path=str(path), threads=1)
    with running(open_engine(options), tmp_path, options, served_model_name="masks") as server:
        for algorithm in ("LowConfidence", "JointThreshold", "Credit", "Hierarchy"):
            body = {"prompt": "x", "max_tokens": 20, "ignore_eos": True, "diffusion": {"algorithm": algorithm}, "logprobs": 1}
            answer = httpx.post(f"{server.url}{COMPLETE}", json=body, timeout=30).json()
            assert answer["usage"]["completion_tokens"] == 20
            (choice,) = answer["choices"]
            assert "mask" not in choice["text"] and len(choice["logprobs"]["tokens"]) == 20
            assert all(torch.isfinite(torch.tensor(choice["logprobs"]["token_logprobs"])))


def test_a_pool_that_holds_little_more_than_one_text_serves_several(tmp_path: Path) -> None:
    """Ten pages; each text needs nine of its own, so whoever does not go first loses what it had and computes it again."""
    changes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "rotary_dim": 32, "num_hidden_layers": 4}
    path = text_repository(tmp_path / "model", changes)
    options = EngineOptions(model_path=str(path), threads=1, kv_cache_mb=1)
    with running(open_engine(options), tmp_path, options, served_model_name="small") as server:
        card = httpx.get(f"{server.url}/v1/models/small").json()
        assert card["text"]["context"] <= 80

        def body(place: int, **more: Any) -> dict[str, Any]:
            filled = {"ignore_eos": True, "diffusion": {"threshold": 0.0}, "max_tokens": 24}
            return {"prompt": chr(97 + place) * (card["text"]["context"] - 32), **filled, **more}

        async def all_at_once() -> list[str]:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                answers = await asyncio.gather(*(client.post(COMPLETE, json=body(place)) for place in range(6)))
                return [answer.json()["choices"][0]["text"] for answer in answers]

        together = asyncio.run(all_at_once())
        assert together == [httpx.post(f"{server.url}{COMPLETE}", json=body(p)).json()["choices"][0]["text"] for p in range(6)]
        for stream in (False, True):
            answer = httpx.post(f"{server.url}{COMPLETE}", json=body(0, prompt="x" * 100, stream=stream))
            assert "the model's context holds" in check_refusal(answer, 400, param="prompt")["message"]
            answer = httpx.post(f"{server.url}{COMPLETE}", json=body(0, max_tokens=40, stream=stream))
            assert "at most 32 would do" in check_refusal(answer, 400, param="max_tokens")["message"]


# ---------------------------------------------------------------------------------------------------- beside other models
@pytest.fixture(scope="module")
def mixed(flux_dev: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A picture model and two writers."""
    texts = [text_repository(tmp_path_factory.mktemp(name), seed=seed) for seed, name in enumerate(("one", "two"))]
    options = EngineOptions(model_path=[str(flux_dev), *map(str, texts)], threads=1)
    names = ["painter", "one", "two"]
    with running(open_engine(options), tmp_path_factory.mktemp("mixed"), options, served_model_name=names) as made:
        yield made


def test_each_model_does_its_own(mixed: Running) -> None:
    sdk = Sdk("sync", f"{mixed.url}/v1")
    picture = sdk("images.generate", prompt="x", size="32x32", extra_body={"num_inference_steps": 1, "max_sequence_length": 64})
    assert shown(picture.data[0].b64_json).size == (32, 32)
    made = {name: sdk("completions.create", model=name, prompt="hello", max_tokens=16) for name in ("one", "two")}
    assert [made[name].model for name in ("one", "two")] == ["one", "two"]
    assert made["one"].choices[0].text != made["two"].choices[0].text
    assert made["one"].system_fingerprint != made["two"].system_fingerprint
    unnamed = httpx.post(f"{mixed.url}{COMPLETE}", json={"prompt": "hello", "max_tokens": 16}).json()
    assert unnamed["model"] == "one" and unnamed["choices"][0]["text"] == made["one"].choices[0].text
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "x"}]}), (COMPLETE, {"prompt": "x"})):
        answer = httpx.post(f"{mixed.url}{path}", json={**body, "model": "painter"})
        error = check_refusal(answer, 400, param="model")
        assert error["message"] == "'painter' makes pictures; use POST /v1/images/generations"
    assert metric(mixed, 'stepwell_step_seconds_count{model="two",stage="denoise"}') > 0
    assert metric(mixed, 'stepwell_text_tokens_total{kind="completion",model="one"}') == 32
    assert metric(mixed, 'stepwell_text_forwards_total{model="two"}') > 0


def test_what_is_told_of_them(mixed: Running) -> None:
    listed = httpx.get(f"{mixed.url}/v1/models").json()["data"]
    assert [(card["id"], card["task_type"]) for card in listed] == [("painter", "T2I"), ("one", "T2T"), ("two", "T2T")]
    assert [card["text"] and card["text"]["context"] for card in listed] == [None, 256, 256]
    assert [model["task_type"] for model in httpx.get(f"{mixed.url}/models").json()["models"]] == ["T2I", "T2T", "T2T"]


def test_sleep_and_wake(mixed: Running) -> None:
    body = {"prompt": "hello", "max_tokens": 8}
    before = httpx.post(f"{mixed.url}{COMPLETE}", json=body).json()["choices"][0]["text"]
    assert httpx.post(f"{mixed.url}/v1/sleep", timeout=30).json()["state"] == "asleep"
    answer = httpx.post(f"{mixed.url}{COMPLETE}", json=body)
    assert check_refusal(answer, 503)["code"] == "asleep"
    assert httpx.post(f"{mixed.url}/v1/wake", timeout=60).json()["state"] == "awake"
    assert httpx.post(f"{mixed.url}{COMPLETE}", json=body).json()["choices"][0]["text"] == before


def test_a_stream_goes_on_where_the_process_was_killed(tmp_path: Path) -> None:
    """The text is made again from its seed; what was sent before is not sent again."""
    options = EngineOptions(model_path=str(text_repository(tmp_path / "model")), threads=1)
    body = {"prompt": "hello", "max_tokens": 100, "temperature": 1.0, "seed": 4, **SLOW}
    engine, text, is_killed = RemoteEngine(options), "", False
    with running(engine, tmp_path, options, served_model_name="writer") as server:
        with httpx.stream("POST", f"{server.url}{COMPLETE}", json={**body, "stream": True}, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if len(text) > 20 and not is_killed and engine._child is not None:
                    engine._child.process.kill()
                    is_killed = True
        whole = httpx.post(f"{server.url}{COMPLETE}", json=body, timeout=30).json()["choices"][0]["text"]
    assert is_killed and text == whole and engine.restarts == 1
