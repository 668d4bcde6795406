"""`stepwell serve` as people run it: a process of its own, which may be stopped, killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.support.server import free_port


def until(holds: Callable[[], Any], limit_s: float, what: str) -> float:
    """Wait for something; the seconds it took. Fails after `limit_s`."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < limit_s, f"{what}: not within {limit_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


class Command:
    """One command line, its data path, and the process that runs it just now. All lives log to one file."""

    def __init__(self, model: str, folder: Path, *flags: str, data: Path | None = None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data = data or folder / "data"
        self.log = folder / f"log-{self.port}"
        self.temporary = tempfile.mkdtemp(prefix="sw-")  # short, as sockets live in it, and known, to find the engines by
        where = ("--port", str(self.port), "--data-path", str(self.data))
        self.line = (sys.executable, "-m", "stepwell", "serve", "--model-path", model, *where, *flags)
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)  # making one costs more than a request
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for pid in self.engines():
            os.kill(pid, signal.SIGKILL)
        self.http.close()
        shutil.rmtree(self.temporary)
        if kind is not None and self.log.exists():
            lines = [line for line in self.log.read_text().splitlines() if " stepwell.access: " not in line]
            print("\n".join(lines[-60:]))

    # ---------------------------------------------------------------------------------------------------------- lifetime
    def begin(self) -> None:
        """Start a process, and don't wait for it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.line, stderr=log, env={**os.environ, "TMPDIR": self.temporary})

    def start(self) -> None:
        """Start a process, and wait until it takes requests."""
        self.begin()
        self.wait_ready()

    def wait_ready(self, limit_s: float = 30) -> float:
        return until(lambda: self.readiness() == 200, limit_s, "ready")

    def kill(self) -> None:
        """SIGKILL: nothing of the process runs after this."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, limit_s: float = 30) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.signal()
        return self.process.wait(limit_s)

    # -------------------------------------------------------------------------------------------------------- from outside
    def readiness(self) -> int:
        """The status of /readyz, 0 if nobody answers."""
        try:
            return self.http.get("/readyz").status_code
        except httpx.TransportError:
            return 0

    def health(self) -> dict[str, Any]:
        """/health, empty while the engine can't be asked."""
        answer = self.http.get("/health")
        return answer.json() if answer.status_code == 200 else {}

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])

    def engines(self) -> list[int]:
        """The engine's processes, of this life or an earlier one, that still run."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                line = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
            except OSError:  # it has just ended
                continue
            if b"stepwell.engine.process" in line and self.temporary.encode() in line:
                found.append(int(folder.name))
        return found

    def rows(self) -> list[sqlite3.Row]:
        """All jobs, as they are on disk."""
        db = sqlite3.connect(self.data / "jobs.sqlite")
        db.row_factory = sqlite3.Row
        try:
            return db.execute("SELECT * FROM jobs").fetchall()
        finally:
            db.close()

    def files(self) -> set[str]:
        return {file.name for file in (self.data / "media").iterdir()}

    def complaints(self) -> list[str]:
        """What was logged of things that should not happen."""
        return [line for line in self.log.read_text().splitlines() if "Traceback" in line or "never retrieved" in line]
