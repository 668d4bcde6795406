"""stepwell compare: the whole text for two reports and for three, its thresholds, and files that are no reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stepwell.cli.main import main

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+"
QUICK = ["--width", "32", "--height", "32", "--num-inference-steps", "3", "--seed", "7", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report(total_ms: float, stages: dict[str, float], **more: Any) -> dict[str, Any]:
    steps = [{"name": name, "duration_ms": ms} for name, ms in stages.items()]
    return {"total_duration_ms": total_ms, "steps": steps, "commit_hash": f"c{total_ms:.0f}", **more}


def denoising(*all_ms: float) -> list[dict[str, float]]:
    return [{"step": step, "duration_ms": ms} for step, ms in enumerate(all_ms)]


BASE = report(
    2000,
    {"encode_text": 100, "denoise": 1000, "decode": 50},
    denoise_steps_ms=denoising(400, 200, 250, 150),
    memory_checkpoints={
        "after_denoise": {"allocated_mb": 900, "peak_allocated_mb": 1000},
        "after_decode": {"allocated_mb": 500, "peak_allocated_mb": 2000},
    },
    meta={"prompt": "a star", "seed": 1},
)
NEW = report(
    1500,
    {"encode_text": 105, "denoise": 850, "decode": 60, "save_output": 5},
    denoise_steps_ms=denoising(300, 150, 250),
    memory_checkpoints={"after_denoise": {"allocated_mb": 900, "peak_allocated_mb": 1500}},
    meta={"prompt": "a star", "seed": 2},
)
OTHER = report(2030, {"encode_text": 89, "denoise": 1000})
TWO = """\
### Performance Comparison Report

#### 1. High-level Summary
| Metric | Baseline | New | Diff | Status |
| :--- | :--- | :--- | :--- | :--- |
| **E2E Latency** | 2000.00 ms | 1500.00 ms | **-500.00 ms (-25.0%)** | ✅ |
| **Throughput** | 0.50 req/s | 0.67 req/s | - | - |

#### 2. Stage Breakdown
| Stage Name | Baseline (ms) | New (ms) | Diff (ms) | Diff (%) | Status |
| :--- | :--- | :--- | :--- | :--- | :--- |
| encode_text | 100.00 | 105.00 | +5.00 | +5.0% | ⚪️ |
| denoise | 1000.00 | 850.00 | -150.00 | -15.0% | 🟢 |
| decode | 50.00 | 60.00 | +10.00 | +20.0% | 🔴 |
| save_output | - | 5.00 | - | - | only in New |

#### 3. Denoising Steps
| Metric | Baseline (ms) | New (ms) | Diff (ms) | Diff (%) | Status |
| :--- | :--- | :--- | :--- | :--- | :--- |
| Count | 4 | 3 | -1 | -25.0% | - |
| Median | 225.00 | 250.00 | +25.00 | +11.1% | 🔴 |
| Max | 400.00 | 300.00 | -100.00 | -25.0% | 🟢 |
| First step | 400.00 | 300.00 | -100.00 | -25.0% | 🟢 |

#### 4. Memory
| Highest Of | Baseline (MB) | New (MB) | Diff (MB) | Diff (%) | Status |
| :--- | :--- | :--- | :--- | :--- | :--- |
| allocated | 900.00 | 900.00 | +0.00 | +0.0% | ⚪️ |
| peak_allocated | 2000.00 | 1500.00 | -500.00 | -25.0% | 🟢 |

<details>
<summary>Metadata</summary>

- Baseline Commit: `c2000`
- New Commit: `c1500`
- Timestamp: TIME
- New Differs: `seed` `1` → `2`
</details>
"""
THREE = """\
### Performance Comparison Report

#### 1. High-level Summary
| Metric | Baseline | new | other |
| :--- | :--- | :--- | :--- |
| **E2E Latency** | 2000.00 ms | 1500.00 ms (-25.0%) ✅ | 2030.00 ms (+1.5%) ⚪️ |

#### 2. Stage Breakdown
| Stage Name | Baseline (ms) | new (ms) | other (ms) |
| :--- | :--- | :--- | :--- |
| encode_text | 100.00 | 105.00 (+5.0%) ⚪️ | 89.00 (-11.0%) 🟢 |
| denoise | 1000.00 | 850.00 (-15.0%) 🟢 | 1000.00 (+0.0%) ⚪️ |
| decode | 50.00 | 60.00 (+20.0%) 🔴 | - |
| save_output | - | 5.00 | - |

#### 3. Denoising Steps
| Metric | Baseline (ms) | new (ms) | other (ms) |
| :--- | :--- | :--- | :--- |
| Count | 4 | 3 | - |
| Median | 225.00 | 250.00 (+11.1%) 🔴 | - |
| Max | 400.00 | 300.00 (-25.0%) 🟢 | - |
| First step | 400.00 | 300.00 (-25.0%) 🟢 | - |

#### 4. Memory
| Highest Of | Baseline (MB) | new (MB) | other (MB) |
| :--- | :--- | :--- | :--- |
| allocated | 900.00 | 900.00 (+0.0%) ⚪️ | - |
| peak_allocated | 2000.00 | 1500.00 (-25.0%) 🟢 | - |

<details>
<summary>Metadata</summary>

- Baseline Commit: `c2000`
- new Commit: `c1500`
- other Commit: `c2030`
- Timestamp: TIME
- new Differs: `seed` `1` → `2`
</details>
"""


def compared(capsys: pytest.CaptureFixture[str], **reports: dict[str, Any]) -> str:
    for name, content in reports.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["compare", *(f"{name}.json" for name in reports)]) == 0
    return re.sub(TIME, "TIME", capsys.readouterr().out)


def test_two_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(capsys, baseline=BASE, new=NEW) == TWO


def test_three_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(capsys, baseline=BASE, new=NEW, other=OTHER) == THREE


def test_reports_without_steps_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Such as other programs write."""
    shown = compared(capsys, a={**report(100, {"x": 1}), "unknown": [1]}, b=report(100, {"x": 1}))
    assert "#### 2. Stage Breakdown" in shown and "#### 3" not in shown and "#### 4" not in shown


@pytest.mark.parametrize(
    ("new_ms", "status"), [(97.9, "✅"), (98.0, "⚪️"), (100.0, "⚪️"), (102.0, "⚪️"), (102.1, "❌")]
)  # fmt: skip
def test_when_the_whole_is_better(new_ms: float, status: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"%)** | {status} |" in compared(capsys, a=report(100, {"x": 1}), b=report(new_ms, {"x": 1}))


@pytest.mark.parametrize(
    ("base_ms", "new_ms", "status"),
    [
        (1, 0.89, "🟢"), (1, 0.95, "⚪️"), (1, 1.05, "⚪️"), (1, 1.11, "🔴"),  # however short
        (9000, 8000, "🟢"), (9000, 8900, "⚪️"), (9000, 9100, "⚪️"), (9000, 10000, "🔴"), (0, 1, "🔴"), (0, 0, "⚪️"),
    ],
)  # fmt: skip
def test_when_a_stage_is_better(base_ms: float, new_ms: float, status: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = compared(capsys, a=report(100, {"x": base_ms}), b=report(100, {"x": new_ms}))
    assert re.search(rf"^\| x \|.* {status} \|$", shown, re.MULTILINE), shown


def test_a_stage_that_was_dropped_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = compared(capsys, a=report(100, {"x": 1, "y": 2}), b=report(100, {"x": 1}))
    assert "| y | 2.00 | - | - | - | only in Baseline |" in shown


def test_names_cannot_leave_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    shown = compared(capsys, a=report(1, {"a|b\nc": 1}), b=report(1, {"a|b\nc": 1}, commit_hash="`x`\n# y"))
    assert "| a\\|b c | 1.00 |" in shown and "- New Commit: `'x' # y`" in shown


def test_files_of_one_name_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [Path("a/perf.json"), Path("b/perf.json"), Path("c/perf.json")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(BASE))
    assert main(["compare", *map(str, paths)]) == 0
    assert "| Metric | Baseline | b/perf.json | c/perf.json |" in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_files(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.json").write_text(json.dumps(BASE))
    assert main(["compare", *["a.json"] * count]) == 2
    assert capsys.readouterr().err == "stepwell compare: error: Need at least 2 files to compare\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "not a timing report"),
        (b"{", "not a timing report"),
        (b"\xff\xfe", "not a timing report"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `total_duration_ms`"),
        (b'{"total_duration_ms": 1}', "missing required field `steps`"),
        (b'{"total_duration_ms": "1", "steps": []}', "$.total_duration_ms"),
        (b'{"total_duration_ms": 0, "steps": []}', "> 0.0 - at `$.total_duration_ms"),
        (b'{"total_duration_ms": NaN, "steps": []}', "not a timing report"),
        (b'{"total_duration_ms": 1, "steps": [{"name": "x"}]}', "missing required field `duration_ms` - at `$.steps[0]"),
        (b'{"total_duration_ms": 1, "steps": [{"name": "x", "duration_ms": -1}]}', "$.steps[0].duration_ms"),
        (b'{"total_duration_ms": 1, "steps": [], "denoise_steps_ms": [1]}', "$.denoise_steps_ms[0]"),
        (b'{"total_duration_ms": 1, "steps": [], "memory_checkpoints": {"x": {"y": "z"}}}', "$.memory_checkpoints"),
        (b"[" * 100_000, "not a timing report"),
    ],
)
def test_files_that_are_no_reports(content: bytes | None, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("good.json").write_text(json.dumps(BASE))
    if content is not None:
        Path("bad.json").write_bytes(content)
    for order in (["good.json", "bad.json"], ["bad.json", "good.json"]):
        assert main(["compare", *order]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("stepwell compare: error: bad.json: ") and words in captured.err, captured.err
        assert captured.err.count("\n") == 1 and not captured.out


def test_a_folder_and_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    assert main(["compare", "folder", "folder"]) == 2
    assert "folder: Is a directory" in capsys.readouterr().err
    assert main(["compare", "--fast", "a", "b"]) == 2
    assert "--fast" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "--help"])
    assert exit_.value.code == 0 and "the first is the baseline" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "compare " in capsys.readouterr().out


def test_what_generate_writes(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        assert main(["generate", "--prompt", "a star", *QUICK, "--perf-dump-path", f"{name}.json"]) == 0
    capsys.readouterr()
    assert main(["compare", "one.json", "two.json"]) == 0
    shown = capsys.readouterr().out
    assert "| Count | 3 | 3 | +0 | +0.0% | - |" in shown and "| host_anon | " in shown and "Differs" not in shown
    for stage in ("queued", "encode_text", "prepare_latents", "denoise", "decode", "save_output"):
        assert f"| {stage} | " in shown
