"""POST /v1/sleep and /v1/wake: direct requests are refused meanwhile, jobs wait on disk, and the memory is gone."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepwell.config.schema import EngineOptions
from stepwell.engine.remote import RemoteEngine
from tests.support.answers import check_headers, check_refusal
from tests.support.command import Command, until
from tests.support.server import fake, running


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body or None, timeout=30)


def state_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    check_headers(answer)
    body = answer.json()
    assert body.pop("object") == "engine" and list(body) == ["state"]
    return str(body["state"])


def picture(url: str, **body: Any) -> httpx.Response:
    return post(url, "/v1/images/generations", prompt="a star", **body)


def test_asleep_it_says_so_everywhere_and_how_to_wake_it(tmp_path: Path) -> None:
    with running(fake(), tmp_path) as made:
        assert picture(made.url).status_code == 200
        for _ in range(2):
            assert state_of(post(made.url, "/v1/sleep")) == "asleep"
        streamed = picture(made.url, stream=True)
        for answer in (picture(made.url), streamed, httpx.get(f"{made.url}/readyz")):
            error = check_refusal(answer, 503)
            assert error["code"] == "asleep" and "POST /v1/wake" in error["message"]
            assert int(answer.headers["retry-after"]) > 0
        health = httpx.get(f"{made.url}/health").json()
        assert health["status"] == "asleep" and health["queued"] == health["running"] == 0
        metrics = httpx.get(f"{made.url}/metrics").text
        assert "stepwell_engine_asleep 1.0" in metrics and "stepwell_engine_up 0.0" in metrics
        assert httpx.get(f"{made.url}/v1/models").status_code == httpx.get(f"{made.url}/v1/queue").status_code == 200
        for _ in range(2):
            assert state_of(post(made.url, "/v1/wake")) == "awake"
        assert httpx.get(f"{made.url}/readyz").status_code == 200
        assert "stepwell_engine_asleep 0.0" in httpx.get(f"{made.url}/metrics").text
        assert picture(made.url).status_code == 200


def test_a_mode_that_is_wrong_changes_nothing(tmp_path: Path) -> None:
    with running(fake(), tmp_path) as made:
        check_refusal(post(made.url, "/v1/sleep", mode="deep"), 400, param="mode")
        check_refusal(post(made.url, "/v1/sleep", level=1), 400, param="level")
        assert httpx.get(f"{made.url}/health").json()["status"] == "ok"


@pytest.mark.parametrize(("path", "query", "content", "param", "said"), [
    ("/v1/wake", "", b'{"mode": "finish"}', "mode", "unknown name 'mode' in the body"),
    ("/v1/wake", "", b"[1]", None, "the body = [1]: must be a JSON object"),
    ("/v1/wake", "", b"wake up", None, "the body is not JSON"),
    ("/v1/wake", "?tags=weights", b"", "tags", "unknown name 'tags' in the query"),
    ("/v1/sleep", "?level=1", b"", "level", "unknown name 'level' in the query"),
    ("/v1/sleep", "", b"null", None, "the body = None: must be a JSON object"),
    ("/v1/sleep", "", b'{"mode": null}', "mode", "mode = None: input should be 'finish' or 'abort'"),
])  # fmt: skip
def test_what_they_do_not_know_is_refused(
    tmp_path: Path, path: str, query: str, content: bytes, param: str | None, said: str
) -> None:
    with running(fake(), tmp_path) as made:
        before = "ok"
        if path == "/v1/wake":
            before = state_of(post(made.url, "/v1/sleep"))
        answer = httpx.post(f"{made.url}{path}{query}", content=content, headers={"Content-Type": "application/json"})
        error = check_refusal(answer, 400)
        assert said in error["message"] and error["param"] == param
        assert httpx.get(f"{made.url}/health").json()["status"] == before
        assert state_of(httpx.post(f"{made.url}/v1/wake", content=b"{}", headers={"Content-Type": "application/json"})) == "awake"


def test_it_needs_a_key_where_others_do(tmp_path: Path) -> None:
    with running(fake(), tmp_path, api_key="secret") as made:
        for path in ("/v1/sleep", "/v1/wake"):
            check_refusal(post(made.url, path), 401)
            answer = httpx.post(f"{made.url}{path}", headers={"Authorization": "Bearer secret", "Origin": "https://a.example"})
            check_refusal(answer, 403)
        assert httpx.get(f"{made.url}/health", headers={"Authorization": "Bearer secret"}).json()["status"] == "ok"


def video(url: str, **body: Any) -> str:
    answer = post(url, "/v1/videos", prompt="a star", num_frames=5, **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def status(url: str, id: str) -> str:
    return str(httpx.get(f"{url}/v1/videos/{id}").json()["status"])


@pytest.mark.parametrize("mode", ["finish", "abort"])
def test_jobs_wait_until_it_wakes(tmp_path: Path, mode: str) -> None:
    with running(fake("video", step_ms=20, max_running=1), tmp_path) as made:
        first = video(made.url, num_inference_steps=25)
        until(lambda: status(made.url, first) == "in_progress", 10, "begun")
        waiting = video(made.url)
        assert state_of(post(made.url, "/v1/sleep", mode=mode)) == "asleep"
        late = video(made.url)
        ended = {"finish": "completed", "abort": "queued"}[mode]
        until(lambda: status(made.url, first) == ended, 10, ended)
        assert status(made.url, waiting) == status(made.url, late) == "queued"
        assert httpx.delete(f"{made.url}/v1/videos/{late}").status_code == 200
        assert state_of(post(made.url, "/v1/wake")) == "awake"
        until(lambda: {status(made.url, id) for id in (first, waiting)} == {"completed"}, 20, "made")


def test_a_picture_under_way_is_finished_first(tmp_path: Path) -> None:
    with running(fake(step_ms=20), tmp_path) as made:
        answers: dict[str, httpx.Response] = {}  # which of the two comes first is up to their threads
        asking = threading.Thread(target=lambda: answers.update(picture=picture(made.url, num_inference_steps=25)))
        asking.start()
        until(lambda: httpx.get(f"{made.url}/health").json()["running"] == 1, 10, "begun")
        sleeping = threading.Thread(target=lambda: answers.update(sleep=post(made.url, "/v1/sleep")))
        sleeping.start()
        until(lambda: httpx.get(f"{made.url}/health").json()["status"] == "drowsy", 10, "drowsy")
        assert check_refusal(picture(made.url), 503)["code"] == "asleep"
        asking.join(20)
        sleeping.join(20)
        assert answers["picture"].status_code == answers["sleep"].status_code == 200 and "data" in answers["picture"].json()


# --------------------------------------------------------------------------------------------------- as people run it
def test_the_engines_process_is_gone_and_comes_back(tmp_path: Path) -> None:
    """The real model. Asleep, no process of the engine's holds anything."""
    with Command("stepwell/tiny-flux", tmp_path, "--threads", "1", "--warmup-sizes", "64x64") as server:
        server.begin()
        server.wait_ready(60)
        body = {"prompt": "a star", "size": "64x64", "seed": 1}
        before = server.http.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
        assert server.metric("stepwell_engine_memory_bytes") > 200 * 2**20
        assert state_of(server.http.post("/v1/sleep")) == "asleep"
        assert not server.engines() and server.metric("stepwell_engine_memory_bytes") == 0
        assert state_of(server.http.post("/v1/wake")) == "awake"
        assert len(server.engines()) == 1
        assert server.http.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"] == before
        assert server.stop() == 0
        assert not server.complaints()


def test_stopped_or_killed_asleep_it_loses_no_job(tmp_path: Path) -> None:
    with Command("stepwell/fake-video?step_ms=20", tmp_path, "--drain-seconds", "20") as server:
        server.start()
        begun = video(server.url, num_inference_steps=500)
        until(lambda: status(server.url, begun) == "in_progress", 10, "begun")
        assert state_of(post(server.url, "/v1/sleep", mode="abort")) == "asleep"
        httpx.delete(f"{server.url}/v1/videos/{begun}")
        jobs = [video(server.url)]
        assert until(lambda: server.process is None or server.stop() == 0, 5, "stopped") < 5, "it waited for what can't run"
        server.start()  # awake
        until(lambda: status(server.url, jobs[0]) == "completed", 20, "made")
        assert state_of(post(server.url, "/v1/sleep")) == "asleep"
        jobs.append(video(server.url))
        server.kill()
        assert not server.engines()
        server.start()
        until(lambda: status(server.url, jobs[1]) == "completed", 20, "made")
        assert server.stop() == 0
        assert not server.complaints()


def test_an_engine_killed_while_it_wakes_leaves_a_server_that_can_be_woken(tmp_path: Path) -> None:
    with Command("stepwell/tiny-llada", tmp_path, "--threads", "1") as server:  # a real one, as that takes a while to load
        server.begin()
        server.wait_ready(60)
        server.http.post("/v1/sleep")
        answers: list[httpx.Response] = []
        waking = threading.Thread(target=lambda: answers.append(post(server.url, "/v1/wake")))
        waking.start()
        until(server.engines, 10, "it loads")
        os.kill(server.engines()[0], signal.SIGKILL)
        waking.join(30)
        assert check_refusal(answers[0], 500)["code"] == "worker_lost"
        assert server.http.get("/health").json()["status"] == "asleep"
        assert state_of(server.http.post("/v1/wake")) == "awake"
        assert server.stop() == 0


def test_ranks_that_torchrun_started_would_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**place, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with running(RemoteEngine(EngineOptions(model_path="stepwell/fake-image?step_ms=2")), tmp_path) as made:
        error = check_refusal(post(made.url, "/v1/sleep"), 400)
        assert error["code"] == "unsupported" and "torchrun has started 2 ranks" in error["message"]
        assert picture(made.url).status_code == 200
