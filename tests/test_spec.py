"""Every command of the documents Stepwell measures itself by does what the table says: it runs, or is refused with a reason."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from benchmarks.cluster import Cluster, until
from stepwell.cli.main import main
from stepwell.config.schema import EngineOptions
from stepwell.generator import open_engine
from stepwell.models import hunyuan_video, wan
from tests import spec_commands
from tests.spec_commands import CLI, FRONTEND, HTTP, Cli, Http
from tests.support.dynamo import FAKE_VIDEO, IS_INSTALLED, Deployment, needs_dynamo
from tests.support.llada2 import text_repository
from tests.support.repositories import hunyuan_repository, wan_repository
from tests.support.sdk import details
from tests.support.server import fake, free_port, serving

LIMIT_S = 60


def as_run(row: Cli | Http) -> Cli | Http:
    """A server listens at a port of the test's own, whichever its row names."""
    if isinstance(row, Http) or "--port" not in row.arguments:
        return row
    at = row.arguments.index("--port")
    return replace(row, arguments=row.arguments[:at] + row.arguments[at + 2 :])


def params(rows: Sequence[Cli] | Sequence[Http]) -> list[Any]:
    """The rows by their numbers in the table, those that would be run in the same way as an earlier one left out."""
    runs = [as_run(row) for row in rows]
    return [
        pytest.param(row, id=f"{number}-{row.status}", marks=pytest.mark.long if isinstance(row, Cli) and row.shown else ())
        for number, row in enumerate(runs)
        if row not in runs[:number]
    ]


def command(row: Cli, folder: Path) -> list[str]:
    """The row's arguments, with a model and a config file of this machine in place of the names."""
    model = "stepwell/tiny-flux"
    if row.pipeline == spec_commands.WAN and row.status == "runs":
        model = str(wan_repository(folder / "model", dict(wan.T2V_1B.tiny)))
    elif row.pipeline == spec_commands.WAN_I2V:
        model = str(wan_repository(folder / "model", dict(wan.I2V_14B.tiny), pipeline=row.pipeline))
    elif row.pipeline == spec_commands.FAST:
        model = str(hunyuan_repository(folder / "FastHunyuan-diffusers", dict(hunyuan_video.FAST.tiny), shift=17.0))
    elif row.pipeline != spec_commands.FLUX:  # a repository of that class; its weights are never looked at
        repository = folder / "model"
        (repository / "transformer").mkdir(parents=True)
        (repository / "model_index.json").write_text(json.dumps({"_class_name": row.pipeline}))
        (repository / "transformer" / "config.json").write_text("{}")
        model = str(repository)
    data = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(data, "JPEG")
    picture = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    config = folder / f"config{row.config_suffix}"
    if row.config is not None:
        content = {**row.config, "model_path": model} if row.status == "runs" else row.config
        config.write_text(json.dumps(content) if row.config_suffix == ".json" else yaml.safe_dump(content))
    return [argument.format(model=model, config=config, picture=picture) for argument in row.arguments]


@pytest.mark.parametrize("row", params(CLI))
def test_command(row: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if row.status == "needs a GPU":
        pytest.skip(row.reason)
    arguments = command(row, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in row.env.items():
        monkeypatch.setenv(name, value)
    if row.status == "refused":
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert re.search(row.reason, error), error
        assert error.count("\n") == 1
    elif arguments[0] == "compare":
        for name in arguments[1:]:
            assert main(["generate", "--prompt", "A benchmark prompt", "--perf-dump-path", name, "--threads", "1"]) == 0
        capsys.readouterr()
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith("### Performance Comparison Report\n")
    elif arguments[0] == "serve":
        check_it_serves(arguments)
    elif arguments[0] == "worker":
        check_it_works(arguments)
    elif "--help" in arguments:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0 and "--prompt" in capsys.readouterr().out
    else:
        assert main([*arguments, *row.smaller, "--threads", "1"]) == 0
        (picture,) = (tmp_path / "outputs").iterdir()
        assert str(picture.relative_to(tmp_path)) in capsys.readouterr().out
        if "--perf-dump-path" in arguments:
            report = json.loads((tmp_path / arguments[arguments.index("--perf-dump-path") + 1]).read_bytes())
            assert {"step", "duration_ms"} == set(report["denoise_steps_ms"][0])


@pytest.mark.long
def test_the_config_files_command_verbatim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """45 frames of 1280 × 720 by two processes, of a random model."""
    row = next(row for row in CLI if row.smaller)
    arguments = command(row, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    (video,) = (tmp_path / "outputs").iterdir()
    assert details(video.read_bytes())[:2] == (45, (1280, 720))


def check_it_serves(arguments: list[str]) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "stepwell", *arguments, "--port", str(port)], stderr=subprocess.PIPE, env={**os.environ}
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
                    return
            time.sleep(0.2)
    finally:
        process.terminate()
        assert process.wait(20) == 0


def check_it_works(arguments: list[str]) -> None:
    """The worker registers, says that it is well, and leaves when asked to."""
    if not IS_INSTALLED:
        pytest.skip("NVIDIA Dynamo is not installed: make setup-dynamo")
    with Cluster() as cluster:
        worker = cluster.worker(*arguments[1:])
        until(lambda: cluster.check() or worker.health() == 200, LIMIT_S, "the worker")
        assert worker.stop() == 0


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """The bundled model, its VAE in bf16: that is most of a large picture's time, and takes a third less on a CPU."""
    engine = open_engine(EngineOptions(model_path="stepwell/tiny-flux", threads=1, vae_precision="bf16"))
    with serving(engine, "stepwell/tiny-flux") as url:
        yield url
    engine.shut()


@pytest.fixture(scope="module")
def text_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A random text model under the documents' name, which fills a block at once."""
    path = text_repository(tmp_path_factory.mktemp("text"), {"max_position_embeddings": 1024, "block_size": 32})
    (path / "quick.yaml").write_text("threshold: 0.0")
    engine = open_engine(EngineOptions(model_path=str(path), threads=1, dllm_algorithm_config=str(path / "quick.yaml")))
    with serving(engine, spec_commands.LLADA) as url:
        yield url
    engine.shut()


@pytest.fixture(scope="module")
def image_id(base_url: str) -> str:
    body = {"prompt": "a star", "response_format": "url", "size": "64x64"}
    url = httpx.post(f"{base_url}/v1/images/generations", json=body).json()["data"][0]["url"]
    return str(url).split("/")[3]


@pytest.fixture(scope="module")
def video_url() -> Iterator[str]:
    """Videos of 1280 × 720 pixels without weights: one that a model makes is in tests/zoo."""
    engine = fake("video")
    with serving(engine) as url:
        yield url
    engine.shut()


@pytest.fixture(scope="module")
def video_id(video_url: str) -> str:
    body = {"prompt": "a star", "size": "64x64"}
    return finished(video_url, httpx.post(f"{video_url}/v1/videos", json=body).json()["id"])


def finished(url: str, job: str) -> str:
    deadline = time.monotonic() + LIMIT_S
    while httpx.get(f"{url}/v1/videos/{job}").json()["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return job


@pytest.mark.parametrize("row", params(HTTP))
def test_call(row: Http, base_url: str, text_url: str, image_id: str, video_url: str, video_id: str) -> None:
    sent: dict[str, Any] = {"json": row.body}
    if row.form is not None:
        picture = io.BytesIO()
        Image.new("RGB", (80, 60), "red").save(picture, "PNG")
        sent = {"data": row.form, "files": {row.file: ("example.jpg", picture.getvalue())}}
    server = {"pictures": base_url, "videos": video_url, "text": text_url}[row.model]
    url = server + row.path.replace("{image}", image_id).replace("{video}", video_id)
    answer = httpx.request(row.method, url, headers={"Authorization": "Bearer sk-proj-1234567890"}, timeout=LIMIT_S, **sent)
    if row.status == "runs":
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"]
        if (row.method, row.path) == ("POST", "/v1/videos"):
            file = httpx.get(f"{server}/v1/videos/{finished(server, answer.json()['id'])}/content").content
            assert details(file)[1] == (1280, 720)
    else:
        assert answer.status_code in (400, 404), answer.text
        assert re.search(row.reason, answer.json()["error"]["message"]), answer.text


@needs_dynamo
@pytest.mark.parametrize("row", params(FRONTEND))
def test_call_to_the_frontend(row: Http, dynamo: Deployment) -> None:
    """A video of that size takes minutes on a CPU, so the one here is made without weights; the real one is tests/dynamo's."""
    check_the_frontend(dynamo, row, {"model": FAKE_VIDEO} if row.path == "/v1/videos" else row.smaller)


@needs_dynamo
@pytest.mark.long
def test_the_frontends_picture_verbatim(dynamo: Deployment) -> None:
    """1024 × 1024 pixels in 15 steps."""
    check_the_frontend(dynamo, next(row for row in FRONTEND if row.smaller), {})


def check_the_frontend(dynamo: Deployment, row: Http, smaller: dict[str, Any]) -> None:
    assert row.body is not None
    answer = dynamo.post(row.path, {**row.body, **smaller}, timeout=300)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if row.path == "/v1/chat/completions":
        message = found["choices"][0]["message"]
        assert message["role"] == "assistant" and message["content"].strip() and found["usage"]["completion_tokens"] > 0
    elif row.path == "/v1/completions":
        assert found["object"] == "text_completion" and found["choices"][0]["text"].strip()
    else:
        file = Path(found["data"][0]["url"].removeprefix("file://")).read_bytes()
        assert (
            Image.open(io.BytesIO(file)).size == (1024, 1024) if "images" in row.path else details(file)[:2] == (17, (832, 480))
        )


def test_how_many_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the score; the number that runs may only grow."""
    score = Counter(row.status for row in [*CLI, *HTTP, *(row for row in FRONTEND if row.model != "text")])
    with capsys.disabled():
        print(f"\ncommands of the documents: {dict(score)}, {sum(score.values())} in all")
    assert score["runs"] >= 40
