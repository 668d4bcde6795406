"""generate --perf-dump-path: the report's format, what its figures add up to, and paths that can't be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stepwell import DiffGenerator, __version__
from stepwell.cli.main import main
from stepwell.config.schema import OutputOptions

QUICK = ["--width", "32", "--height", "32", "--num-inference-steps", "3", "--seed", "7", "--threads", "1"]
GENERATE = ["generate", "--prompt", "a star", *QUICK]
STAGES = ["encode_text", "prepare_latents", "denoise", "decode"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dumped(*more: str) -> dict[str, Any]:
    assert main([*GENERATE, "--perf-dump-path", "perf.json", *more]) == 0
    found: dict[str, Any] = json.loads(Path("perf.json").read_bytes())
    return found


def duration(report: dict[str, Any], name: str) -> float:
    (found,) = [step["duration_ms"] for step in report["steps"] if step["name"] == name]
    return float(found)


def test_the_format(capsys: pytest.CaptureFixture[str]) -> None:
    report = dumped()
    assert "saved perf.json (timing report)\n" in capsys.readouterr().out
    assert list(report) == [
        "timestamp", "request_id", "commit_hash", "tag", "total_duration_ms", "steps", "denoise_steps_ms", "memory_checkpoints",
        "meta",
    ]  # fmt: skip
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(report["timestamp"]) < timedelta(minutes=1)
    assert re.fullmatch(r"req-\w{24}", report["request_id"]) and report["tag"] == "cli_generate"
    assert [step["name"] for step in report["steps"]] == ["queued", *STAGES, "save_output"]
    assert [step["step"] for step in report["denoise_steps_ms"]] == [0, 1, 2]
    assert all(set(step) == {"step", "duration_ms"} for step in report["denoise_steps_ms"])
    meta = report["meta"]
    assert (meta["prompt"], meta["model"], meta["seed"]) == ("a star", "stepwell/tiny-flux", 7)
    assert (meta["width"], meta["height"], meta["num_inference_steps"], meta["dit_precision"]) == (32, 32, 3, "fp32")
    assert meta["options"] == {"threads": 1} and meta["cache_report"] is None
    assert Path("perf.json").read_text().startswith('{\n  "timestamp": "')


def test_the_commit_is_that_of_the_code() -> None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "HEAD")
    known = (commit, f"{commit}-dirty") if git("ls-files", "src/stepwell/profiling/report.py") else (f"v{__version__}",)
    assert dumped()["commit_hash"] in known


def test_the_parts_never_exceed_the_whole() -> None:
    report = dumped()
    parts = sum(step["duration_ms"] for step in report["steps"])
    assert all(step["duration_ms"] > 0 for step in report["steps"])
    assert 0 < parts <= report["total_duration_ms"]
    denoising = sum(step["duration_ms"] for step in report["denoise_steps_ms"])
    assert denoising == pytest.approx(duration(report, "denoise"), abs=0.01)


def test_the_whole_has_encoding_and_saving_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def slowly(*arguments: Any, **options: Any) -> None:
        time.sleep(0.3)
        save(*arguments, **options)

    monkeypatch.setattr(Image.Image, "save", slowly)
    report = dumped()
    assert duration(report, "save_output") >= 300
    assert report["total_duration_ms"] >= sum(step["duration_ms"] for step in report["steps"])
    assert duration(dumped("--no-save-output"), "save_output") < 100


def test_memory_after_every_stage() -> None:
    memory = dumped()["memory_checkpoints"]
    assert list(memory) == [f"after_{stage}" for stage in STAGES]
    for held in memory.values():
        assert {"host_resident_mb", "host_anon_mb", "peak_host_resident_mb"} <= set(held)
        assert 50 < held["host_anon_mb"] <= held["host_resident_mb"] <= held["peak_host_resident_mb"] * 1.01
    peaks = [held["peak_host_resident_mb"] for held in memory.values()]
    assert peaks == sorted(peaks)


def test_several_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    report = dumped("--num-outputs-per-prompt", "3", "--max-batch-tokens", "1")
    assert [(output["index"], output["seed"]) for output in report["outputs"]] == [(0, 7), (1, 8), (2, 9)]
    assert report["meta"]["num_outputs_per_prompt"] == 3
    last = max(report["outputs"], key=lambda output: output["total_duration_ms"])
    assert report["steps"][:-1] == last["steps"] and report["denoise_steps_ms"] == last["denoise_steps_ms"]
    for output in report["outputs"]:
        assert len(output["denoise_steps_ms"]) == 3 and list(output["memory_checkpoints"])[-1] == "after_decode"
        assert sum(step["duration_ms"] for step in output["steps"]) <= output["total_duration_ms"]
    assert sum(step["duration_ms"] for step in report["steps"]) <= report["total_duration_ms"]


def test_starting_from_a_picture() -> None:
    Image.new("RGB", (32, 32), "red").save("start.png")
    report = dumped("--image-path", "start.png", "--strength", "0.7")
    assert [step["name"] for step in report["steps"]] == [
        "queued", "encode_text", "encode_image", "prepare_latents", "denoise", "decode", "save_output"
    ]  # fmt: skip
    assert len(report["denoise_steps_ms"]) == 3  # of 3 steps, 0.7 leaves 3 - int(0.9)
    assert report["meta"]["strength"] == 0.7


def test_a_file_is_replaced_and_folders_are_made() -> None:
    Path("perf.json").write_text("old")
    dumped()
    assert main([*GENERATE, "--perf-dump-path", "new/folder/perf.json"]) == 0
    assert [path.name for path in Path("new/folder").iterdir()] == ["perf.json"]
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["new", "outputs", "perf.json"]


def test_a_file_appears_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("perf.json").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main([*GENERATE, "--no-save-output", "--perf-dump-path", "perf.json"]) == 2
    assert "perf.json can't be written: No space left on device" in capsys.readouterr().err
    assert Path("perf.json").read_text() == "old"
    assert [path.name for path in Path.cwd().iterdir() if path.is_file()] == ["perf.json"]


@pytest.mark.parametrize(
    "path",
    [
        *("/proc/nowhere/perf.json", "folder", "file/perf.json", "/dev/null", "x" * 300 + ".json", "a\0b.json", "a\0b/perf.json"),
        *("outputs/picture.png", "picture.WEBP", "frames.npy"),  # a picture of the run could have this name
    ],
)
def test_a_path_that_cannot_be_is_refused_before_loading(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    assert main([*GENERATE, "--perf-dump-path", path, "--model-path", "/nowhere"]) == 2
    error = capsys.readouterr().err
    assert f"perf_dump_path = {path!r}" in error and error.count("\n") == 1
    assert not list(Path("folder").iterdir())


def test_a_failed_run_writes_none() -> None:
    assert main([*GENERATE, "--perf-dump-path", "perf.json", "--width", "33"]) == 2
    assert not Path("perf.json").exists()


def test_serve_has_no_such_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--perf-dump-path", "perf.json"]) == 2
    assert "'--perf-dump-path' on the command line; it is an option of stepwell generate" in capsys.readouterr().err
    assert "perf_dump_path" in OutputOptions.model_fields


def test_python_has_the_same_figures(tiny: DiffGenerator) -> None:
    made = tiny.generate("a star", width=32, height=32, num_inference_steps=3, num_outputs_per_prompt=2)
    for output in made:
        assert sum(output.denoise_ms) == pytest.approx(output.timings["denoise"]) and len(output.denoise_ms) == 3
        assert list(output.memory_mb) == STAGES
    assert made[0].request_id == made[1].request_id
