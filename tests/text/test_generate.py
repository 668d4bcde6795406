"""Text by refinement through the Python API, on a random model that speaks bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.errors import InvalidRequest, StepwellError, Unsupported, WeightsError
from stepwell.types import Chunk, Event
from tests.support.llada2 import byte_ids, text_repository


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_repository(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="module")
def generator(path: Path) -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained(path, threads=1) as made:
        yield made


def text(generator: DiffGenerator, prompt: str, **asked: Any) -> Any:
    (made,) = generator.generate(prompt, **{"max_tokens": 20, "ignore_eos": True, **asked})
    return made


def test_greedy_is_the_default_and_a_seed_repeats(generator: DiffGenerator) -> None:
    first, again = text(generator, "hello"), text(generator, "hello")
    assert first.text == again.text and first.finish_reason == "length"
    assert first.usage.completion_tokens == 20 and first.usage.forwards > 0
    warm = [text(generator, "hello", temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_company_changes_no_token(generator: DiffGenerator) -> None:
    prompts = ["hello", "a much longer question than the other ones " * 3, "x"]
    alone = [text(generator, prompt, temperature=0.8, seed=3).text for prompt in prompts]
    together = generator.generate(prompts, max_tokens=20, ignore_eos=True, temperature=0.8, seed=3)
    assert [made.text for made in together] == alone


@pytest.mark.parametrize("algorithm", ["LowConfidence", "JointThreshold", "Credit", "Hierarchy"])
def test_every_algorithm_by_name(generator: DiffGenerator, algorithm: str) -> None:
    made = text(generator, "hello", diffusion={"algorithm": algorithm})
    assert made.usage.completion_tokens == 20


def test_a_lower_threshold_takes_fewer_forwards(generator: DiffGenerator) -> None:
    slow, fast = (text(generator, "hello", diffusion={"threshold": at}).usage.forwards for at in (0.99, 0.0))
    assert fast < slow


def test_chunks_are_only_appended(generator: DiffGenerator) -> None:
    seen: list[Event] = []
    (made,) = generator.generate("hello", max_tokens=20, ignore_eos=True, on_event=seen.append)
    written = ""
    chunks = [event for event in seen if isinstance(event, Chunk)]
    for chunk in chunks:
        assert chunk.start == len(written)
        written += chunk.text
    assert written == made.text and len(chunks) > 1


@pytest.mark.parametrize("count", [0, 1])
def test_very_short_answers(generator: DiffGenerator, count: int) -> None:
    made = text(generator, "hello", max_tokens=count)
    assert made.usage.completion_tokens == count and made.finish_reason == "length"


def test_a_stop_string_ends_the_text_before_it(generator: DiffGenerator) -> None:
    whole = text(generator, "hello", raw=True, max_tokens=24).text
    stop = next(whole[i : i + 2] for i in range(3, len(whole) - 2) if whole.index(whole[i : i + 2]) == i)
    made = text(generator, "hello", raw=True, max_tokens=24, stop=stop)
    assert made.text == whole[: whole.index(stop)] and made.finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_tokens": 10**6}, "max_tokens = 1000000"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"top_p": 2.0}, "top_p = 2"),
        ({"diffusion": {"algorithm": "Magic"}}, "Magic"),
        ({"diffusion": {"threshold": 2.0}}, "threshold = 2"),
        ({"width": 64}, "width"),
    ],
)
def test_bad_input_names_field_and_value(generator: DiffGenerator, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(StepwellError, match=said):
        text(generator, "hello", **asked)


def test_the_command_line_prints_it(path: Path, generator: DiffGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model-path", str(path), "--prompt", "hello", "--seed", "1", "--threads", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out == generator.generate("hello", seed=1)[0].text + "\n"
    assert main([*command, "--width", "64"]) == 2
    assert "width does not apply" in capsys.readouterr().err
    assert main([*command, "--max-tokens", "5", "--temperature", "0.8", "--top-p", "0.9"]) == 0
    drawn = generator.generate("hello", seed=1, max_tokens=5, temperature=0.8, top_p=0.9)[0].text
    assert capsys.readouterr().out == drawn + "\n"


@pytest.mark.parametrize("name", ["stop", "tools", "ignore_eos", "logit_bias", "diffusion"])
def test_what_is_of_another_kind_is_refused_by_name(generator: DiffGenerator, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} = 5: must be"):
        generator.generate("hello", **{name: 5})  # type: ignore[arg-type]


def test_other_commands_know_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "LLaDA2MoeModelLM" in shown and "attention backends" not in shown
    for what in ("dit_precision", "LowConfidence", "block_size", "kv_pages"):
        assert what in shown
    assert main(["doctor", str(path), "--quantization", "int8_dynamic"]) == 2
    assert "quantization = 'int8_dynamic': not for text models" in capsys.readouterr().err
    assert main(["models"]) == 0
    assert "inclusionAI/LLaDA2.0-mini" in capsys.readouterr().out


def test_a_bias_decides_a_token_and_penalties_move_away_from_it(generator: DiffGenerator) -> None:
    letter = byte_ids("q")[0]
    assert text(generator, "hello", logit_bias={letter: 100.0}).text == "q" * 20
    # a block is filled in one forward, so what was written before it is what counts
    mild = {"logit_bias": {letter: 8.0}, "max_tokens": 24}
    free, penalised = (text(generator, "hello", **mild, frequency_penalty=at).text.count("q") for at in (0.0, 2.0))
    assert penalised < free


def test_logprobs_are_told_for_every_token(generator: DiffGenerator) -> None:
    made = text(generator, "hello", logprobs=2)
    assert len(made.tokens) == 20
    assert all(token.logprob <= 0 and len(token.top) == 2 for token in made.tokens)
    assert not text(generator, "hello").tokens


@pytest.mark.parametrize(
    ("stop", "left", "finish"), [("\ufffd", "", "stop"), ("\ufffd" * 2, "", "stop"), ("x", "\ufffd" * 3, "length")]
)
def test_a_stop_string_in_what_is_no_whole_character_at_the_end(
    generator: DiffGenerator, stop: str, left: str, finish: str
) -> None:
    first, *_ = byte_ids("€")
    seen: list[Event] = []
    made = text(generator, "hello", logit_bias={first: 100.0}, max_tokens=3, stop=stop, on_event=seen.append)
    assert (made.text, made.finish_reason) == (left, finish)
    assert "".join(event.text for event in seen if isinstance(event, Chunk)) == left


def test_chunks_make_up_the_text_where_tokens_are_parts_of_characters(generator: DiffGenerator) -> None:
    seen: list[Event] = []
    first, *_ = byte_ids("€")
    generator.generate("hello", max_tokens=20, ignore_eos=True, logit_bias={first: 4.0}, on_event=seen.append)
    (made,) = generator.generate("hello", max_tokens=20, ignore_eos=True, logit_bias={first: 4.0})
    chunks = [event.text for event in seen if isinstance(event, Chunk)]
    assert "".join(chunks) == made.text


def test_what_a_text_model_does_not_do_is_refused_or_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in (("linear_backend", "torch"), ("quantization", "int8_dynamic"), ("attention_backend", "blocked")):
        with pytest.raises(Unsupported, match=name):
            DiffGenerator.from_pretrained(path, **{name: value})
    DiffGenerator.from_pretrained(path, threads=1, checkpoint_interval_s=1.0).close()
    assert "checkpoint_interval_s does not apply to a text model" in caplog.text


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"max_position_embeddings": 7}, {}, "block_size = 8: the model's context is 7 tokens"),
        ({"eos_token_id": [0, 272]}, {}, "eos_token_id = 272: must be below vocab_size = 272"),
        ({"eos_token_id": "stop"}, {}, "eos_token_id = 'stop'"),
        ({}, {"dllm_algorithm": "Magic"}, "^dllm_algorithm = 'Magic': must be one of LowConfidence"),
    ],
)
def test_what_can_not_work_is_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(StepwellError, match=said):
        DiffGenerator.from_pretrained(text_repository(tmp_path / "odd", changes), threads=1, **options)


@pytest.mark.parametrize("template", ["{% for turn in messages %}", "{{ messages | shout }}", {"default": "x", "tool_use": "{{"}])
def test_a_template_that_is_none_is_told_by_its_file(tmp_path: Path, template: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = text_repository(tmp_path / "odd", template=template)
    inside = tmp_path / "inside"
    text_repository(inside)
    config = json.loads((inside / "tokenizer_config.json").read_text())
    (inside / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{% if %}"}))
    named = "additional_chat_templates/tool_use.jinja" if isinstance(template, dict) else "chat_template.jinja"
    for folder, name in ((path, named), (inside, "tokenizer_config.json")):
        assert main(["doctor", str(folder)]) == 2
        shown = capsys.readouterr().err
        assert f"{folder / name}: the chat template can't be read: " in shown and "line 1" in shown
    with pytest.raises(WeightsError, match="chat_template"):
        DiffGenerator.from_pretrained(path, threads=1)


def test_a_template_that_refuses_is_no_broken_one(tmp_path: Path) -> None:
    path = text_repository(tmp_path / "odd", template="{{ raise_exception('system first') }}")
    with DiffGenerator.from_pretrained(path, threads=1) as made, pytest.raises(InvalidRequest, match="messages: .*system first"):
        made.generate(messages=[{"role": "user", "content": "hello"}])


def test_a_length_that_is_none_is_not_taken_from_a_checkpoint(tmp_path: Path) -> None:
    with DiffGenerator.from_pretrained(text_repository(tmp_path / "odd", {"max_new_tokens": -1}), threads=1) as made:
        (text,) = made.generate("hello", ignore_eos=True)
        assert text.usage.completion_tokens > 0 and text.finish_reason == "length"


def test_half_a_character_and_half_a_call_are_refused(generator: DiffGenerator) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    for messages in ([{"role": "user", "content": "\ud800"}], [call]):
        with pytest.raises(InvalidRequest, match="messages"):
            generator.generate(messages=messages)


def test_a_prompt_beyond_the_context_is_refused(generator: DiffGenerator) -> None:
    with pytest.raises(InvalidRequest, match="context"):
        text(generator, "x" * 20_000)


def test_a_conversation_is_what_the_template_makes_of_it(generator: DiffGenerator) -> None:
    (made,) = generator.generate(messages=[{"role": "user", "content": "hello"}], max_tokens=20, ignore_eos=True)
    assert made.text == text(generator, "hello").text
