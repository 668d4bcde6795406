"""The benchmark runs at all: its smallest case, compared with diffusers' output as always, nothing timed."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.run import CASES, one_step


def test_one_small_case() -> None:
    case = replace(CASES["T"], rounds=1)
    report = one_step(case, "fp32", compiled=False)
    assert report["relative_error"] < 1e-4
    assert [timing["name"] for timing in report["one"]] == ["diffusers eager", "stepwell"]
