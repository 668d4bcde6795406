"""How long /livez takes while many clients follow videos that the engine is making.

    python -m benchmarks.livez [--clients 200] [--seconds 10] [--step-ms 5]

Starts `stepwell serve` with the model-free engine. Half of the clients hold event streams, half ask twice a second, and eight
more order the next video whenever theirs is done. They live in a process of their own; this one asks /livez a hundred times a
second over one connection. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import math
import multiprocessing
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

EVERY_S = 0.01
POLL_S = 0.5
MAKERS = 8
BODY = json.dumps({"prompt": "a star", "num_inference_steps": 200, "size": "64x64"})


def measure(port: int, clients: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of /livez on a server at 127.0.0.1:`port` while `clients` follow its videos for `seconds`."""
    ours, theirs = multiprocessing.Pipe()
    load = multiprocessing.get_context("spawn").Process(target=_load, args=(theirs, port, clients, seconds), daemon=True)
    load.start()
    theirs.close()
    try:
        ours.recv()  # everybody is connected
        taken = _ask(port, seconds)
        counts = ours.recv()
    finally:
        load.terminate()
        load.join()
    taken.sort()
    ms = {f"p{share}": round(taken[math.ceil(share / 100 * len(taken)) - 1], 2) for share in (50, 99)}
    return {"clients": clients, "asked": len(taken), "livez_ms": {**ms, "max": round(taken[-1], 2)}, **counts}


def _ask(port: int, seconds: float) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    taken = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        connection.request("GET", "/livez")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        taken.append((time.perf_counter() - began) * 1e3)
        time.sleep(EVERY_S)
    connection.close()
    return taken


def _load(pipe: Connection, port: int, clients: int, seconds: float) -> None:
    """The clients' process: says when all are connected, then what they saw."""
    pipe.send(asyncio.run(_Clients(port, pipe).run(clients, seconds)))


class _Clients:
    """Clients that read what they are sent and throw it away, as cheaply as can be."""

    def __init__(self, port: int, pipe: Connection):
        self._port = port
        self._pipe = pipe
        self._videos: list[str] = [""] * MAKERS
        self._counts = {"videos": 0, "events": 0, "polls": 0}

    async def run(self, clients: int, seconds: float) -> dict[str, int]:
        work = [asyncio.create_task(self._make(number)) for number in range(MAKERS)]
        while not all(self._videos):
            await asyncio.sleep(0.01)
        work += [asyncio.create_task(self._poll() if number % 2 else self._follow()) for number in range(clients)]
        while self._counts["events"] < clients:
            await asyncio.sleep(0.01)
        self._pipe.send("ready")
        before = self._counts.copy()
        broken, _ = await asyncio.wait(work, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in broken:
            task.result()
        return {name: count - before[name] for name, count in self._counts.items()}

    async def _make(self, number: int) -> None:
        while True:
            answer = await self._once(f"POST /v1/videos HTTP/1.1\r\nContent-Length: {len(BODY)}\r\n", BODY)
            self._videos[number] = json.loads(answer)["id"]
            self._counts["videos"] += 1
            await self._stream(self._videos[number])

    async def _follow(self) -> None:
        while True:
            await self._stream(random.choice(self._videos))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * POLL_S)
            assert b'"status"' in await self._once(f"GET /v1/videos/{random.choice(self._videos)} HTTP/1.1\r\n")
            self._counts["polls"] += 1

    async def _stream(self, video: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(f"GET /v1/videos/{video}/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        while line := await reader.readline():
            self._counts["events"] += line.startswith(b"data: ")
        writer.close()

    async def _once(self, head: str, body: str = "") -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        kind = "Content-Type: application/json\r\n" if body else ""
        writer.write(f"{head}Host: localhost\r\n{kind}Connection: close\r\n\r\n{body}".encode())
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
        return answer.partition(b"\r\n\r\n")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--step-ms", type=float, default=5)
    given = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as data:
        where = ("--port", str(port), "--data-path", data)
        model = f"stepwell/fake-video?step_ms={given.step_ms:g}"
        line = (sys.executable, "-m", "stepwell", "serve", "--model-path", model, *where)
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as server:
            try:
                _wait(port)
                report = measure(port, given.clients, given.seconds)
            finally:
                server.terminate()
    print(json.dumps({**report, "step_ms": given.step_ms, "machine": platform.processor() or platform.machine()}, indent=1))


def _wait(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.05)
    raise SystemExit("the server does not get ready")


if __name__ == "__main__":
    main()
