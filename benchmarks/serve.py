"""A real `stepwell serve` under load: latency, throughput, waiting, errors; and what its scheduling policy is worth.

    make bench-serve                        # or: python -m benchmarks.serve [--quick] [--model-path MODEL] [--output FOLDER]

1. Overhead: small requests one by one; what of the client's time is not the engine's own.
2. Load: three sizes mixed, all at once, which gives the capacity; then as a Poisson process at 0.7 of it.
3. Policy: many small requests and a few large ones at 0.9 of the capacity, to two servers that take turns: ours, and one
   with `--scheduling-policy fifo`. Both get the same arrivals. The capacity is the lesser of the two servers', so that
   neither is overloaded.

A Poisson process is drawn given its number of arrivals, so that the load is exactly what is said. Latency counts from
when a request was due, with a connection of its own, to the last byte of its answer. Writes results/<hardware>-serve.json
and .md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.engine.measure import detect

LOAD, POLICY_LOAD = 0.7, 0.9  # of the capacity
POLICIES = ("fifo", "shortest")
TARGET = 0.5  # of FIFO's median
TIMEOUT_S = 300


@dataclass(frozen=True)
class Size:
    """A class of requests: square pictures of so many pixels a side, in so many steps."""

    name: str
    pixels: int
    steps: int


SMALL, MEDIUM, LARGE = Size("small", 64, 4), Size("medium", 128, 8), Size("large", 256, 30)


@dataclass(frozen=True)
class Effort:
    """How many requests each part sends, of each size, and how often the policies take turns."""

    sequential: int
    load: dict[Size, int]
    policy: dict[Size, int]
    rounds: int


FULL = Effort(150, {SMALL: 60, MEDIUM: 24, LARGE: 12}, {SMALL: 135, LARGE: 15}, 4)
QUICK = Effort(20, {SMALL: 9, MEDIUM: 4, LARGE: 2}, {SMALL: 18, LARGE: 2}, 1)


@dataclass(frozen=True)
class Answer:
    """What became of one request. Milliseconds: the client's wait, and the engine's own account of its queue and in all."""

    size: Size
    latency_ms: float
    queued_ms: float = 0.0
    engine_ms: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """The answers to one load, and the seconds from its beginning to the last of them."""

    answers: list[Answer]
    seconds: float


class Service:
    """A `stepwell serve` that listens."""

    def __init__(self, process: subprocess.Popen[bytes], port: int):
        self.process = process
        self.port = port

    def ask(self, size: Size, number: int, due: float | None = None) -> Answer:
        """One picture. `number` makes its prompt and its noise its own."""
        due = time.perf_counter() if due is None else due
        wanted = {
            "prompt": f"a small red circle on a white background, number {number}",
            "size": f"{size.pixels}x{size.pixels}",
            "num_inference_steps": size.steps,
            "seed": number,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request("POST", "/v1/images/generations", json.dumps(wanted), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except OSError as error:
            return Answer(size, (time.perf_counter() - due) * 1e3, error=type(error).__name__)
        finally:
            connection.close()
        latency_ms = (time.perf_counter() - due) * 1e3
        if response.status != 200:
            return Answer(size, latency_ms, error=f"{response.status} {content.decode(errors='replace')[:200]}")
        timings = json.loads(content)["data"][0]["timings_ms"]
        return Answer(size, latency_ms, timings["queued"], timings["total"])

    def send(self, trace: Sequence[tuple[float, Size]]) -> Run:
        """Every request of a trace at its second, whatever became of those before."""
        began = time.perf_counter()
        with ThreadPoolExecutor(len(trace)) as pool:
            asked = []
            for number, (at, size) in enumerate(trace):
                time.sleep(max(0.0, began + at - time.perf_counter()))
                asked.append(pool.submit(self.ask, size, number, began + at))
            answers = [future.result() for future in asked]
        return Run(answers, time.perf_counter() - began)

    def peak_mib(self) -> dict[str, float]:
        """Peak resident memory of the HTTP process and of the engine's, as Linux knows it; 0 elsewhere."""
        pid = self.process.pid
        children = _read(f"/proc/{pid}/task/{pid}/children").split()
        return {"HTTP": _peak_mib(pid), "engine": sum(_peak_mib(int(child)) for child in children)}


def _peak_mib(pid: int) -> float:
    found = re.search(r"VmHWM:\s*(\d+) kB", _read(f"/proc/{pid}/status"))
    return int(found.group(1)) / 1024 if found else 0.0


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


@contextmanager
def service(args: argparse.Namespace, policy: str) -> Iterator[Service]:
    """A server with a model loaded, warm, and gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        flags = ["--model-path", args.model_path, "--device", args.device, "--scheduling-policy", policy, "--port", "0",
                 "--threads", str(args.threads), "--data-path", folder]  # fmt: skip
        process = subprocess.Popen([sys.executable, "-m", "stepwell", "serve", *flags], stderr=log)
        try:
            made = Service(process, _announced_port(process, Path(log.name)))
            for size in (SMALL, MEDIUM, LARGE, SMALL):
                made.ask(size, 0)
            yield made
        finally:
            process.terminate()
            process.wait(60)


def _announced_port(process: subprocess.Popen[bytes], log: Path) -> int:
    while not (found := re.search(r"^serving .* on http://.*:(\d+)$", log.read_text(), re.MULTILINE)):
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.05)
    return int(found.group(1))


# ---------------------------------------------------------------------------------------------------------------- traffic
def at_once(mix: dict[Size, int], seed: int) -> list[tuple[float, Size]]:
    """A burst: all requests at second 0, shuffled."""
    deck = [size for size, count in mix.items() for _ in range(count)]
    random.Random(seed).shuffle(deck)
    return [(0.0, size) for size in deck]


def poisson(mix: dict[Size, int], per_s: float, seed: int) -> list[tuple[float, Size]]:
    """The same requests as a Poisson process of that rate."""
    burst, chance = at_once(mix, seed), random.Random(seed + 1)
    times = sorted(chance.uniform(0, len(burst) / per_s) for _ in burst)
    return [(at, size) for at, (_, size) in zip(times, burst, strict=True)]


# ------------------------------------------------------------------------------------------------------------ the parts
def overhead(server: Service, count: int) -> dict[str, Any]:
    """Small requests one by one."""
    answers = [server.ask(SMALL, number) for number in range(count)]
    good = [answer for answer in answers if answer.error is None]
    return {
        "requests": count,
        "errors": count - len(good),
        "latency_p50_ms": percentile([answer.latency_ms for answer in good], 0.5),
        "engine_p50_ms": percentile([answer.engine_ms for answer in good], 0.5),
        "overhead_p50_ms": percentile([answer.latency_ms - answer.engine_ms for answer in good], 0.5),
    }


def load(server: Service, mix: dict[Size, int]) -> dict[str, Any]:
    """A burst, then Poisson arrivals at a share of what the burst showed to be possible."""
    burst = server.send(at_once(mix, 1))
    capacity = len(burst.answers) / burst.seconds
    steady = server.send(poisson(mix, LOAD * capacity, 2))
    return {"capacity_per_s": capacity, "load": LOAD, "burst": table([burst]), "poisson": table([steady])}


def policies(servers: dict[str, Service], mix: dict[Size, int], rounds: int) -> dict[str, Any]:
    """The same arrivals to each server in turn, forwards and backwards, the others idle meanwhile."""

    def in_turn(number: int, trace: list[tuple[float, Size]]) -> dict[str, Run]:
        names = list(servers) if number % 2 == 0 else list(reversed(servers))
        return {name: servers[name].send(trace) for name in names}

    bursts = [in_turn(number, at_once(mix, number)) for number in range(2)]
    capacity = {name: sum(mix.values()) / statistics.mean(burst[name].seconds for burst in bursts) for name in servers}
    per_s = POLICY_LOAD * min(capacity.values())
    runs = [in_turn(number, poisson(mix, per_s, 100 + number)) for number in range(rounds)]
    tables = {name: table([run[name] for run in runs]) for name in servers}
    medians = [{name: table([run[name]])["all"]["latency_p50_ms"] for name in servers} for run in runs]
    ours, fifo = tables["shortest"], tables["fifo"]
    return {
        "load": POLICY_LOAD,
        "capacity_per_s": capacity,
        "offered_per_s": per_s,
        "rounds": rounds,
        "tables": tables,
        "p50_ratio": {size: ours[size]["latency_p50_ms"] / fifo[size]["latency_p50_ms"] for size in ours},
        "p50_ratio_by_round": [median["shortest"] / median["fifo"] for median in medians],
        "target": TARGET,
    }


# ---------------------------------------------------------------------------------------------------------------- figures
def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank; NaN of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def table(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Figures by size, and of all, over runs of the same load."""
    answers = [answer for run in runs for answer in run.answers]
    seconds = sum(run.seconds for run in runs)
    names = [size.name for size in (SMALL, MEDIUM, LARGE) if any(answer.size == size for answer in answers)]
    figures: dict[str, dict[str, Any]] = {}
    for name in [*names, "all"]:
        of_size = [answer for answer in answers if name in (answer.size.name, "all")]
        good = [answer for answer in of_size if answer.error is None]
        latency_ms, queued_ms = [answer.latency_ms for answer in good], [answer.queued_ms for answer in good]
        figures[name] = {
            "requests": len(of_size),
            "errors": [answer.error for answer in of_size if answer.error is not None],
            "per_s": len(good) / seconds,
            **{f"latency_p{share}_ms": percentile(latency_ms, share / 100) for share in (50, 95, 99)},
            **{f"queued_p{share}_ms": percentile(queued_ms, share / 100) for share in (50, 95)},
        }
    return figures


HEADER = """\
| | requests | errors | per s | p50 ms | p95 ms | p99 ms | queued p50 ms | queued p95 ms |
|---|---|---|---|---|---|---|---|---|"""


def rows(title: str, figures: dict[str, dict[str, Any]]) -> list[str]:
    milliseconds = [f"latency_p{share}_ms" for share in (50, 95, 99)] + ["queued_p50_ms", "queued_p95_ms"]
    return [
        f"| {title}{size} | {row['requests']} | {len(row['errors'])} | {row['per_s']:.1f} | "
        + " | ".join(f"{row[name]:.0f}" for name in milliseconds)
        + " |"
        for size, row in figures.items()
    ]


def markdown(report: dict[str, Any]) -> str:
    alone, mixed, policy, peak = (report[name] for name in ("overhead", "load", "policy", "peak_mib"))
    capacity, ratio = policy["capacity_per_s"], policy["p50_ratio"]
    by_round = ", ".join(f"{value:.2f}" for value in policy["p50_ratio_by_round"])
    sizes = ", ".join(f"{size.name} {size.pixels} px / {size.steps} steps" for size in (SMALL, MEDIUM, LARGE))
    return "\n".join(
        [
            f"# Serving on {report['hardware']}",
            "",
            f"`{report['command']}`, {report['model']}, {report['cores']} cores, wall-clock time, client on the same machine.",
            f"Sizes: {sizes}. `queued` is the time before a request's first step.",
            "",
            f"**One small request at a time** ({alone['requests']}, {alone['errors']} errors), medians: "
            f"{alone['latency_p50_ms']:.1f} ms, of which the engine takes {alone['engine_p50_ms']:.1f} ms; beyond it the server "
            f"takes **{alone['overhead_p50_ms']:.1f} ms**.",
            "",
            f"**Peak memory**: HTTP process {peak['HTTP']:.0f} MiB, engine process {peak['engine']:.0f} MiB.",
            "",
            f"**Mixed sizes**: all at once ({mixed['capacity_per_s']:.1f} requests per second), then Poisson arrivals at "
            f"{mixed['load']} of that",
            "",
            HEADER,
            *rows("burst, ", mixed["burst"]),
            *rows("Poisson, ", mixed["poisson"]),
            "",
            f"**Scheduling policy**: {policy['offered_per_s']:.1f} requests per second, {policy['load']} of the lesser capacity "
            f"(fifo {capacity['fifo']:.1f}, shortest {capacity['shortest']:.1f}); same arrivals, rounds taking turns: "
            f"{policy['rounds']}",
            "",
            HEADER,
            *(row for name, figures in policy["tables"].items() for row in rows(f"{name}, ", figures)),
            "",
            f"Our p50 over FIFO's: **{ratio['all']:.2f}** (target {policy['target']}; by round {by_round}); small "
            f"{ratio['small']:.2f}, large {ratio['large']:.2f}.",
        ]
    ) + "\n"  # fmt: skip


def measure(args: argparse.Namespace, effort: Effort) -> dict[str, Any]:
    """Everything, against two servers of which one is idle at any time."""
    hardware = detect()
    with service(args, "fifo") as fifo, service(args, "shortest") as ours:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "overhead": lambda: overhead(ours, effort.sequential),
            "load": lambda: load(ours, effort.load),
            "policy": lambda: policies({"fifo": fifo, "shortest": ours}, effort.policy, effort.rounds),
            "peak_mib": ours.peak_mib,
        }
        results = {}
        for name, part in parts.items():
            results[name] = part()
            print(json.dumps({name: results[name]}), flush=True)
    return {
        "hardware": hardware.cpu if args.device == "cpu" else hardware.gpu or hardware.cpu,
        "cores": hardware.cores,
        "model": args.model_path,
        **results,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, one round: half a minute, noisy figures")
    parser.add_argument("--model-path", default="stepwell/tiny-flux")
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    report = measure(args, QUICK if args.quick else FULL)
    report["command"] = " ".join(["python -m benchmarks.serve", *given])
    stem = re.sub(r"[^a-z0-9]+", "-", report["hardware"].lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{stem}-serve.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.output / f"{stem}-serve.md").write_text(markdown(report))
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
