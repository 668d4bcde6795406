"""One worker of several models: of one kind, and of several kinds, each found as if it were alone."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from benchmarks.cluster import Cluster, Process, until
from stepwell.models.flux import DEV
from tests.support.dynamo import TEMPLATE, needs_dynamo
from tests.support.llada2 import text_repository
from tests.support.repositories import flux_repository

pytestmark = needs_dynamo
PICTURE, OTHER, VIDEO, TEXT = "a/picture", "another/picture", "a/video", "a/text"
PICTURES, VIDEOS, CHAT = "/v1/images/generations", "/v1/videos", "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class One:
    """The worker, and the frontend before it, which does not see the worker's files."""

    url: str
    cluster: Cluster
    worker: Process


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[One]:
    """Two models of pictures, one of videos, one of text."""
    folder = tmp_path_factory.mktemp("models")
    flux = flux_repository(folder / "flux", dict(DEV.tiny))
    served = {
        PICTURE: "stepwell/tiny-flux",
        VIDEO: "stepwell/tiny-wan",
        OTHER: str(flux),
        TEXT: str(text_repository(folder / "text", {}, template=TEMPLATE)),
    }
    flags = [flag for path in served.values() for flag in ("--model-path", path)]
    with Cluster(env={"OMP_NUM_THREADS": "1"}) as cluster:
        names = [flag for name in served for flag in ("--served-model-name", name)]
        worker = cluster.worker(*flags, *names, "--threads", "1", DYN_SELF_HOST_METADATA="1")
        until(lambda: cluster.check() or worker.health() == 200, 120, "the worker")  # type: ignore[func-returns-value]
        url = cluster.frontend(without=folder)
        cluster.wait_for(url, *served)
        yield One(url, cluster, worker)


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=120, trust_env=False)


def picture(url: str, model: str = PICTURE, steps: int = 1) -> httpx.Response:
    nvext = {"num_inference_steps": steps, "seed": 1}
    return post(url, PICTURES, model=model, prompt="a star", size="64x64", response_format="b64_json", nvext=nvext)


def video(url: str, steps: int = 1) -> httpx.Response:
    nvext = {"num_inference_steps": steps, "num_frames": 5}
    return post(url, VIDEOS, model=VIDEO, prompt="a star", size="64x64", response_format="b64_json", nvext=nvext)


def words(url: str) -> httpx.Response:
    return post(url, CHAT, model=TEXT, messages=[{"role": "user", "content": "hello"}], max_tokens=4)


def test_each_kind_is_answered(one: One) -> None:
    assert video(one.url).status_code == 200
    answer = words(one.url)
    assert answer.status_code == 200 and answer.json()["model"] == TEXT, answer.text
    assert one.cluster.instances(one.url) == 3


def test_models_of_one_kind_are_told_apart(one: One) -> None:
    made = [picture(one.url, name) for name in (PICTURE, OTHER, PICTURE)]
    assert [answer.status_code for answer in made] == [200] * 3, made[1].text
    first, other, again = (answer.json()["data"][0]["b64_json"] for answer in made)
    assert first == again != other


def test_all_at_once(one: One) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(make, one.url, *rest) for make, *rest in 2 * [(picture,), (picture, OTHER), (video,), (words,)]]
        assert [each.result().status_code for each in asked] == [200] * 8


def test_what_is_wrong_is_told_by_each(one: One) -> None:
    for path, body, said in (
        (PICTURES, {"model": OTHER, "prompt": "a", "stpes": 1}, "unknown name 'stpes'"),
        (VIDEOS, {"model": VIDEO, "prompt": "a", "size": "64"}, "size = '64'"),
        (CHAT, {"model": TEXT, "messages": [{"role": "user", "content": "a"}], "top_k": 5}, "top_k = 5"),
    ):
        answer = post(one.url, path, **body)
        assert answer.status_code == 400 and said in answer.json()["message"]


def test_what_runs_is_finished_by_all_kinds(one: One) -> None:
    """The last test: the worker leaves."""
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(picture, one.url, PICTURE, 100), pool.submit(video, one.url, 40)]
        until(lambda: one.worker.is_alive and all(each.running() for each in running), 20, "requests under way")
        time.sleep(1)
        one.worker.popen.send_signal(signal.SIGTERM)
        until(lambda: one.cluster.instances(one.url) == 0, 10, "out of rotation")
        assert [each.result().status_code for each in running] == [200, 200]
    assert one.worker.popen.wait(60) == 0
