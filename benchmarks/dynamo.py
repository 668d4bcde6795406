"""Workers behind a real `python -m dynamo.frontend`, on this machine: overhead, balance, and what the loss of a worker costs.

    python -m benchmarks.dynamo [--quick] [--only overhead,balance,loss,chaos,drain,hosts] [--output FOLDER]

overhead: requests one by one to a worker that computes nothing, and to its own engine without Dynamo; the difference is Dynamo's.
balance: how 4 workers share 200 requests of 8 clients.
loss: kill -9 of one of 2 workers while a client asks all the time: how long it is sent requests, and how many of them fail; found
by file, and by etcd with leases of 5 and 10 s.
chaos: 4 workers, 200 mixed requests; every few seconds one is killed with -9 and comes back. Plain clients and retrying ones.
drain: SIGTERM under load, 20 times, each time another worker takes over.
hosts: two network namespaces, etcd and a frontend in one, workers in both; the second is cut off and healed. As root.

Writes results/<hardware>-dynamo.json and .md. etcd is Debian's etcd-server.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cluster import Cluster, Process, until
from stepwell.config.schema import EngineOptions
from stepwell.dynamo.client import RetryingClient
from stepwell.engine.measure import detect
from stepwell.engine.remote import RemoteEngine
from stepwell.errors import StepwellError
from stepwell.types import Request, SamplingParams

PICTURES, VIDEOS = "/v1/images/generations", "/v1/videos"
IMAGE, VIDEO = "fake/image", "fake/video"
INSIDE_A, INSIDE_B = (("ip", "netns", "exec", f"stepwell-{name}") for name in "ab")
PARTS = ("overhead", "balance", "loss", "chaos", "drain", "hosts")


@dataclass(frozen=True)
class Effort:
    """How much of each part is done."""

    sequential: int
    shared: int
    loss_s: float
    discoveries: tuple[tuple[str, int | None], ...]
    mixed: int
    kill_every_s: float
    chaos_s: float
    drains: int
    text_model: str = ""


FULL = Effort(300, 200, 40, (("file", None), ("etcd", 5), ("etcd", 10)), 200, 10, 60, 20)
QUICK = Effort(20, 24, 15, (("file", None),), 16, 3, 6, 1)


def start(cluster: Cluster, kind: str = "image", step_ms: float = 1, *, is_kept: bool = False) -> Process:
    """A worker for pictures or videos without weights; one that is kept is started again whenever it ends."""
    name = {"image": IMAGE, "video": VIDEO}[kind]
    flags = ("--model-path", f"stepwell/fake-{kind}?step_ms={step_ms:g}", "--served-model-name", name)
    return cluster.worker(*flags, is_kept=is_kept)


def asks(steps: int, kind: str = "image", number: int = 0) -> tuple[str, dict[str, Any]]:
    """A request's path and body."""
    nvext = {"num_inference_steps": steps, "seed": number}
    path = PICTURES if kind == "image" else VIDEOS
    return path, {"model": IMAGE if kind == "image" else VIDEO, "prompt": "a star", "response_format": "b64_json", "nvext": nvext}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"p50_ms": 1e3 * statistics.median(ordered), "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


@contextmanager
def service(workers: int, discovery: str = "file", **options: Any) -> Iterator[tuple[Cluster, str, list[Process]]]:
    """A frontend and so many workers for pictures."""
    env = {"ETCD_LEASE_TTL": str(options["ttl"])} if options.get("ttl") else {}
    with Cluster(discovery, env) as cluster:
        url = cluster.frontend()
        made = [start(cluster, step_ms=options.get("step_ms", 1)) for _ in range(workers)]
        cluster.wait_for(url, IMAGE)
        until(lambda: cluster.instances(url) == workers, 120, "all workers")
        yield cluster, url, made


# ---------------------------------------------------------------------------------------------------------------- the parts
def overhead(effort: Effort) -> dict[str, Any]:
    """One client, one step of nothing, three ways; wall-clock time, and the CPU time of each process."""
    path, body = asks(1)
    content, headers = json.dumps(body), {"Content-Type": "application/json"}
    with service(1, step_ms=0) as (cluster, url, workers):
        port = int(url.rpartition(":")[2])

        def ask(connection: http.client.HTTPConnection) -> None:
            connection.request("POST", path, content, headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200

        def ask_once() -> None:
            with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
                ask(connection)

        with closing(http.client.HTTPConnection("127.0.0.1", port)) as kept:
            ask(kept)
            pids = {"frontend": cluster.processes[0].popen.pid, "worker": workers[0].popen.pid}
            before = {name: cpu_s(pid) for name, pid in pids.items()}
            often = [_timed(lambda: ask(kept)) for _ in range(effort.sequential)]
            spent = {name: 1e3 * (cpu_s(pid) - before[name]) / effort.sequential for name, pid in pids.items()}
        once = [_timed(ask_once) for _ in range(effort.sequential)]
    times = {
        "connection kept": quantiles(often),
        "a connection each": quantiles(once),
        "the engine alone": asyncio.run(_alone(effort)),
    }
    return {"wall": times, "cpu_ms": spent}


def cpu_s(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _alone(effort: Effort) -> dict[str, float]:
    engine = RemoteEngine(EngineOptions(model_path="stepwell/fake-image?step_ms=0"))
    await engine.start()
    seconds = []
    for _ in range(effort.sequential):
        began = time.perf_counter()
        async for _event in engine.generate(Request("a star", SamplingParams(num_inference_steps=1))):
            pass
        seconds.append(time.perf_counter() - began)
    await engine.close()
    return quantiles(seconds)


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def balance(effort: Effort) -> dict[str, Any]:
    path, body = asks(20)
    with service(4, step_ms=2) as (_, url, workers):
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda _: httpx.post(url + path, json=body, timeout=60, trust_env=False).status_code, range(effort.shared)
                )
            )
        served = [int(worker.metric("dynamo_component_requests_total")) for worker in workers]
    return {"requests": effort.shared, "served": served, "failed": sum(status != 200 for status in answers)}


def loss(effort: Effort) -> dict[str, Any]:
    """For each way of discovery, seconds until the frontend's list and its router have forgotten a dead worker."""
    return {name if ttl is None else f"{name}, lease {ttl} s": _loss(effort, name, ttl) for name, ttl in effort.discoveries}


def _loss(effort: Effort, discovery: str, ttl: int | None) -> dict[str, Any]:
    path, body = asks(1)
    answers: list[tuple[float, int]] = []
    stop = threading.Event()
    with service(2, discovery, ttl=ttl) as (cluster, url, workers):

        def ask() -> None:
            while not stop.is_set():
                answers.append((time.monotonic(), httpx.post(url + path, json=body, timeout=60, trust_env=False).status_code))
                time.sleep(0.05)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(2)
        workers[0].kill()
        died = time.monotonic()
        gone_s = until(lambda: cluster.instances(url) == 1, effort.loss_s, "out of rotation")
        time.sleep(2)
        stop.set()
        asking.join()
    failed = [when - died for when, status in answers if status != 200]
    asked = sum(when >= died for when, _ in answers)
    return {"gone_s": gone_s, "last_failure_s": max(failed, default=0.0), "failed": len(failed), "asked": asked}


def chaos(effort: Effort) -> dict[str, Any]:
    """Mixed requests spread over the time in which workers are killed, by clients who ask once and by those who ask again."""
    return {kind: _chaos(effort, retries=kind == "retrying") for kind in ("plain", "retrying")}


def _chaos(effort: Effort, *, retries: bool) -> dict[str, Any]:
    with Cluster() as cluster:
        url = cluster.frontend()
        workers = [start(cluster, kind, step_ms=10) for kind in ("image", "image", "video", "video")]
        cluster.wait_for(url, IMAGE, VIDEO)
        until(lambda: cluster.instances(url) == 4, 120, "all workers")
        client, draws = RetryingClient([url]) if retries else None, random.Random(0)
        began, kills = time.monotonic(), 0
        with ThreadPoolExecutor(16) as pool:
            due = sorted(draws.uniform(0, effort.chaos_s) for _ in range(effort.mixed))
            futures = [pool.submit(_ask, client, url, number, began + when) for number, when in enumerate(due)]
            while any(not future.done() for future in futures):
                time.sleep(0.2)
                if kills * effort.kill_every_s < effort.chaos_s and time.monotonic() - began > (kills + 1) * effort.kill_every_s:
                    place = kills % 4
                    workers[place].kill()
                    workers[place] = start(cluster, "image" if place < 2 else "video", step_ms=10)
                    kills += 1
            results = [future.result() for future in futures]
    outcomes = dict(Counter(name for name, _ in results))
    return {"requests": effort.mixed, "kills": kills, "outcomes": outcomes, **quantiles([seconds for _, seconds in results])}


def _ask(client: RetryingClient | None, url: str, number: int, due: float) -> tuple[str, float]:
    """How one request ended, and after how many seconds. Of four one is a long picture and one a video."""
    time.sleep(max(0.0, due - time.monotonic()))
    kind, steps = (("image", 5), ("image", 20), ("video", 10), ("image", 150))[number % 4]
    path, body = asks(steps, kind, number)
    began = time.monotonic()
    try:
        if client is not None:
            answer = client.post(path, body)
            name = "a result" if answer["data"] else "nothing"
        else:
            plain = httpx.post(url + path, json=body, timeout=120, trust_env=False)
            name = "a result" if plain.status_code == 200 and plain.json()["data"] else str(plain.status_code)
    except (StepwellError, httpx.HTTPError) as error:
        name = f"{type(error).__name__}: {re.sub(r'[0-9.]+', 'N', str(error))[:80]}"
    return name, time.monotonic() - began


def drain(effort: Effort) -> dict[str, Any]:
    """Every worker leaves in turn while eight clients ask; its successor is there first."""
    lost: Counter[str] = Counter()
    asked = 0
    codes = []
    with service(1, step_ms=5) as (cluster, url, workers):
        stop = threading.Event()

        def ask(number: int) -> int:
            count = 0
            while not stop.is_set():
                path, body = asks(10 + 10 * number, number=count)
                with suppress(httpx.HTTPError):
                    status = httpx.post(url + path, json=body, timeout=120, trust_env=False).status_code
                    if status == 200:
                        count += 1
                        continue
                    lost[str(status)] += 1
                    continue
                lost["no answer"] += 1
            return count

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(ask, number) for number in range(8)]
            for _ in range(effort.drains):
                workers.append(start(cluster, step_ms=5))
                until(lambda: cluster.instances(url) == 2, 120, "a successor")
                time.sleep(0.5)
                codes.append(workers.pop(0).stop())
            stop.set()
            asked = sum(client.result() for client in clients)
    return {"drains": effort.drains, "results": asked, "lost": dict(lost), "exit codes": dict(Counter(map(str, codes)))}


def hosts(effort: Effort) -> dict[str, Any]:
    """Two hosts as network namespaces. The link between them is cut, and healed."""
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", "stepwell-a"], capture_output=True).returncode:
        return {"skipped": "ip netns is not permitted here"}
    lines = [
        "ip netns add stepwell-b", "ip link add swa type veth peer name swb",
        "ip link set swa netns stepwell-a", "ip link set swb netns stepwell-b",
        "ip -n stepwell-a addr add 10.99.7.1/24 dev swa", "ip -n stepwell-b addr add 10.99.7.2/24 dev swb",
        *(f"ip -n stepwell-{n} link set {device} up" for n in "ab" for device in ("lo", f"sw{n}")),
    ]  # fmt: skip
    try:
        for line in lines:
            subprocess.run(line.split(), check=True)
        return _hosts(effort)
    finally:
        for name in "ab":
            subprocess.run(["ip", "netns", "del", f"stepwell-{name}"], check=False)


def _hosts(effort: Effort) -> dict[str, Any]:
    """Pictures on both hosts, videos and texts on the second."""
    text = effort.text_model
    ttl = {"ETCD_LEASE_TTL": "5", "DYN_SELF_HOST_METADATA": "1"}
    with Cluster("etcd", ttl, host="10.99.7.1", wrap=INSIDE_A) as near:
        far = Cluster("etcd-elsewhere", {**ttl, "DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": near.env["ETCD_ENDPOINTS"],
                                         "DYN_SYSTEM_HOST": "10.99.7.2"}, host="10.99.7.2", wrap=INSIDE_B)  # fmt: skip
        with far:
            port = 8000
            near.start(
                [sys.executable, "-m", "dynamo.frontend", "--http-host", "10.99.7.1", "--http-port", str(port)], "frontend"
            )
            start(near)
            start(far, is_kept=True)
            start(far, "video", is_kept=True)
            wanted = {IMAGE, VIDEO}
            if text:
                far.worker("--model-path", text, "--served-model-name", "text", "--threads", "1", is_kept=True)
                wanted.add("text")
            client = _Inside("10.99.7.1", port)
            until(lambda: wanted <= set(client.models()), 180, "all models")
            until(lambda: client.instances() == 2 + len(wanted) - 1, 60, "all workers")
            before = client.round(wanted)
            subprocess.run(["ip", "-n", "stepwell-b", "link", "set", "swb", "down"], check=True)
            cut = _timed(lambda: until(lambda: client.instances() == 1, 60, "the second host out of rotation"))
            during = client.round({IMAGE})
            subprocess.run(["ip", "-n", "stepwell-b", "link", "set", "swb", "up"], check=True)
            try:
                healed: float | None = until(lambda: client.instances() == 2 + len(wanted) - 1, 60, "the second host back")
            except TimeoutError:
                healed = None
            after = client.round(wanted if healed is not None else {IMAGE})
            return {"before": before, "cut_s": cut, "during": during, "healed_s": healed, "after": after}


class _Inside:
    """Asks a frontend from within the first namespace, by curl."""

    def __init__(self, host: str, port: int):
        self._base = f"http://{host}:{port}"

    def get(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        line = [*INSIDE_A, "curl", "-s", "-m", "60", "-w", "\n%{http_code}", self._base + path]
        if body is not None:
            line += ["-H", "content-type: application/json", "-d", json.dumps(body)]
        text, _, status = subprocess.run(line, capture_output=True, text=True).stdout.rpartition("\n")
        with suppress(ValueError):
            return int(status), json.loads(text)
        return 0, {}

    def models(self) -> list[str]:
        return [model["id"] for model in self.get("/v1/models")[1].get("data", [])]

    def instances(self) -> int:
        return sum(each["endpoint"] == "generate" for each in self.get("/health")[1].get("instances", []))

    def round(self, wanted: set[str]) -> dict[str, int]:
        """Six requests to each model; the statuses."""
        seen: Counter[str] = Counter()
        for name in sorted(wanted):
            for number in range(6):
                if name == "text":
                    message = {"role": "user", "content": "hello"}
                    status, _ = self.get("/v1/chat/completions", {"model": "text", "messages": [message], "max_tokens": 8})
                else:
                    status, _ = self.get(*asks(2, "image" if name == IMAGE else "video", number))
                seen[f"{name} {status}"] += 1
        return dict(seen)


# --------------------------------------------------------------------------------------------------------------- the report
def markdown(report: dict[str, Any]) -> str:
    lines = [f"# Dynamo on {report['hardware']}", "", f"`python -m benchmarks.dynamo`, {report['load']}.", ""]
    if made := report.get("overhead"):
        lines += ["| one request of one step that computes nothing | p50 ms | p99 ms |", "|---|---|---|"]
        lines += [f"| {name} | {row['p50_ms']:.2f} | {row['p99_ms']:.1f} |" for name, row in made["wall"].items()] + [""]
        spent = ", ".join(f"{ms:.2f} ms in the {name}" for name, ms in made["cpu_ms"].items())
        lines += [f"CPU time of a request: {spent}; the engine's process not counted.", ""]
    if made := report.get("balance"):
        lines += [f"{made['requests']} requests of 8 clients at 4 workers: {made['served']}, {made['failed']} failed.", ""]
    if made := report.get("loss"):
        lines += ["| kill -9 of one of two workers | out of rotation, s | last failure, s | failed of |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {row['gone_s']:.1f} | {row['last_failure_s']:.1f} | {row['failed']} of {row['asked']} |"
            for name, row in made.items()
        ] + [""]
    if made := report.get("chaos"):
        lines += ["| mixed requests, one of 4 workers killed every few seconds | kills | outcomes | p50 ms | p99 ms |",
                  "|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {row['requests']}, {name} clients | {row['kills']} | {_counted(row['outcomes'])} "
            f"| {row['p50_ms']:.0f} | {row['p99_ms']:.0f} |"
            for name, row in made.items()
        ] + [""]
    if made := report.get("drain"):
        lines += [f"{made['drains']} drains under load: {made['results']} results, lost: {made['lost'] or 'none'}, "
                  f"exit codes {made['exit codes']}.", ""]  # fmt: skip
    if (made := report.get("hosts")) and "before" in made:
        rounds = {"before": "before", "during": "cut off", "after": "healed"}
        lines += [
            "| two hosts (namespaces), etcd, lease 5 s; the second makes videos and texts, both pictures | answers |",
            "|---|---|",
        ]
        lines += [f"| {said} | {_counted(made[key], '×')} |" for key, said in rounds.items()]
        healed = "not" if made["healed_s"] is None else f"{made['healed_s']:.1f} s"
        gone = f"{made['cut_s']:.1f} s"
        lines += ["", f"Out of rotation {gone} after the cut. Workers that a loop starts again were all there {healed} after the "
                  "link was.", ""]  # fmt: skip
    return "\n".join(lines)


def _counted(outcomes: dict[str, int], of: str = "") -> str:
    return ", ".join(f"{count}{of} {what}" for what, count in outcomes.items())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--text-model", default="stepwell/tiny-llada", help="A model for texts, for `hosts`.")
    options = parser.parse_args(arguments)
    effort = replace(QUICK if options.quick else FULL, text_model=options.text_model)
    hardware = detect()
    stem = re.sub(r"[^a-z0-9]+", "-", hardware.cpu.lower()).strip("-")
    path = options.output / f"{stem}-dynamo.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}  # other parts, of an earlier run
    report |= {"hardware": hardware.cpu, "load": f"load average {os.getloadavg()[0]:.1f} on {hardware.cores} cores"}
    made = {"overhead": overhead, "balance": balance, "loss": loss, "chaos": chaos, "drain": drain, "hosts": hosts}
    for part in options.only.split(","):
        report[part] = made[part](effort)
        print(part, json.dumps(report[part]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
