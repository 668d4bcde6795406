"""A Dynamo deployment on this machine: frontends, workers and, if wanted, etcd, as processes that can be stopped and killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

# plain HTTP, asked all the time: reading the certificates of those whom everybody trusts takes 23 ms of CPU, for each question
PLAIN: dict[str, Any] = {"timeout": 5, "trust_env": False, "verify": False}
START_S = 120  # torch from a cold disk, on a machine that does other work too


def free_port() -> int:
    """A port below the ephemeral ones: Dynamo takes nothing above 32767 for DYN_SYSTEM_PORT."""
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def until(holds: Callable[[], Any], limit_s: float, what: str) -> float:
    """Wait for something; the seconds it took."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > limit_s:
            raise TimeoutError(f"{what}: not within {limit_s} s")
        time.sleep(0.02)
    return time.monotonic() - began


class Process:
    """One process and its log. Runs in a session of its own; `system_port` is where Dynamo tells how it is."""

    def __init__(self, line: Sequence[str], log: Path, env: dict[str, str], system_port: int = 0):
        self.log, self.system_port = log, system_port
        with log.open("ab") as out:
            self.popen = subprocess.Popen(line, stdout=out, stderr=out, env=env, start_new_session=True)

    @property
    def is_alive(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> None:
        """SIGKILL, to it alone: its engine finds out by itself."""
        self.popen.kill()
        self.popen.wait()

    def stop(self, limit_s: float = 60) -> int:
        """SIGTERM; the exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(limit_s)

    def health(self) -> int:
        """The status of the process's own health, 0 if nobody answers."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.system_port}/health", **PLAIN).status_code
        except httpx.TransportError:
            return 0

    def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        text = httpx.get(f"http://127.0.0.1:{self.system_port}/metrics", **PLAIN).text
        rows = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(row.rpartition(" ")[2]) for row in rows)


class Cluster:
    """What runs together. Everything is killed at the end. `env` goes to every process; `wrap` stands before each command line.

    discovery: file, or etcd, which is started too.
    """

    def __init__(
        self, discovery: str = "file", env: dict[str, str] | None = None, *, host: str = "127.0.0.1", wrap: Sequence[str] = ()
    ):
        self.folder = Path(tempfile.mkdtemp(prefix="stepwell-dynamo-"))
        self.host, self.wrap = host, tuple(wrap)
        self.processes: list[Process] = []
        self.env = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(self.folder),  # what is killed tidies up nothing
            "DYN_DISCOVERY_BACKEND": discovery,
            "DYN_FILE_KV": str(self.folder / "kv"),
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_SYSTEM_HOST": "127.0.0.1",
            "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "1",
            "DYN_SELF_HOST_METADATA": "0",
            "NO_COLOR": "1",
            **dict.fromkeys(("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST"), host),
            **(env or {}),
        }
        if discovery == "etcd":
            self._start_etcd()

    def _start_etcd(self) -> None:
        client, peer = (f"http://{self.host}:{free_port()}" for _ in range(2))
        self.env["ETCD_ENDPOINTS"] = client
        line = (
            "etcd",
            "--data-dir",
            str(self.folder / "etcd"),
            "--listen-client-urls",
            client,
            "--advertise-client-urls",
            client,
        )
        peers = ("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}")
        self.start([*line, *peers], "etcd")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            if process.is_alive:
                os.killpg(process.popen.pid, signal.SIGKILL)
                process.popen.wait()
        if kind is not None:
            for log in sorted(self.folder.glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:], sep="\n")
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------------- processes
    def start(self, line: Sequence[str], name: str, env: dict[str, str] | None = None, system_port: int = 0) -> Process:
        log = self.folder / f"{name}-{len(self.processes)}.log"
        made = Process([*self.wrap, *line], log, {**self.env, **(env or {})}, system_port)
        self.processes.append(made)
        return made

    def worker(self, *flags: str, is_kept: bool = False, **env: str) -> Process:
        """`stepwell worker`, not waited for. One that is kept is started again whenever it ends, as systemd would."""
        port = free_port()
        line = [sys.executable, "-m", "stepwell.dynamo", *flags]
        if is_kept:
            line = ["sh", "-c", 'while :; do "$@"; sleep 1; done', "keep", *line]
        return self.start(line, "worker", {"DYN_SYSTEM_PORT": str(port), **env}, port)

    def frontend(self, port: int | None = None, without: Path | None = None) -> str:
        """`python -m dynamo.frontend`, once it listens; its URL. `without` is a folder that it shall not see, if that can be."""
        port = port or free_port()
        line = [sys.executable, "-m", "dynamo.frontend", "--http-host", self.host, "--http-port", str(port)]
        if without is not None and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0:
            line = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(without), *line]
        self.start(line, "frontend")
        url = f"http://{self.host}:{port}"
        until(lambda: names(url) is not None, START_S, "the frontend")
        return url

    def check(self) -> None:
        """Raise what a process that has ended said last, unless it was meant to end."""
        for process in self.processes:
            if process.popen.poll() not in (None, 0, -signal.SIGKILL):
                raise RuntimeError(f"{process.log.name}: {process.log.read_text(errors='replace')[-2000:]}")

    def wait_for(self, url: str, *models: str) -> None:
        """Until a frontend knows these models."""

        def are_there() -> bool:
            self.check()
            return set(models) <= set(names(url) or ())

        until(are_there, START_S, ", ".join(models))

    def instances(self, url: str) -> int:
        """How many workers a frontend sends requests to."""
        found = httpx.get(f"{url}/health", **PLAIN).json().get("instances", [])
        return sum(instance["endpoint"] == "generate" for instance in found)


def names(url: str) -> list[str] | None:
    """The models a frontend knows, None if it does not answer."""
    try:
        answer = httpx.get(f"{url}/v1/models", **PLAIN)
    except httpx.TransportError:
        return None
    return [model["id"] for model in json.loads(answer.text)["data"]] if answer.status_code == 200 else None
