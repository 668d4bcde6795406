"""Text through Dynamo's frontend, which has the tokenizer from the worker and does not see its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks.cluster import Cluster
from stepwell import DiffGenerator
from tests.spec_commands import CLI, TEXT
from tests.support.dynamo import LLADA, Deployment, needs_dynamo

pytestmark = needs_dynamo
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def engine(dynamo: Deployment) -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained(str(dynamo.text), threads=1) as made:
        yield made


def asks(**more: Any) -> dict[str, Any]:
    return {"model": LLADA, "messages": [{"role": "user", "content": "Hello! How are you?"}], **more}


def test_words_are_those_of_the_engine(dynamo: Deployment, engine: DiffGenerator) -> None:
    answer = dynamo.post(CHAT, asks(max_tokens=24, seed=3, temperature=0.7)).json()
    wanted = engine.generate(messages=asks()["messages"], max_tokens=24, seed=3, temperature=0.7)[0]
    assert answer["choices"][0]["message"]["content"] == wanted.text
    assert answer["choices"][0]["finish_reason"] == wanted.finish_reason
    assert answer["usage"]["completion_tokens"] == wanted.usage.completion_tokens
    assert answer["usage"]["prompt_tokens"] == wanted.usage.prompt_tokens


def test_a_stream_says_the_same(dynamo: Deployment) -> None:
    body = {"model": LLADA, "prompt": "Once upon a time", "max_tokens": 24}
    whole = dynamo.post(COMPLETIONS, body).json()
    lines = dynamo.post(COMPLETIONS, {**body, "stream": True}).text.split("\n\n")
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(piece["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert len(pieces) > 3 and pieces[-1]["finish_reason"] == "length"


def test_several_texts_and_what_they_were_chosen_by(dynamo: Deployment) -> None:
    answer = dynamo.post(CHAT, asks(max_tokens=6, n=2, seed=1, temperature=1, logprobs=True, top_logprobs=3)).json()
    first, second = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert first["message"]["content"] != second["message"]["content"]
    tokens = first["logprobs"]["content"]
    assert len(tokens) == 6 and all(token["logprob"] <= 0 and len(token["top_logprobs"]) >= 3 for token in tokens)
    assert answer["usage"]["completion_tokens"] == 12


def test_an_annotation_chooses_how_blocks_are_filled(dynamo: Deployment, engine: DiffGenerator) -> None:
    body = asks(max_tokens=16, nvext={"annotations": ["dllm_algorithm:Credit", "dllm_threshold:0.99", "llm_metrics"]})
    words = dynamo.post(CHAT, body).json()["choices"][0]["message"]["content"]
    diffusion = {"algorithm": "Credit", "threshold": 0.99}
    assert words == engine.generate(messages=asks()["messages"], max_tokens=16, diffusion=diffusion)[0].text


def test_a_schema_is_kept_to(dynamo: Deployment) -> None:
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
    form = {"type": "json_schema", "json_schema": {"name": "picture", "schema": schema}}
    for choice in dynamo.post(CHAT, asks(max_tokens=60, response_format=form, n=2)).json()["choices"]:
        assert json.loads(choice["message"]["content"])["color"] in ("red", "blue")


def test_several_texts_say_why_they_ended(dynamo: Deployment) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["red", "blue", "green"]}}}
    body = asks(max_tokens=60, response_format=form, n=4, seed=1, temperature=2)
    answer = dynamo.post(CHAT, body).json()
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 4
    assert len({choice["message"]["content"] for choice in choices}) > 1
    assert "cached_tokens" in answer["usage"]["prompt_tokens_details"]  # which only the worker knows, and tells last
    lines = dynamo.post(CHAT, {**body, "stream": True}).text.split("\n\n")
    pieces = [json.loads(line.removeprefix("data: "))["choices"] for line in lines if line.startswith("data: {")]
    ended = [piece["index"] for choices in pieces for piece in choices if piece["finish_reason"] == "stop"]
    assert sorted(ended) == [0, 1, 2, 3]


@pytest.mark.parametrize(("body", "message"), [
    ({"guided_regex": "a+"}, "texts are guided by a JSON schema only"),
    ({"max_tokens": 2000}, "max_tokens = 2000"),
    ({"max_tokens": 1020}, "the context holds 1024"),
    ({"messages": [{"role": "user", "content": "x" * 2000}]}, "the model's context holds 1024"),
    ({"top_k": 5}, "top_k = 5: not for text models"),
    ({"stop_token_ids": [5]}, "stop_token_ids = [5]: not for text models"),
    ({"nvext": {"annotations": ["seed"]}}, "annotations: 'seed' says nothing of a text; write 'dllm_parameter:value'"),
    ({"nvext": {"annotations": ["llm_metrics", "dllm_threshold"]}}, "annotations: 'dllm_threshold' says nothing of a text"),
    ({"nvext": {"annotations": ["seed:5"]}}, "annotations: 'seed:5' says nothing of a text"),
    ({"nvext": {"annotations": ["dllm_stpes:5"]}}, "stpes: unknown; there are algorithm"),
])  # fmt: skip
def test_what_is_wrong_is_told(dynamo: Deployment, body: dict[str, Any], message: str) -> None:
    assert message in dynamo.refused(CHAT, asks(**body))


def test_the_end_is_where_a_stop_string_is(dynamo: Deployment) -> None:
    body = {"model": LLADA, "prompt": "Once upon a time", "max_tokens": 24}
    whole = dynamo.post(COMPLETIONS, body).json()["choices"][0]["text"]
    answer = dynamo.post(COMPLETIONS, {**body, "stop": [whole[8:10]]}).json()["choices"][0]
    assert answer["text"] == whole[: whole.index(whole[8:10])] and answer["finish_reason"] == "stop"


def test_the_documents_own_line_but_for_the_kernel_of_gpus(dynamo: Deployment, engine: DiffGenerator) -> None:
    """Two processes, each with a part of the weights."""
    line = next(row.arguments[1:] for row in CLI if row.document == TEXT)
    kernel = line.index("--attention-backend")
    del line[kernel : kernel + 2]
    line[line.index(LLADA)] = str(dynamo.text)
    with Cluster(env={"OMP_NUM_THREADS": "1"}) as cluster:
        worker = cluster.worker(*line, "--served-model-name", LLADA, "--threads", "1", DYN_SELF_HOST_METADATA="1")
        url = cluster.frontend()
        cluster.wait_for(url, LLADA)
        answer = httpx.post(f"{url}{CHAT}", json=asks(max_tokens=24, seed=3, temperature=0.7), timeout=120, trust_env=False)
        wanted = engine.generate(messages=asks()["messages"], max_tokens=24, seed=3, temperature=0.7)[0]
        assert answer.json()["choices"][0]["message"]["content"] == wanted.text
        assert worker.stop() == 0
