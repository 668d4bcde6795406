"""What changed between timing reports, as Markdown to paste into a pull request.

The first two sections are those of SGLang Diffusion's compare_perf.py; a stage's status is relative alone, so that a short one
can be better or worse too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from stepwell.profiling.report import Report

E2E_PERCENT = 2.0  # of the whole: less is noise
PART_PERCENT = 10.0  # of a stage, a step or memory
SAME, FASTER, SLOWER, GREEN, RED = "⚪️", "✅", "❌", "🟢", "🔴"


@dataclass(frozen=True, slots=True)
class Row:
    """A quantity and its value in every report, None where it is missing. `unit` follows it in a table of two."""

    name: str
    values: tuple[float | None, ...]
    is_count: bool = False  # neither good nor bad


def compare(reports: Sequence[tuple[str, Report]]) -> str:
    """The comparison of two or more labelled reports with the first one."""
    labels = ["Baseline", "New"] if len(reports) == 2 else ["Baseline", *(_cell(label) for label, _ in reports[1:])]
    made = [report for _, report in reports]
    table = _pair if len(made) == 2 else _many
    lines = ["### Performance Comparison Report", "", "#### 1. High-level Summary", *_summary(labels, made), ""]
    lines += ["#### 2. Stage Breakdown", *table("Stage Name", labels, _stages(made), " (ms)"), ""]
    if any(report.denoise_steps_ms for report in made):
        lines += ["#### 3. Denoising Steps", *table("Metric", labels, _denoising(made), " (ms)"), ""]
    if any(report.memory_checkpoints for report in made):
        lines += ["#### 4. Memory", *table("Highest Of", labels, _memory(made), " (MB)"), ""]
    return "\n".join(lines + _metadata(labels, made))


# -------------------------------------------------------------------------------------------------------------- tables
def _summary(labels: list[str], made: list[Report]) -> list[str]:
    base, *others = (report.total_duration_ms for report in made)
    if len(others) > 1:
        cells = [f"{ms:.2f} ms ({_percent(base, ms):+.1f}%) {_e2e(base, ms)}" for ms in others]
        return [*_header("Metric", *labels), _line("**E2E Latency**", f"{base:.2f} ms", *cells)]
    new = others[0]
    difference = f"**{new - base:+.2f} ms ({_percent(base, new):+.1f}%)**"
    return [
        *_header("Metric", *labels, "Diff", "Status"),
        _line("**E2E Latency**", f"{base:.2f} ms", f"{new:.2f} ms", difference, _e2e(base, new)),
        _line("**Throughput**", f"{1000 / base:.2f} req/s", f"{1000 / new:.2f} req/s", "-", "-"),
    ]


def _pair(what: str, labels: list[str], rows: list[Row], unit: str) -> list[str]:
    """A table of two reports."""
    lines = _header(what, *(f"{label}{unit}" for label in labels), f"Diff{unit}", "Diff (%)", "Status")
    for row in rows:
        base, new = row.values
        if base is None or new is None:
            lines.append(_line(row.name, _number(row, base), _number(row, new), "-", "-", "only in " + labels[base is None]))
            continue
        difference = f"{new - base:+.0f}" if row.is_count else f"{new - base:+.2f}"
        percent = f"{_percent(base, new):+.1f}%" if base else "-"
        lines.append(_line(row.name, _number(row, base), _number(row, new), difference, percent, _part(row, base, new)))
    return lines


def _many(what: str, labels: list[str], rows: list[Row], unit: str) -> list[str]:
    """A table of three reports or more."""
    lines = _header(what, *(f"{label}{unit}" for label in labels))
    for row in rows:
        base, *others = row.values
        lines.append(_line(row.name, _number(row, base), *(_against(row, base, new) for new in others)))
    return lines


def _against(row: Row, base: float | None, new: float | None) -> str:
    if not base or new is None or row.is_count:
        return _number(row, new)
    return f"{_number(row, new)} ({_percent(base, new):+.1f}%) {_part(row, base, new)}"


def _header(*names: str) -> list[str]:
    return [_line(*names), _line(*([":---"] * len(names)))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that can't leave its cell."""
    return " ".join(text.replace("|", "\\|").split())


def _number(row: Row, value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if row.is_count else f"{value:.2f}"


# ---------------------------------------------------------------------------------------------------------------- rows
def _stages(made: list[Report]) -> list[Row]:
    """Every stage of any report, in the order they first appear; a name that comes twice counts as one."""
    sums: list[dict[str, float]] = []
    for report in made:
        found: dict[str, float] = {}
        for stage in report.steps:
            found[stage.name] = found.get(stage.name, 0.0) + stage.duration_ms
        sums.append(found)
    names = dict.fromkeys(name for found in sums for name in found)
    return [Row(_cell(name), tuple(found.get(name) for found in sums)) for name in names]


def _denoising(made: list[Report]) -> list[Row]:
    all_ms = [[step.duration_ms for step in report.denoise_steps_ms] for report in made]

    def of(function: Callable[[list[float]], float]) -> tuple[float | None, ...]:
        return tuple(function(ms) if ms else None for ms in all_ms)

    return [
        Row("Count", of(len), is_count=True),
        Row("Median", of(statistics.median)),
        Row("Max", of(max)),
        Row("First step", of(lambda ms: ms[0])),
    ]


def _memory(made: list[Report]) -> list[Row]:
    """The highest value of every figure over all checkpoints."""
    most: list[dict[str, float]] = []
    for report in made:
        found: dict[str, float] = {}
        for held in report.memory_checkpoints.values():
            for name, amount in held.items():
                found[name] = max(found.get(name, 0.0), amount)
        most.append(found)
    names = dict.fromkeys(name for found in most for name in found)
    return [Row(_cell(name.removesuffix("_mb")), tuple(found.get(name) for found in most)) for name in names]


# -------------------------------------------------------------------------------------------------------------- judging
def _percent(base: float, new: float) -> float:
    return (new - base) / base * 100


def _e2e(base: float, new: float) -> str:
    percent = _percent(base, new)
    return FASTER if percent < -E2E_PERCENT else SLOWER if percent > E2E_PERCENT else SAME


def _part(row: Row, base: float, new: float) -> str:
    if row.is_count:
        return "-"
    if not base:
        return RED if new else SAME
    percent = _percent(base, new)
    return GREEN if percent < -PART_PERCENT else RED if percent > PART_PERCENT else SAME


def _metadata(labels: list[str], made: list[Report]) -> list[str]:
    """The commits, and, where runs were not of the same thing, what they differ in."""
    lines = ["<details>", "<summary>Metadata</summary>", ""]
    lines += [f"- {label} Commit: `{_code(report.commit_hash)}`" for label, report in zip(labels, made, strict=True)]
    lines.append(f"- Timestamp: {datetime.now().isoformat()}")
    base = made[0].meta
    for label, report in zip(labels[1:], made[1:], strict=True):
        for name in (name for name in base if name in report.meta and report.meta[name] != base[name]):
            lines.append(f"- {label} Differs: `{_code(name)}` `{_code(base[name])}` → `{_code(report.meta[name])}`")
    return [*lines, "</details>"]


def _code(value: object) -> str:
    return " ".join(str(value).replace("`", "'").split())
