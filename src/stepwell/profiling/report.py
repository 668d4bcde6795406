"""The timing report of a run: a JSON file of a few kilobytes, which `stepwell compare` reads again.

Fields and their names are those of SGLang Diffusion's `--perf-dump-path`. `total_duration_ms` is wall-clock time from the
request to the last file saved. Of several outputs, `steps`, `denoise_steps_ms` and `memory_checkpoints` are those of the one
that was ready last, so that the parts never exceed the whole; `outputs` then has them all.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from stepwell.errors import InvalidRequest

Ms = Annotated[float, msgspec.Meta(ge=0)]
Megabytes = Annotated[float, msgspec.Meta(ge=0)]
GIT_S = 5.0


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage, `queued` before the first and `save_output` after the last."""

    name: str
    duration_ms: Ms


@dataclass(frozen=True, slots=True)
class StepTime:
    """One denoising step, counted from 0."""

    step: int
    duration_ms: Ms


@dataclass(frozen=True, slots=True)
class OutputTimes:
    """One output of several. `total_duration_ms` ends when its pixels are there."""

    index: int
    seed: int
    total_duration_ms: Ms
    steps: list[StageTime]
    denoise_steps_ms: list[StepTime]
    memory_checkpoints: dict[str, dict[str, Megabytes]]

    @classmethod
    def of(
        cls,
        index: int,
        seed: int,
        timings_ms: Mapping[str, float],
        denoise_ms: Sequence[float],
        memory_mb: Mapping[str, Mapping[str, float]],
    ) -> OutputTimes:
        """From what `types.Output` holds."""
        return cls(
            index,
            seed,
            round(timings_ms["total"], 3),
            [StageTime(name, round(ms, 3)) for name, ms in timings_ms.items() if name != "total"],
            [StepTime(step, round(ms, 3)) for step, ms in enumerate(denoise_ms)],
            {f"after_{stage}": {f"{name}_mb": mb for name, mb in held.items()} for stage, held in memory_mb.items()},
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report. All that a comparison can do without has a default."""

    total_duration_ms: Annotated[float, msgspec.Meta(gt=0)]
    steps: list[StageTime]
    timestamp: str = ""
    request_id: str = ""
    commit_hash: str = "unknown"
    tag: str = ""
    denoise_steps_ms: list[StepTime] = field(default_factory=list)
    memory_checkpoints: dict[str, dict[str, Megabytes]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    outputs: list[OutputTimes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """What a report says beside times: of which request, by which code, and with which parameters."""

    request_id: str
    commit_hash: str
    meta: dict[str, Any]


def report(run: Run, outputs: Sequence[OutputTimes], total_ms: float, save_ms: float) -> Report:
    """The report of a request that ends now. `save_ms` of `total_ms` went into encoding and saving."""
    last = max(outputs, key=lambda output: output.total_duration_ms)
    return Report(
        total_duration_ms=round(total_ms, 3),
        steps=[*last.steps, StageTime("save_output", round(save_ms, 3))],
        timestamp=datetime.now(UTC).isoformat(),
        request_id=run.request_id,
        commit_hash=run.commit_hash,
        tag="cli_generate",
        denoise_steps_ms=last.denoise_steps_ms,
        memory_checkpoints=last.memory_checkpoints,
        meta=run.meta,
        outputs=list(outputs) if len(outputs) > 1 else [],
    )


def to_json(made: Report) -> bytes:
    """The file's content; what came out of the schema's order reads as a person would: who, how long, of what."""
    plain = msgspec.to_builtins(made)
    order = ("timestamp", "request_id", "commit_hash", "tag", "total_duration_ms", "steps", "denoise_steps_ms",
             "memory_checkpoints", "meta", *(["outputs"] if made.outputs else []))  # fmt: skip
    return msgspec.json.format(msgspec.json.encode({name: plain[name] for name in order}), indent=2) + b"\n"


def read_report(path: Path) -> Report:
    """A report from its file. Raises InvalidRequest naming the file and what is wrong with it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", param="files") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path}: not a timing report: {error}", param="files") from None


def commit_hash() -> str | None:
    """The commit this package runs from, with `-dirty` if files were changed since; None where it is not a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=GIT_S, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a package in somebody else's checkout is not of its commit
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
