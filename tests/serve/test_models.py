"""Several models in one engine: requests choose by name, and nobody's picture or place in the queue depends on it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.config.schema import EngineOptions
from stepwell.engine import build
from stepwell.engine.build import build_worker
from stepwell.engine.fake import FAKES as FAKE_INFOS
from stepwell.engine.fake import FakeWorker
from stepwell.engine.fleet import fleet
from stepwell.engine.intake import complete
from stepwell.engine.local import LocalEngine
from stepwell.engine.remote import RemoteEngine
from stepwell.engine.steps import StagePlan, Step, StepExecutor, StepResult
from stepwell.errors import InvalidRequest, ModelNotFound, Unsupported
from stepwell.generator import open_engine
from stepwell.models.wan import T2V_1B
from stepwell.types import Done, Failed, Request, SamplingParams, Task, replace
from tests.support.answers import check_refusal
from tests.support.llada2 import text_repository
from tests.support.repositories import wan_repository
from tests.support.sdk import Sdk, made, shown, until
from tests.support.server import Running, running

TINY = "stepwell/tiny-flux"
SMALL = {"size": "64x64", "extra_body": {"num_inference_steps": 2, "seed": 3}}
FAKES = ["stepwell/fake-image?step_ms=1", "stepwell/fake-video"]
NAMES = ["painter", "camera"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_repository(tmp_path_factory.mktemp("wan"), dict(T2V_1B.tiny))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_repository(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def options(wan: Path, flux_dev: Path) -> EngineOptions:
    return EngineOptions(model_path=[TINY, str(flux_dev), str(wan)], threads=1)


@pytest.fixture(scope="module")
def engine(options: EngineOptions) -> Iterator[LocalEngine]:
    made = open_engine(options)
    made.open()
    yield made
    made.shut()


@pytest.fixture(scope="module")
def server(engine: LocalEngine, options: EngineOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(engine, tmp_path_factory.mktemp("data"), options, served_model_name=["tiny", "random"]) as made:
        yield made


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=0)


def two_fakes(kind: str, watch: Callable[[StepExecutor], StepExecutor] = lambda worker: worker) -> LocalEngine:
    """An engine of two models without weights, "first" and "second", that do the same."""
    infos = [replace(FAKE_INFOS[f"stepwell/fake-{kind}"], id=name) for name in ("first", "second")]
    return LocalEngine(lambda: watch(fleet([FakeWorker(1, info) for info in infos])))


class Watched:
    """Implements `StepExecutor` by another. `log` holds every request as it is taken in, and every step as it is taken."""

    def __init__(self, worker: StepExecutor):
        self.models, self.batch_tokens, self.choices = worker.models, worker.batch_tokens, worker.choices
        self.free, self.forget, self.held, self.close = worker.free, worker.forget, worker.held, worker.close
        self.log: list[Request | Step] = []
        self._worker = worker

    def plan(self, request: Request) -> tuple[StagePlan, ...]:
        self.log.append(request)
        return self._worker.plan(request)

    def execute(self, step: Step) -> StepResult:
        self.log.append(step)
        return self._worker.execute(step)


def alone(path: Path | str, prompt: str, **sampling: Any) -> np.ndarray:
    with DiffGenerator.from_pretrained(path, threads=1) as generator:
        return generator.generate(prompt, **sampling)[0].frames


def pixels(answer: Any) -> np.ndarray:
    return np.asarray(shown(answer.data[0].b64_json).convert("RGB"))


# -------------------------------------------------------------------------------------------------------------- over HTTP
def test_a_request_goes_to_the_model_it_names_and_gets_what_that_makes_alone(client: OpenAI, flux_dev: Path) -> None:
    small = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 3}
    for names, path in ((("tiny", TINY), TINY), (("random", str(flux_dev)), flux_dev)):
        expected = alone(path, "a red circle", **small)[0]
        for name in names:
            assert np.array_equal(pixels(client.images.generate(prompt="a red circle", model=name, **SMALL)), expected)  # type: ignore[call-overload]


def test_without_a_name_it_is_the_first_that_makes_such_things(client: OpenAI, server: Running, wan: Path) -> None:
    asked = {"prompt": "a red circle", **SMALL}
    assert np.array_equal(
        pixels(client.images.generate(**asked)),  # type: ignore[call-overload]
        pixels(client.images.generate(model="tiny", **asked)),  # type: ignore[call-overload]
    )
    video = made(Sdk("sync", f"{server.url}/v1"), prompt="a red circle", extra_body={"num_inference_steps": 2, "seed": 3})
    assert (video.status, video.model, video.size) == ("completed", str(wan), "32x32")


def test_a_name_of_the_other_kind_is_refused(server: Running, wan: Path) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "x", "model": str(wan)})
    assert "/v1/videos" in check_refusal(answer, 400, param="model")["message"]
    answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "x", "model": "tiny"})
    assert "/v1/images/generations" in check_refusal(answer, 400, param="model")["message"]


def test_an_unknown_name_is_told_all_names(client: OpenAI, server: Running, wan: Path) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.images.generate(prompt="x", model="dall-e-3")
    assert error.value.code == "model_not_found"
    assert all(repr(name) in error.value.message for name in ("tiny", "random", str(wan)))
    answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "x", "model": "sora-2"})
    assert "'tiny'" in check_refusal(answer, 404, param="model")["message"]


def test_all_models_are_listed(client: OpenAI, server: Running, wan: Path, flux_dev: Path) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny", "random", str(wan)]
    assert [model.root for model in listed] == [TINY, str(flux_dev), str(wan)]  # type: ignore[attr-defined]
    assert client.models.retrieve(str(flux_dev)).id == client.models.retrieve("random").id == "random"
    described = httpx.get(f"{server.url}/models").json()
    assert described["model_path"] == TINY
    assert [model["task_type"] for model in described["models"]] == ["T2I", "T2I", "T2V"]


def test_a_remix_is_made_by_the_same_model(tmp_path: Path) -> None:
    with running(two_fakes("video"), tmp_path) as server:
        sdk = Sdk("sync", f"{server.url}/v1")
        first = made(sdk, prompt="x", model="second")
        assert (first.status, first.model) == ("completed", "second")
        remix = until(sdk, sdk("videos.remix", first.id, prompt="y").id, "completed", "failed")
        assert (remix.status, remix.model) == ("completed", "second")


@pytest.mark.parametrize("again", [FAKES[1], FAKES[0].split("?")[0]])
def test_no_model_is_loaded_twice(again: str) -> None:
    with pytest.raises(InvalidRequest, match="twice"):
        DiffGenerator.from_pretrained([*FAKES, again])


def test_a_job_whose_model_is_gone_fails_and_says_so(tmp_path: Path) -> None:
    slow = EngineOptions(model_path=["stepwell/fake-image", "stepwell/fake-video?step_ms=2000"])
    with running(RemoteEngine(slow), tmp_path, slow, served_model_name=NAMES, drain_seconds=0.1) as server:
        begun = Sdk("sync", f"{server.url}/v1")("videos.create", prompt="x")
        assert begun.model == "camera"
    with running(RemoteEngine(EngineOptions(model_path=FAKES[0])), tmp_path, served_model_name="painter") as server:
        ended = until(Sdk("sync", f"{server.url}/v1"), begun.id, "completed", "failed")
        assert ended.status == "failed" and ended.error is not None
        assert ended.error.code == "model_not_found" and "'camera'" in ended.error.message


def test_more_names_than_models_are_refused(tmp_path: Path) -> None:
    for names in (["a", "b", "c"], [FAKES[1]]):
        options = EngineOptions(model_path=FAKES)
        with pytest.raises(InvalidRequest, match="served_model_name"), running(
            RemoteEngine(options), tmp_path, options, served_model_name=names
        ):  # fmt: skip
            pass


def test_steps_are_counted_for_each_model_by_its_name(tmp_path: Path) -> None:
    options = EngineOptions(model_path=FAKES)
    with running(RemoteEngine(options), tmp_path, options, served_model_name="painter") as server:
        client = OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=0)
        client.images.generate(prompt="x", extra_body={"num_inference_steps": 3})
        made(Sdk("sync", f"{server.url}/v1"), prompt="x", extra_body={"num_inference_steps": 5})
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{server.url}/metrics").text.splitlines())
    for model, steps in (("painter", 3), (FAKES[1], 5)):
        for metric in ("step_seconds", "step_tokens", "batch_samples"):
            assert float(lines[f'stepwell_{metric}_count{{model="{model}",stage="denoise"}}']) == steps


def test_a_text_model_is_given_neither_pictures_nor_videos_to_make(text: Path, tmp_path: Path) -> None:
    options = EngineOptions(model_path=[str(text), TINY], threads=1)
    with running(open_engine(options), tmp_path, options, served_model_name="writer") as server:
        asked = {"prompt": "x", "size": "64x64", "num_inference_steps": 1}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=asked)
        assert answer.status_code == 200, answer.text
        answer = httpx.post(f"{server.url}/v1/images/generations", json={**asked, "model": "writer"})
        assert check_refusal(answer, 400, param="model")["message"] == "'writer' makes text; use POST /v1/chat/completions"
        answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "x"})
        assert "makes pictures" not in check_refusal(answer, 400, param="model")["message"]


# -------------------------------------------------------------------------------------------------------------- in Python
def test_generate_takes_a_model(wan: Path) -> None:
    with DiffGenerator.from_pretrained([TINY, wan], threads=1) as generator:
        assert generator.model.id == TINY
        small: dict[str, Any] = {"num_inference_steps": 2, "seed": 1}
        picture = generator.generate("a red circle", width=64, height=64, **small)[0]
        video = generator.generate("a red circle", model=wan, **small)[0]
        assert (picture.frames.shape, picture.parameters.model_path) == ((1, 64, 64, 3), TINY)
        assert (video.frames.shape, video.parameters.model_path) == ((5, 32, 32, 3), str(wan))
        with pytest.raises(ModelNotFound, match=f"(?s){TINY}.*{wan}"):
            generator.generate("x", model="elsewhere")
    assert np.array_equal(video.frames, alone(wan, "a red circle", **small))


def test_a_task_without_a_model_goes_to_the_first_that_does_it(engine: LocalEngine, wan: Path) -> None:
    sampling = SamplingParams(num_inference_steps=1, seed=1)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    assert engine.submit(Request("x", sampling, Task.TEXT_TO_VIDEO), events.put).model == str(wan)
    assert engine.submit(Request("x", sampling), events.put).model == TINY
    ends = 0
    while ends < 2:
        event = events.get(timeout=60)
        assert not isinstance(event, Failed), event
        ends += isinstance(event, Done)


# ------------------------------------------------------------------------------------------------------------ step by step
@pytest.mark.clock
def test_a_short_picture_does_not_wait_for_a_long_video(wan: Path, flux_dev: Path, tmp_path: Path) -> None:
    """Over HTTP: from the moment the picture is taken in until it is done, the video takes two steps at most."""
    options = EngineOptions(model_path=[str(wan), str(flux_dev)], threads=1)
    watched: list[Watched] = []

    def build_watched() -> StepExecutor:
        watched.append(Watched(build_worker(options)))
        return watched[0]

    with running(LocalEngine(build_watched), tmp_path, options, served_model_name=["camera", "painter"]) as server:
        client = OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=0)
        log = watched[0].log
        long = {"num_frames": 9, "num_inference_steps": 1000, "seed": 1}
        video = client.videos.create(prompt="x", model="camera", extra_body={**long, "width": 64, "height": 64})
        while sum(isinstance(each, Step) and each.stage == "denoise" for each in log) < 5:
            time.sleep(0.005)
        short = {"num_inference_steps": 4, "max_sequence_length": 64, "seed": 1}
        for _ in range(3):
            client.images.generate(prompt="x", model="painter", size="32x32", extra_body=short)  # type: ignore[call-overload]
        client.videos.delete(video.id)
    pictures = [each for each in log if isinstance(each, Request) and each.model == str(flux_dev)]
    assert len(pictures) == 3
    for picture in pictures:
        own = [place for place, each in enumerate(log) if isinstance(each, Step) and each.items[0][0] == f"{picture.id}/0"]
        meanwhile = [each for each in log[log.index(picture) : own[-1]] if isinstance(each, Step) and each.model == str(wan)]
        assert len(own) >= 4 and len(meanwhile) <= 2
    after = log[own[-1] + 1 :]
    assert any(isinstance(each, Step) and each.model == str(wan) for each in after), "the video was over before"


def test_a_step_never_mixes_models() -> None:
    """Two models whose stages have the same names, and four requests of each at once."""
    watched: list[Watched] = []

    def watch(worker: StepExecutor) -> StepExecutor:
        watched.append(Watched(worker))
        return watched[0]

    engine = two_fakes("image", watch)
    engine.open()
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    names = {}
    for number in range(8):
        request = engine.submit(Request("x", SamplingParams(seed=number), model=("first", "second")[number % 2]), events.put)
        names[request.id] = request.model
    for _ in names:
        while not isinstance(event := events.get(timeout=30), Done):
            assert not isinstance(event, Failed), event
    engine.shut()
    taken = [each for each in watched[0].log if isinstance(each, Step)]
    of_steps = [{names[sample_id.split("/")[0]] for sample_id, _ in step.items} for step in taken]
    assert all(models == {step.model} for models, step in zip(of_steps, taken, strict=True))
    assert max(len(step.items) for step in taken) > 1


def test_a_token_of_a_small_model_counts_for_less(engine: LocalEngine, wan: Path, flux_dev: Path) -> None:
    models = {model.id: model.parameters for model in engine.open().models}
    assert models[TINY] > 2_000_000 > 200_000 > max(models[str(flux_dev)], models[str(wan)])
    core = engine._core
    assert core is not None
    plans = {}
    for name in models:
        request = Request("x", SamplingParams(width=64, height=64, num_inference_steps=4, seed=1), model=name)
        plans[name] = core._worker.plan(complete(request, engine.open().of(request)))
    assert {stage.weight for stage in plans[TINY]} == {1.0}
    assert all(stage.cost == stage.tokens for stage in plans[TINY])
    assert all(1 / 64 <= stage.weight < 0.1 and 1 <= stage.cost <= stage.tokens for stage in plans[str(wan)])


# ---------------------------------------------------------------------------------------------------------- command line
def test_doctor_shows_every_model(flux_dev: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", TINY, str(flux_dev)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("attention backends here") == 2 and f"{TINY}: " in shown


def test_generate_refuses_several_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--model-path", TINY, "--model-path", "stepwell/fake-image"]) != 0
    assert "runs one model" in capsys.readouterr().err


def test_an_option_that_does_not_suit_one_model_names_it(wan: Path) -> None:
    with pytest.raises(InvalidRequest, match=str(wan)):
        DiffGenerator.from_pretrained([TINY, wan], threads=1, cache_method="dbcache", cache_dit_fn=5)


def test_an_option_that_does_not_suit_a_text_model_names_it(text: Path) -> None:
    with pytest.raises(Unsupported, match=f"{text}: quantization"):
        DiffGenerator.from_pretrained([TINY, text], threads=1, quantization="int8_weight_only")


def test_limits_are_asked_once_everything_is_loaded(text: Path, flux_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of models, so that none promises memory which the next one takes."""
    seen: list[str] = []
    load, fitting = build.build_text_worker, build.fitting
    monkeypatch.setattr(build, "build_text_worker", lambda *given: seen.append("text") or load(*given))
    monkeypatch.setattr(build, "fitting", lambda *given, **named: seen.append("limits") or fitting(*given, **named))
    for paths in ([text, flux_dev, TINY], [flux_dev, text, TINY]):
        with DiffGenerator.from_pretrained(paths, threads=1) as generator:
            assert [model.id for model in generator._info.models] == [str(path) for path in paths]
    assert seen == ["text", "limits", "limits"] * 2
