"""Workers that are asked to stop, that are killed, that hang, and clients that hang up."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from benchmarks.cluster import Cluster, Process, until
from stepwell.dynamo.client import RetryingClient
from stepwell.errors import InvalidRequest, StepwellError, Unavailable
from tests.support.dynamo import needs_dynamo

pytestmark = needs_dynamo
MODEL = "fake/image"
PATH = "/v1/images/generations"
INFLIGHT = "dynamo_component_inflight_requests"
Later = Callable[[Callable[[], Any]], Future[Any]]


def asks(steps: int = 1, prompt: str = "a star") -> dict[str, Any]:
    nvext = {"annotations": [f"num_inference_steps:{steps}"]}  # its own field ends at 255
    return {"model": MODEL, "prompt": prompt, "response_format": "b64_json", "nvext": nvext}


class Service:
    """A frontend, and workers to come and go behind it; 20 ms a step."""

    def __init__(self, cluster: Cluster):
        self.cluster, self.url = cluster, cluster.frontend()

    def worker(self, **env: str) -> Process:
        """One more worker, in rotation."""
        wanted = self.cluster.instances(self.url) + 1
        made = self.cluster.worker("--model-path", "stepwell/fake-image?step_ms=20", "--served-model-name", MODEL, **env)
        until(lambda: self.cluster.instances(self.url) == wanted, 60, "one more worker")
        self.cluster.wait_for(self.url, MODEL)
        return made

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.url + PATH, json=body, timeout=60, trust_env=False)

    def client(self, **options: float) -> RetryingClient:
        return RetryingClient([self.url], **options)


@pytest.fixture
def service() -> Iterator[Service]:
    with Cluster() as cluster:
        yield Service(cluster)


@pytest.fixture
def later() -> Iterator[Later]:
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def test_what_runs_is_finished_and_nobody_new_is_sent(service: Service, later: Later) -> None:
    leaving = service.worker()
    running = later(lambda: service.post(asks(100)))
    until(lambda: leaving.metric(INFLIGHT) == 1, 10, "a request under way")
    stopped = later(leaving.stop)
    until(lambda: service.cluster.instances(service.url) == 0, 5, "out of rotation")
    assert service.post(asks()).status_code == 503 and not stopped.done()
    assert running.result().status_code == 200
    assert stopped.result() == 0


def test_a_client_that_hangs_up_ends_its_work(service: Service) -> None:
    worker = service.worker()
    with pytest.raises(httpx.ReadTimeout):  # 1000 steps take 20 s
        httpx.post(service.url + PATH, json=asks(1000), timeout=0.5, trust_env=False)
    until(lambda: worker.metric(INFLIGHT) == 0, 5, "nothing under way")
    began = time.monotonic()
    assert worker.stop() == 0 and time.monotonic() - began < 10


def test_a_worker_without_a_place_for_files(service: Service) -> None:
    service.worker()
    answer = service.post({**asks(), "response_format": "url"})
    assert answer.status_code == 400 and "this worker keeps nothing (--media-output-fs-url)" in answer.json()["message"]


def test_a_killed_worker_costs_a_retry(service: Service, later: Later) -> None:
    workers = [service.worker() for _ in range(2)]
    client = service.client()
    answers = [later(lambda: client.post(PATH, asks(40))) for _ in range(4)]
    until(lambda: all(worker.metric(INFLIGHT) for worker in workers), 10, "requests at both")
    plain = later(lambda: service.post(asks(40)))
    workers[0].kill()
    assert all(len(answer.result()["data"]) == 1 for answer in answers)
    assert plain.result().status_code in (200, 503)  # whoever does not ask again sees the loss


def test_a_client_knows_when_to_give_up(service: Service) -> None:
    with pytest.raises(Unavailable, match="404 after"):  # no worker yet, and so no route
        service.client(patience_s=0.5).post(PATH, asks())
    service.worker()
    with pytest.raises(InvalidRequest, match="400 .*unknown name 'stpes'"):
        service.client().post(PATH, {**asks(), "stpes": 1})
    with pytest.raises(StepwellError, match="500"):
        service.client().post(PATH, asks(4, prompt="poison"))
    with pytest.raises(Unavailable, match="no answer"):
        RetryingClient(["http://127.0.0.1:9"], patience_s=0.3).post(PATH, asks())
    assert RetryingClient(["http://127.0.0.1:9", service.url]).post(PATH, asks())["data"]


def test_a_probe_goes_through_the_model(service: Service, later: Later) -> None:
    probing = {"DYN_HEALTH_CHECK_ENABLED": "true", "DYN_CANARY_WAIT_TIME": "1", "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "1"}
    worker = service.worker(**probing)
    until(lambda: worker.health() == 200, 15, "a probe that was answered")
    hanging = later(lambda: service.post(asks(4, prompt="hang")))
    until(lambda: worker.health() == 503, 20, "one that was not")
    worker.kill()
    assert hanging.result().status_code == 503


@pytest.mark.long  # a file's lease has ten seconds; the same with etcd is below
def test_a_worker_nobody_finds_any_more_leaves(service: Service) -> None:
    worker = service.worker()
    time.sleep(3)  # it looks once a second
    worker.popen.send_signal(signal.SIGSTOP)
    until(lambda: service.cluster.instances(service.url) == 0, 30, "its lease to end")
    worker.popen.send_signal(signal.SIGCONT)
    assert worker.popen.wait(60) == 0
    assert "nobody finds this worker any more" in worker.log.read_text()


@pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed (Debian: etcd-server)")
def test_workers_found_by_etcd() -> None:
    with Cluster("etcd", {"ETCD_LEASE_TTL": "2"}) as cluster:
        service = Service(cluster)
        worker, other = service.worker(), service.worker()
        assert service.post(asks()).status_code == 200
        worker.kill()
        assert until(lambda: cluster.instances(service.url) == 1, 20, "out of rotation") < 10
        assert service.client().post(PATH, asks())["data"]
        other.popen.send_signal(signal.SIGSTOP)  # as a host that is cut off
        until(lambda: cluster.instances(service.url) == 0, 20, "its lease to end")
        other.popen.send_signal(signal.SIGCONT)
        assert other.popen.wait(60) == 0  # nobody finds it any more
