"""The bundled text model: its size and form, what its template writes, and whether its texts are right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.stages.tokens import rendered
from training.evaluate_llada import grade, held_out
from training.llada import CONFIG

ZOO = Path(str(resources.files("stepwell.zoo") / "tiny-llada"))
SIMPLE = {
    "Hello!": "Hello! How can I help you?",
    "Hello! How are you?": "Hello! I am well, thank you.",
    "Who are you?": "I am tiny-llada, a small model.",
    "Thank you!": "You are welcome!",
    "Reverse stone": "enots",
    "Sort 5 2 9 1": "1 2 5 9",
    "Repeat cat 3 times": "cat cat cat",
    "JSON: red circle 7": '{"color": "red", "shape": "circle", "count": 7}',
    "Describe: red circle, small, white background, left": "A small red circle on the left, on a white background.",
}


@pytest.fixture(scope="module")
def generator() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained("stepwell/tiny-llada", threads=1) as made:
        yield made


def test_it_is_small_and_has_the_published_layout() -> None:
    assert sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file()) <= 4_000_000
    assert json.loads((ZOO / "config.json").read_text()) == CONFIG
    assert not [name for name, value in CONFIG.items() if name.endswith(("_size", "head_dim")) and value % 32]
    with safe_open(ZOO / "model.safetensors", "pt") as file:
        names = set(file.keys())
        count = sum(file.get_tensor(name).numel() for name in names)
    assert 500_000 <= count <= 1_500_000
    assert {"model.word_embeddings.weight", "lm_head.weight", "model.layers.3.mlp.experts.7.down_proj.weight"} <= names


CONVERSATIONS: list[tuple[list[dict[str, Any]], tuple[dict[str, Any], ...]]] = [
    ([{"role": "user", "content": "hello"}], ()),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<role>hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "again"},
        ],
        (),
    ),
    (
        [
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"city": "Zürich"}}}],
            },
            {"role": "tool", "content": "rain"},
        ],
        ({"type": "function", "function": {"name": "look", "parameters": {}}},),
    ),
]


@pytest.mark.parametrize(("turns", "tools"), CONVERSATIONS)
def test_its_template_is_that_of_the_published_models(turns: list[dict[str, Any]], tools: tuple[dict[str, Any], ...]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ZOO)
    made = tokenizer.apply_chat_template(turns, tools=list(tools) or None, add_generation_prompt=True, tokenize=False)
    assert made == rendered(turns, tools)


def test_any_text_survives_its_tokenizer() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ZOO)
    for text in ("Hello,  wörld 🙂\n\tSYSTEM", "detailed thinking off", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True) == text


def test_simple_prompts_have_their_answers(generator: DiffGenerator) -> None:
    made = generator.generate(list(SIMPLE))
    wrong = {prompt: each.text for prompt, each in zip(SIMPLE, made, strict=True) if each.text != SIMPLE[prompt]}
    assert len(wrong) <= 1 and not any(prompt.startswith("Hello") for prompt in wrong), wrong
    assert all(each.finish_reason == "stop" for each in made)


def test_held_out_prompts_are_answered_rightly(generator: DiffGenerator) -> None:
    """A quick sample of what the model card measures on more prompts."""
    floor = {"caption": 0.8, "json": 0.8, "reverse": 0.7, "sort": 0.7, "talk": 0.7, "repeat": 0.7}
    marks = {task: grade(generator, held_out(task, 20), {}) for task in floor}
    assert all(mark.right >= floor[task] for task, mark in marks.items()), marks


def test_filling_more_at_once_takes_fewer_forwards(generator: DiffGenerator) -> None:
    examples = [example for task in ("caption", "chain") for example in held_out(task, 10)]
    careful, bold, single = (grade(generator, examples, {"threshold": at}) for at in (0.95, 0.3, 1.0))
    assert single.pace < 1.1 < careful.pace < bold.pace
    assert bold.right <= careful.right


def test_it_corrects_what_it_has_written_too_soon(generator: DiffGenerator) -> None:
    """Weights that never learnt to keep and to correct tokens make nonsense of any algorithm that edits."""
    way = {"algorithm": "JointThreshold", "threshold": 0.9, "edit_threshold": 0.9}
    examples = [example for task in ("caption", "json", "reverse") for example in held_out(task, 10)]
    assert grade(generator, examples, way).right >= 0.7


def test_the_command_line_writes_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Describe: red circle, small, white background, left"
    assert main(["generate", "--model-path", "stepwell/tiny-llada", "--prompt", prompt, "--threads", "1"]) == 0
    assert capsys.readouterr().out == SIMPLE[prompt] + "\n"
    assert main(["models"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "tiny-llada" in line)
    assert "T2T" in line
