"""One recording of torch's profiler, from its warm-up to a file that Perfetto and chrome://tracing load."""

from __future__ import annotations

import os
import re
import threading
import uuid
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from stepwell.config.paths import make_folder

FOLDER = "logs"
PROFILER = threading.Lock()  # a process has one profiler: a second recording would take its end for its own, and crash


def open_folder() -> Path:
    """The folder of traces, there and writable. Raises InvalidRequest naming `profile`."""
    folder = Path(FOLDER).absolute()
    make_folder(folder, "profile", f"profile: traces in {folder}")
    return folder


def file_name(request_id: str, steps: int | None) -> str:
    """`steps` is how many denoising steps are in the trace; None stands for all stages."""
    part = "full_stages" if steps is None else f"{steps}_steps"
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', request_id)}-{part}-global-rank0.trace.json.gz"


def named(name: str) -> AbstractContextManager[object]:
    """A range of that name in the trace."""
    return record_function(name)


class Recording:
    """Holds the process's profiler until it is saved or dropped. All of it happens on one thread."""

    def __init__(self, profiler: profile):
        self._profiler = profiler
        self._is_running = False

    @classmethod
    def prepare(cls) -> Recording | None:
        """Let the profiler set itself up, which the first step after it pays for; None if somebody else is recording."""
        if not PROFILER.acquire(blocking=False):
            return None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        try:
            recording = cls(profile(activities=activities, record_shapes=True, with_stack=True))
            recording._profiler.prepare_trace()
        except BaseException:
            PROFILER.release()
            raise
        return recording

    def start(self) -> None:
        self._profiler.start_trace()
        self._is_running = True

    def drop(self) -> None:
        """Stop, and keep nothing."""
        try:
            if not self._is_running:  # what was prepared ends only by way of a start
                self._profiler.start_trace()
            self._profiler.stop_trace()
        finally:
            PROFILER.release()

    def save(self, path: Path) -> None:
        """Stop, and write all of the trace or, if that raises, nothing."""
        partial = path.with_name(f".partial-{uuid.uuid4().hex}.json.gz")
        try:
            self._profiler.stop_trace()
            self._profiler.export_chrome_trace(str(partial))
            os.replace(partial, path)
        finally:
            PROFILER.release()
            partial.unlink(missing_ok=True)
