"""`stepwell worker` as a command: what it refuses before there is anything to serve."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from stepwell.cli.main import main
from tests.support.dynamo import needs_dynamo
from tests.support.llada2 import text_repository

IMAGE, VIDEO = "stepwell/fake-image", "stepwell/fake-video"
IMAGE_MODEL = "stepwell/tiny-flux"


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["worker", "--discovery-backend", "mem", *flags]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("stepwell worker: error: ")
    return error


@needs_dynamo
@pytest.mark.parametrize(("flags", "message"), [
    (["--model-path", VIDEO, "--image-diffusion-worker"], "True: 'stepwell/fake-video' makes videos"),
    (["--model-path", IMAGE, "--video-generation-worker"], "True: 'stepwell/fake-image' makes pictures"),
    (["--model-path", IMAGE, "--model-path", VIDEO, "--image-diffusion-worker"], "True: 'stepwell/fake-video' makes videos"),
    (["--model-path", IMAGE, "--model-path", VIDEO, "--endpoint", "dyn://a.b.c"], "each of 2 kinds has its own; leave it out"),
    (["--served-model-name", "a", "--served-model-name", "b"], "one for each of 1 models at most"),
    (["--model-path", IMAGE, "--served-model-name", ""], "served_model_name = '': must be a name"),
    (["--model-path", IMAGE, "--served-model-name", " a"], "served_model_name = ' a': must be a name"),
    (["--model-path", IMAGE, "--media-output-http-url", "https://x.example"], "keeps nothing there; give media_output_fs_url"),
    (["--model-path", IMAGE, "--media-output-fs-url", "ftp://x"], "media_output_fs_url = 'ftp://x': no storage"),
    (["--model-path", "no/such/model/here"], "model_path = 'no/such/model/here': no such folder"),
])  # fmt: skip
def test_what_can_not_be_served(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert message in refused(capsys, *flags)


@needs_dynamo
def test_two_models_of_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = [str(text_repository(tmp_path / name, {})) for name in ("one", "two")]
    said = refused(capsys, *(flag for path in (IMAGE_MODEL, *paths) for flag in ("--model-path", path)), "--threads", "1")
    assert f"{paths[0]!r} and {paths[1]!r} make text; a worker has one model of text: start several" in said


@pytest.mark.parametrize(("flags", "message"), [
    (["--endpoint", "dyn://backend"], "endpoint = 'dyn://backend': must be dyn://NAMESPACE.COMPONENT.ENDPOINT"),
    (["--namespace", "a.b"], "namespace = 'a.b': must be letters, digits, _ and -"),
    (["--namespace", ""], "namespace = '': must be letters"),
    (["--request-plane", "http"], "request_plane = 'http'"),
    (["--port", "1"], "it is an option of stepwell generate, serve"),
    (["--num-gpus", "2", "--sp-degree", "3"], "sp_degree = 3: takes num_gpus of as many"),
])  # fmt: skip
def test_what_is_wrong_with_an_option(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert message in refused(capsys, *flags)


def test_without_dynamo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        return None if name == "dynamo" else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    error = refused(capsys, "--enable-metrics", "--skip-tokenizer-init")
    assert "NVIDIA Dynamo is not installed: `make setup-dynamo`" in error
    assert "note: enable_metrics does not apply. No effect: DYN_SYSTEM_PORT is what serves metrics." in error
