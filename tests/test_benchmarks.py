"""The benchmarks run at all: the smallest case, compared with diffusers' output as always, and a server without a model
under a little load. Nothing timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import dynamo, gpu, policy, quant, samplers, serve, text, video
from benchmarks.accelerate import tables
from benchmarks.run import CASES, LIMIT, one_step
from tests.support.dynamo import needs_dynamo


def test_one_small_case() -> None:
    case = replace(CASES["T"], rounds=1)
    report = one_step(case, "fp32", compiled=False)
    assert report["relative_error"] < 1e-4
    assert [timing["name"] for timing in report["one"]] == ["diffusers eager", "stepwell", LIMIT]


def test_one_small_video_step() -> None:
    report = video.one_step(replace(video.CASES["tiny"], rounds=1), "fp32")
    assert report["relative_error"] < 1e-4
    assert [timing["name"] for timing in report["one"]] == ["diffusers eager", "stepwell", LIMIT]


def test_serving_under_a_little_load(tmp_path: Path) -> None:
    report = serve.main(["--quick", "--model-path", "stepwell/fake-image?step_ms=1", "--output", str(tmp_path)])
    tables = [report["load"]["burst"], report["load"]["poisson"], *report["policy"]["tables"].values()]
    assert [table["all"]["requests"] for table in tables] == [15, 15, 20, 20]
    assert not [error for table in tables for error in table["all"]["errors"]] and not report["overhead"]["errors"]
    assert json.loads(next(tmp_path.glob("*-serve.json")).read_text()) == report
    assert "Our p50 over FIFO's" in next(tmp_path.glob("*-serve.md")).read_text()


def test_one_quantised_layer(tmp_path: Path) -> None:
    report = quant.main(["--quick", "--output", str(tmp_path)])
    assert {len(layer["timings"]) for layer in report["layers"]} == {6}
    assert report["memory"]["fp32"]["int8_dynamic"] < 0.5 * report["memory"]["fp32"]["plain"]
    assert json.loads(next(tmp_path.glob("*-quant.json")).read_text()) == report
    assert "1.00×" in next(tmp_path.glob("*-quant.md")).read_text()


def test_texts_of_three_schedules(tmp_path: Path) -> None:
    report = text.main(["--quick", "--only", "512", "--output", str(tmp_path)])
    assert len(report["results"]) == 3
    for result in report["results"]:
        served, peer = result["served"], result["blockwise"]
        assert served["tokens"] == peer["tokens"] and peer["same_texts"] == 1
        assert served["commits"] == 0 and peer["forwards_ratio"] > 1.25 and peer["first_forwards"] > served["first_forwards"] + 16
    assert json.loads(next(tmp_path.glob("*-text.json")).read_text()) == report
    assert "Against `blockwise`" in next(tmp_path.glob("*-text.md")).read_text()


def test_the_policy_under_load(tmp_path: Path) -> None:
    report = policy.main(["--quick", "--output", str(tmp_path)])
    assert report == policy.main(["--quick", "--output", str(tmp_path)]) == json.loads((tmp_path / "policy.json").read_text())
    pictures = [row for row in report["rows"] if row["mix"].startswith("pictures") and row["kind"].startswith("picture")]
    mean = {row["policy"]: row["mean"] for row in pictures}
    assert 1 <= mean["no ageing"] <= mean["today's"] < mean["fifo"] / 5
    assert "| picture, 8 × 1,024 tokens |" in (tmp_path / "policy.md").read_text()


@pytest.mark.parametrize("part", ["flux", "wan", "text"])
def test_a_part_of_what_a_gpu_shows(part: str) -> None:
    """Small, and on a CPU where there is no GPU; that pictures are diffusers' is asserted within."""
    for result in gpu.PARTS[part](small=True):
        assert result["case"] and all(ms > 0 for ms in result["ms"].values())


def test_samplers_do_what_the_references_do() -> None:
    rows = samplers.main(["--steps", "4", "--rounds", "1"])
    assert {row["sampler"] for row in rows} == {"UniPC", "Euler", "DMD"} and all(row["error"] < 1e-6 for row in rows)


@needs_dynamo
def test_dynamo_around_a_request(tmp_path: Path) -> None:
    report = dynamo.main(["--quick", "--only", "overhead", "--output", str(tmp_path)])
    assert set(report["overhead"]["wall"]) == {"connection kept", "a connection each", "the engine alone"}
    assert "| the engine alone |" in next(tmp_path.glob("*-dynamo.md")).read_text()


def test_the_docs_show_what_was_measured() -> None:
    report = json.loads(Path("benchmarks/results/amd-epyc-dynamo.json").read_text())
    measured = dynamo.markdown(report)
    assert measured == Path("benchmarks/results/amd-epyc-dynamo.md").read_text()
    assert measured.partition("\n\n")[2].strip() in Path("docs/dynamo.md").read_text()


def test_the_readme_shows_what_was_measured() -> None:
    report = json.loads(Path("benchmarks/results/amd-epyc-accelerate.json").read_text())
    quality, bookkeeping = tables(report)
    assert quality in Path("README.md").read_text()
    assert bookkeeping in Path("benchmarks/results/amd-epyc-accelerate.md").read_text()
