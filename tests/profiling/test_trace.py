"""Traces: generate --profile, serve --profile, and engines whose requests end in other ways than well."""

from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepwell import DiffGenerator, Request, SamplingParams
from stepwell.cli.main import main
from stepwell.engine.fake import FakeWorker
from stepwell.engine.local import LocalEngine
from stepwell.engine.trace import TraceSettings, TracingWorker
from stepwell.types import Done, Event, Failed, Progress
from tests.support.command import Command

SMALL = ["--width", "32", "--height", "32", "--threads", "1", "--seed", "1"]
GENERATE = ["generate", "--prompt", "a star", *SMALL]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def content(path: Path) -> list[dict[str, Any]]:
    """The events of a trace."""
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def ranges(path: Path) -> list[str]:
    """The steps in a trace, in order."""
    steps = [event for event in content(path) if event.get("cat") == "user_annotation"]
    assert all(event["dur"] > 0 for event in steps)
    return [event["name"] for event in sorted(steps, key=lambda event: event["ts"])]


def traces() -> list[Path]:
    """What is in ./logs, hidden files included."""
    return sorted(Path("logs").iterdir())


# ------------------------------------------------------------------------------------------------------- stepwell generate
@pytest.mark.parametrize(
    ("steps", "more", "recorded"),
    [
        (8, [], range(1, 6)),  # five by default, after one that warms up
        (8, ["--num-profiled-timesteps", "2"], range(1, 3)),
        (6, ["--num-profiled-timesteps", "5"], range(1, 6)),  # the last one that is there
        (3, [], range(1, 3)),  # fewer than were asked for
        (1, [], range(1)),  # nothing to warm up with
    ],
)
def test_exactly_so_many_steps(steps: int, more: list[str], recorded: range, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GENERATE, "--profile", "--num-inference-steps", str(steps), *more]) == 0
    (path,) = traces()
    assert re.fullmatch(rf"req-\w+-{len(recorded)}_steps-global-rank0\.trace\.json\.gz", path.name)
    assert f"Saved profiler traces to: {path.absolute()}\n" in capsys.readouterr().err
    assert ranges(path) == [f"denoise_step_{index}" for index in recorded]


def test_a_trace_has_shapes_and_stacks() -> None:
    assert main([*GENERATE, "--profile", "--num-profiled-timesteps", "1", "--num-inference-steps", "2"]) == 0
    events = content(traces()[0])
    kinds = Counter(event.get("cat") for event in events)
    assert kinds["cpu_op"] > 50 and kinds["python_function"] > 50
    assert any(event.get("args", {}).get("Input Dims") for event in events)
    assert any("stages/denoise.py" in event["name"] for event in events)


def test_all_stages_of_all_outputs() -> None:
    more = ["--profile-all-stages", "--num-inference-steps", "3", "--num-outputs-per-prompt", "2"]
    assert main([*GENERATE, "--profile", *more, "--max-batch-tokens", "1"]) == 0  # every step for one output alone
    (path,) = traces()
    assert re.fullmatch(r"req-\w+-full_stages-global-rank0\.trace\.json\.gz", path.name)
    found = ranges(path)
    assert found[0] == "encode_text_step_0" and found[-1] == "decode_step_0"
    stages = [
        "encode_text_step_0",
        "prepare_latents_step_0",
        "denoise_step_0",
        "denoise_step_1",
        "denoise_step_2",
        "decode_step_0",
    ]
    assert Counter(found) == dict.fromkeys(stages, 2)


def test_without_profile_nothing_is_traced(caplog: pytest.LogCaptureFixture) -> None:
    assert main([*GENERATE, "--num-inference-steps", "1"]) == 0
    assert not Path("logs").exists() and "does not apply" not in caplog.text
    assert main([*GENERATE, "--num-inference-steps", "1", "--num-profiled-timesteps", "3", "--profile-all-stages"]) == 0
    assert not Path("logs").exists()
    assert "num_profiled_timesteps does not apply: profile is off" in caplog.text
    assert "profile_all_stages does not apply: profile is off" in caplog.text


def test_a_number_of_steps_does_not_apply_to_all_stages(caplog: pytest.LogCaptureFixture) -> None:
    more = ["--profile", "--profile-all-stages", "--num-profiled-timesteps", "1", "--num-inference-steps", "3"]
    assert main([*GENERATE, *more]) == 0
    assert "num_profiled_timesteps does not apply: profile_all_stages records every step" in caplog.text
    assert "denoise_step_2" in ranges(traces()[0])


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5"])
def test_numbers_that_are_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GENERATE, "--profile", "--num-profiled-timesteps", number]) == 2
    assert f"num_profiled_timesteps = '{number}'" in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    Path("logs").write_text("not a folder")
    assert main([*GENERATE, "--profile", "--model-path", "/nowhere"]) == 2
    error = capsys.readouterr().err
    assert "profile: traces in" in error and "can't be written" in error and error.count("\n") == 1


def test_the_log_is_left_as_it_was() -> None:
    log = logging.getLogger("stepwell.profiling")
    before = log.level, list(log.handlers)
    assert main([*GENERATE, "--profile", "--num-inference-steps", "2"]) == 0
    assert (log.level, list(log.handlers)) == before


# --------------------------------------------------------------------------------------------------------- stepwell serve
def test_a_server_logs_where_traces_are(tmp_path: Path) -> None:
    with Command("stepwell/tiny-flux", tmp_path, "--profile", "--num-profiled-timesteps", "2", "--threads", "1") as server:
        server.start()
        body = {"prompt": "a star", "size": "32x32", "num_inference_steps": 4}
        for _ in range(2):
            assert server.http.post("/v1/images/generations", json=body).status_code == 200
        assert server.stop() == 0
        logged = re.findall(r"INFO stepwell\.profiling: Saved profiler traces to: (\S+)", server.log.read_text())
    assert sorted(map(Path, logged)) == [path.absolute() for path in traces()] and len(logged) == 2
    assert all(ranges(path) == ["denoise_step_1", "denoise_step_2"] for path in traces())


def test_fakes_have_nothing_to_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    more = ["--port", "0", "--data-path", str(tmp_path / "data")]
    assert main(["serve", "--model-path", "stepwell/fake-image", "--profile", *more]) == 2
    assert "profile = True: a fake model computes nothing" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ Python, engine
def test_one_trace_at_a_time() -> None:
    small: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 3}
    with DiffGenerator.from_pretrained(threads=1, profile=True, num_profiled_timesteps=2) as generator:
        together = generator.generate(["a star", "a circle"], **small)
        assert [path.name.split("-2_steps")[0] for path in traces()] == [together[0].request_id]
        alone = generator.generate("a square", num_outputs_per_prompt=2, **small)
        assert {path.name.split("-2_steps")[0] for path in traces()} == {together[0].request_id, alone[0].request_id}
        assert all(ranges(path) == ["denoise_step_1", "denoise_step_2"] for path in traces())


def test_what_warms_up_is_nobodys_request() -> None:
    small: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2}
    with DiffGenerator.from_pretrained(threads=1, profile=True, warmup_sizes=["32x32", "64x32"]) as generator:
        assert traces() == []
        made = generator.generate("a star", **small)
    assert [path.name.split("-1_steps")[0] for path in traces()] == [made[0].request_id]


class Enough(Exception):
    """The caller has seen enough."""


@pytest.mark.parametrize("all_stages", [False, True])
def test_an_aborted_request_leaves_nothing(all_stages: bool) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise" and event.step == 3:
            raise Enough

    options = {"threads": 1, "profile": True, "num_profiled_timesteps": 500, "profile_all_stages": all_stages}
    small: dict[str, Any] = {"width": 32, "height": 32}
    with DiffGenerator.from_pretrained(**options) as generator:
        with pytest.raises(Enough):
            generator.generate("a star", num_inference_steps=1000, num_outputs_per_prompt=3, on_event=stop, **small)
        done = generator.generate("a star", num_inference_steps=2, **small)
        assert [path.name.split("-")[1] for path in traces()] == [done[0].request_id.removeprefix("req-")]
        assert ranges(traces()[0])[-1] == ("decode_step_0" if all_stages else "denoise_step_1")


def test_what_cannot_be_saved_is_not_the_requests_trouble(caplog: pytest.LogCaptureFixture) -> None:
    small: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2}
    with DiffGenerator.from_pretrained(threads=1, profile=True) as generator:
        shutil.rmtree("logs")
        assert generator.generate("a star", **small)
        assert "could not be saved" in caplog.text
        Path("logs").mkdir()
        assert generator.generate("a star", **small)
    assert len(traces()) == 1


def traced(step_ms: float = 1.0, *, steps: int = 2, all_stages: bool = False) -> LocalEngine:
    """An engine without a model whose steps are traced all the same."""
    Path("logs").mkdir(exist_ok=True)
    settings = TraceSettings(Path("logs").absolute(), steps, all_stages)
    return LocalEngine(lambda: TracingWorker(FakeWorker(step_ms), settings))


@pytest.fixture(params=[False, True], ids=["denoising", "all stages"])
def engine(request: pytest.FixtureRequest) -> Iterator[LocalEngine]:
    made = traced(all_stages=request.param)
    made.open()
    yield made
    made.shut()


@pytest.mark.parametrize("word", ["poison", "gluttony"])
def test_a_failed_request_leaves_nothing(engine: LocalEngine, word: str) -> None:
    sampling = SamplingParams(num_inference_steps=8, num_outputs=2)
    assert isinstance(list(engine.stream(Request(f"some {word}", sampling)))[-1], Failed)
    assert traces() == []
    assert isinstance(list(engine.stream(Request("a star", sampling, id="well")))[-1], Done)
    assert [path.name.split("-")[0] for path in traces()] == ["well"]


def test_closing_in_the_middle_leaves_nothing(engine: LocalEngine) -> None:
    events = engine.stream(Request("a star", SamplingParams(num_inference_steps=900)))
    while not (isinstance(event := next(events), Progress) and event.stage == "denoise" and event.step == 1):
        pass
    engine.shut()
    assert isinstance(list(events)[-1], Failed)
    assert all(path.name.endswith("-2_steps-global-rank0.trace.json.gz") for path in traces())  # it may have been complete


def test_two_engines_of_a_process_take_turns(caplog: pytest.LogCaptureFixture) -> None:
    """torch crashes where two of its profilers overlap."""
    ends: list[Event] = []
    threads = []
    for name in ("one", "two"):
        engine = traced(5.0, steps=20)
        request = Request("a star", SamplingParams(num_inference_steps=30), id=name)
        threads.append(threading.Thread(target=lambda e=engine, r=request: (e.open(), ends.extend(e.stream(r)), e.shut())))  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(isinstance(event, Done) for event in ends) == 2
    assert len(traces()) == 1 and "is recording another trace" in caplog.text


def test_steps_of_others_have_another_name() -> None:
    engine = traced(2.0, steps=10, all_stages=True)
    engine.open()
    first = engine.stream(Request("a star", SamplingParams(num_inference_steps=10), id="first"))
    next(first)
    assert isinstance(list(engine.stream(Request("x", SamplingParams(num_inference_steps=1), id="second", priority=9)))[-1], Done)
    assert isinstance(list(first)[-1], Done)
    engine.shut()
    (path,) = traces()
    found = ranges(path)
    assert path.name.startswith("first-")
    assert [name for name in found if not name.startswith("others_")] == [
        "encode_text_step_0", *(f"denoise_step_{index}" for index in range(10)), "decode_step_0"
    ]  # fmt: skip
    assert "others_encode_text" in found and "others_decode" in found


def test_an_id_is_no_path() -> None:
    engine = traced(all_stages=True)
    engine.open()
    assert isinstance(list(engine.stream(Request("a star", id="../../etc/x")))[-1], Done)
    engine.shut()
    assert [path.name.split("-")[0] for path in traces()] == [".._.._etc_x"]
