"""What the canvas of a block makes possible: gaps that are filled, and previews; on a random model that speaks bytes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.engine.wire import Submit, pack, unpack
from stepwell.errors import StepwellError
from stepwell.samplers.predict import Prediction
from stepwell.samplers.unmask import Canvas
from stepwell.types import Event, Request, TextParams, TextPreview
from tests.support.llada2 import BYTES_FIRST, text_repository

BLOCK = 32
READABLE = tuple((BYTES_FIRST + byte, -100.0) for byte in range(256) if not 32 <= byte < 127)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_repository(tmp_path_factory.mktemp("canvas"), {"block_size": BLOCK})


@pytest.fixture(scope="module")
def generator(path: Path) -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained(path, threads=1) as made:
        yield made


def text(generator: DiffGenerator, prompt: str, **asked: Any) -> Any:
    (made,) = generator.generate(prompt, **{"raw": True, "ignore_eos": True, "logit_bias": READABLE, **asked})
    return made


@pytest.mark.parametrize("algorithm", ["LowConfidence", "JointThreshold", "Credit", "Hierarchy"])
def test_a_gap_is_as_long_as_asked_and_depends_on_what_follows(generator: DiffGenerator, algorithm: str) -> None:
    asked = {"max_tokens": 6, "diffusion": {"algorithm": algorithm}}
    one, other = (text(generator, "def f(x):\n", suffix=after, **asked) for after in (" return y", "\n\nprint(1)"))
    assert one.usage.completion_tokens == other.usage.completion_tokens == 6
    assert one.finish_reason == "stop"
    assert one.text != other.text != text(generator, "def f(x):\n", **asked).text


def test_a_gap_without_a_size_takes_what_the_block_has_left(generator: DiffGenerator) -> None:
    made = text(generator, "x" * (BLOCK + 5), suffix="end")
    assert made.usage.completion_tokens == BLOCK - 5 - 3


def test_a_mask_in_a_suffix_stays_as_it_is(generator: DiffGenerator) -> None:
    made = text(generator, "abc", suffix="<|mask|><|mask|>", max_tokens=4)
    assert made.usage.completion_tokens == 4 and "mask" not in made.text


@pytest.mark.parametrize(
    ("prompt", "asked", "said"),
    [
        (
            "x" * 20,
            {"suffix": "y" * 10, "max_tokens": 3},
            "suffix: its 10 tokens and a gap of 3 .* 12 tokens.* max_tokens = 2 would do",
        ),
        ("x" * 20, {"suffix": "y" * 12}, "suffix: its 12 tokens and a gap of 1 .* 12 tokens"),
        ("x", {"suffix": 3}, "suffix = 3"),
        ("x", {"suffix": "\ud800"}, "suffix holds a lone surrogate"),
        ("x", {"prediction": 3}, "prediction = 3"),
        ("x", {"preview_every": -1}, "preview_every = -1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_size(
    generator: DiffGenerator, prompt: str, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(StepwellError, match=said):
        text(generator, prompt, **asked)


def previews(events: list[Event]) -> list[TextPreview]:
    return [event for event in events if isinstance(event, TextPreview)]


def test_previews_show_each_refinement_and_end_with_the_text(generator: DiffGenerator) -> None:
    events: list[Event] = []
    made = text(generator, "hello", max_tokens=50, preview_every=1, on_event=events.append)
    seen = previews(events)
    assert len(seen) == made.usage.forwards - made.usage.commits
    assert [each.forwards for each in seen] == sorted({each.forwards for each in seen})
    for each in seen:
        assert each.masked == each.text.count("░") == sum(how == "m" for _, how in each.tokens)
        assert all(how in "cnm" for _, how in each.tokens)
    for earlier, later in itertools.pairwise(seen):
        if earlier.block == later.block:
            assert earlier.masked >= later.masked and later.step == earlier.step + 1
            assert all(a == "░" or a == b for a, b in zip(earlier.text, later.text, strict=False))
    assert {each.block for each in seen} == {0, 1}
    for block, start, length in ((0, 0, BLOCK - 5), (1, BLOCK - 5, 50 - (BLOCK - 5))):
        last = [each for each in seen if each.block == block][-1]
        assert last.start == start and last.text == made.text[start : start + length] and len(last.tokens) == length


def test_previews_come_as_often_as_asked_and_cost_nothing_else(generator: DiffGenerator) -> None:
    counts = []
    for every in (0, 1, 4):
        events: list[Event] = []
        made = text(generator, "hello", max_tokens=20, preview_every=every, on_event=events.append)
        counts.append(len(previews(events)))
        assert made.text == text(generator, "hello", max_tokens=20).text
    steps = made.usage.forwards - made.usage.commits
    assert counts == [0, steps, steps // 4]


def test_edits_are_counted_and_shown(generator: DiffGenerator) -> None:
    events: list[Event] = []
    asked = {"algorithm": "JointThreshold", "edit_threshold": 0.0}
    made = text(generator, "hello", max_tokens=20, diffusion=asked, preview_every=1, on_event=events.append)
    shown = sum(how == "e" for each in previews(events) for _, how in each.tokens)
    assert made.usage.edits >= shown > 0
    assert text(generator, "hello", max_tokens=20).usage.edits == 0


def test_what_another_process_is_asked_and_tells_passes_the_wire() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 1, None]}}}
    request = Request("begin", text=TextParams(suffix="end", prediction="middle", schema=schema), preview_every=2)
    assert unpack(pack(Submit(request))) == Submit(request)
    event = TextPreview("req-1", 0, 1, 2, 3, "a░", (("a", "n"), ("░", "m")), 1, 7)
    assert unpack(pack(event)) == event


def test_a_right_prediction_takes_fewer_forwards(generator: DiffGenerator) -> None:
    plain = text(generator, "hello", max_tokens=60)
    made = text(generator, "hello", max_tokens=60, prediction=plain.text)
    assert made.usage.forwards < plain.usage.forwards
    assert made.usage.accepted_prediction_tokens > 0
    assert made.usage.accepted_prediction_tokens + made.usage.rejected_prediction_tokens == 60
    again = text(generator, "hello", max_tokens=60, prediction=made.text)
    assert again.usage.forwards <= made.usage.forwards


def test_a_wrong_prediction_changes_nothing_and_is_counted(generator: DiffGenerator) -> None:
    plain = text(generator, "hello", max_tokens=40)
    made = text(generator, "hello", max_tokens=40, prediction="\x01" * 30)
    assert (made.text, made.usage.forwards) == (plain.text, plain.usage.forwards)
    assert (made.usage.accepted_prediction_tokens, made.usage.rejected_prediction_tokens) == (0, 30)


def test_correcting_algorithms_begin_with_the_prediction(generator: DiffGenerator) -> None:
    stubborn = {"algorithm": "JointThreshold", "edit_threshold": 1.0}  # corrects nothing
    given = "abcdefgh" * 8
    count = 2 * BLOCK - len("hello")
    made = text(generator, "hello", max_tokens=count, prediction=given, diffusion=stubborn)
    assert made.text == given[:count]
    assert (made.usage.accepted_prediction_tokens, made.usage.rejected_prediction_tokens) == (count, len(given) - count)
    assert made.usage.forwards == 2  # a block each, and neither had a mask
    eager = {"algorithm": "JointThreshold", "edit_threshold": 0.0}
    made = text(generator, "hello", max_tokens=40, prediction=given, diffusion=eager)
    assert made.usage.edits > 0 and made.usage.rejected_prediction_tokens > 0


def test_what_was_predicted_and_left_as_it_was_is_told_too(generator: DiffGenerator) -> None:
    for edit_threshold in (0.0, 0.9, 1.0):
        diffusion = {"algorithm": "JointThreshold", "edit_threshold": edit_threshold}
        made = text(generator, "hello", max_tokens=40, prediction="abcdefgh" * 4, diffusion=diffusion, logprobs=1)
        assert "".join(token.text for token in made.tokens) == made.text
        assert len(made.tokens) == made.usage.completion_tokens == 40
        assert all(token.logprob <= token.top[0][2] for token in made.tokens)


def test_a_prediction_is_found_again_behind_what_differs() -> None:
    words = tuple(range(100, 130))
    canvas = Canvas((99,) * 8, 99)
    for certain, expected in (
        ((), words[:8]),
        (words[:5], words[5:13]),
        ((*words[:5], 1, 2, *words[5:8]), words[8:16]),  # two were put in
        ((*words[:5], *words[9:12]), words[12:20]),  # four were left out
        ((*words[:5], 1), words[6:14]),  # one is another
    ):
        hints = Prediction(words).hinting(certain, 0, canvas).hints
        assert tuple(hints[place] for place in range(8)) == expected
    assert not Prediction(words).hinting(words, 0, canvas).hints


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_text_refine_and_a_pipe_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = text_repository(tmp_path / "short", {"block_size": 16, "max_position_embeddings": 80})
    command = ["generate", "--model-path", str(path), "--prompt", "hello", "--seed", "1", "--threads", "1"]
    assert main(command) == 0
    piped = capsys.readouterr().out
    assert piped and "\x1b" not in piped and "░" not in piped
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(command) == 0
    shown = terminal.getvalue()
    assert "░" in shown and shown.endswith(piped)
    assert shown.count("\x1b[2K") > 3  # redrawn in place
