"""What --perf-dump-path writes of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from stepwell import __version__
from stepwell.api.answers import cache_answer
from stepwell.config.paths import make_folder, unwritable
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest
from stepwell.media.images import FORMATS, write_whole
from stepwell.profiling.report import OutputTimes, Run, commit_hash, report, to_json

if TYPE_CHECKING:
    from stepwell.generator import GeneratedOutput

PARAM = "perf_dump_path"


class Stopwatch:
    """Wall-clock time of a run: until its pixels are there, and until its files are saved."""

    def __init__(self) -> None:
        self._began = self._generated = time.perf_counter()

    def generated(self) -> None:
        self._generated = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(milliseconds so far, milliseconds since the pixels were there)"""
        now = time.perf_counter()
        return (now - self._began) * 1e3, (now - self._generated) * 1e3


def check_path(path: Path) -> None:
    """Find out before a model is loaded whether the report can be written. Raises InvalidRequest naming the option."""
    shown = f"{PARAM} = {str(path)!r}"
    if path.suffix.lower() in (*FORMATS, ".npy"):
        raise InvalidRequest(f"{shown}: is a picture's name, and a report is JSON; name it .json", param=PARAM)
    try:
        is_file = S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        is_file = True
    except (OSError, ValueError) as error:
        raise unwritable(error, PARAM, shown) from None
    if not is_file:
        raise InvalidRequest(f"{shown}: is a folder or something else that is no file; name a file", param=PARAM)
    make_folder(path.parent, PARAM, shown)


def write(path: Path, outputs: Sequence[GeneratedOutput], watch: Stopwatch, options: EngineOptions) -> None:
    """Write the report of one request's outputs, whole or not at all."""
    total_ms, save_ms = watch.read()
    times = [
        OutputTimes.of(index, made.seed, made.timings, made.denoise_ms, made.memory_mb) for index, made in enumerate(outputs)
    ]
    run = Run(outputs[0].request_id, commit_hash() or f"v{__version__}", _meta(outputs, options))
    write_whole(path, to_json(report(run, times, total_ms, save_ms)), PARAM)


def _meta(outputs: Sequence[GeneratedOutput], options: EngineOptions) -> dict[str, Any]:
    """What was run: the parameters that repeat the first picture, what its step cache did, and the options that were given."""
    parameters = asdict(outputs[0].parameters)
    given = options.model_dump(mode="json", exclude_unset=True)
    return {
        "prompt": parameters.pop("prompt"),
        "model": parameters.pop("model_path"),
        **parameters,
        "num_outputs_per_prompt": len(outputs),
        "cache_report": cache_answer(outputs[0].cache),
        "options": {
            name: value for name, value in given.items() if name not in ("model_path", "prompt") and name not in parameters
        },
    }
