"""Calls of tools through Dynamo's frontend: those it asks for by a schema, and those that a model makes by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.cluster import Cluster
from tests.support.dynamo import QUICK, TEMPLATE, needs_dynamo

pytestmark = needs_dynamo
MODEL = "模型"  # none of its letters is one that Dynamo has room for in an endpoint
OTHER = "图像"
BUNDLED = Path("src/stepwell/zoo/tiny-llada")
CALL = '<tool_call>\n{"name": "draw", "arguments": {"color": "red"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
TOOLS = [{"type": "function", "function": {"name": "draw", "parameters": PARAMETERS}}]


def caller(folder: Path) -> Path:
    """The bundled model, which answers "Hello! I am well, thank you."; here the token for "I" is the text of a call."""
    shutil.copytree(BUNDLED, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    letters = bytes_to_unicode()
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["".join(letters[byte] for byte in CALL.encode())] = vocabulary.pop("I")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    system = "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    config["chat_template"] = "{# calls are <tool_call>…</tool_call> #}" + system + TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model that calls a tool, and one for pictures; both have names of the same length in letters beyond ASCII."""
    model = caller(tmp_path_factory.mktemp("models") / "caller")
    with Cluster(env={"OMP_NUM_THREADS": "1"}) as cluster:
        cluster.worker("--model-path", str(model), "--served-model-name", MODEL, *QUICK)
        cluster.worker("--model-path", "stepwell/fake-image", "--served-model-name", OTHER)
        made = cluster.frontend()
        cluster.wait_for(made, MODEL, OTHER)
        yield made


def choice(url: str, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello! How are you?"}], "max_tokens": 60, **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def calls(found: dict[str, Any]) -> list[tuple[str, Any]]:
    made = [call["function"] for call in found["message"]["tool_calls"]]
    return [(call["name"], json.loads(call["arguments"])) for call in made]


def test_a_call_that_the_model_makes(url: str) -> None:
    found = choice(url, tools=TOOLS)
    assert calls(found) == [("draw", {"color": "red"})] and found["finish_reason"] == "tool_calls"
    assert found["message"]["content"].startswith("Hello! ") and "tool_call" not in found["message"]["content"]


def test_what_looks_like_a_call_where_there_are_no_tools(url: str) -> None:
    found = choice(url)
    assert CALL in found["message"]["content"] and not found["message"].get("tool_calls")


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "draw"}}])
def test_a_call_that_is_asked_for(url: str, tool_choice: Any) -> None:
    found = choice(url, tools=TOOLS, tool_choice=tool_choice, max_tokens=200)
    assert found["finish_reason"] == "tool_calls"
    for name, arguments in calls(found):
        assert name == "draw" and arguments["color"] in ("red", "blue")


def test_names_without_a_letter_that_dynamo_takes(url: str) -> None:
    body = {"model": OTHER, "prompt": "a star", "response_format": "b64_json"}
    assert httpx.post(f"{url}/v1/images/generations", json=body, timeout=120, trust_env=False).status_code == 200
