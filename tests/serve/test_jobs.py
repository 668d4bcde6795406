"""The job store: what was answered is there after a kill at any moment, keys make one job, states only go forward."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from stepwell.errors import EngineClosed, InvalidRequest
from stepwell.serve import jobs
from stepwell.serve.jobs import BadStore, Idempotency, IdempotencyMismatch, Job, JobStore, StoreFailed, new_job_id

ERROR = {"code": "step_failed", "message": "no", "param": None}
RANKS = {"queued": 0, "in_progress": 1, "completed": 2, "failed": 2}


class Clock:
    """Stands still, in Unix seconds, until told otherwise."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.db"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[JobStore]:
    made = JobStore(path, clock)
    yield made
    made.close()


def new(owner: str = "", kind: jobs.JobKind = "video", **request: Any) -> Job:
    return Job(id=new_job_id(kind), kind=kind, owner=owner, request=request)


def added(store: JobStore, **fields: Any) -> Job:
    return store.create(new(**fields)).result()


# ---------------------------------------------------------------------------------------------------------------- one job
def test_one_life(store: JobStore, clock: Clock) -> None:
    wanted = replace(new(owner="me", prompt="ein Kätzchen 🐈", sampling={"seed": 7, "size": [64, 32]}), remixed_from="video_0")
    made = store.create(wanted).result()
    assert made == replace(wanted, created_at=clock.now) == store.get(made.id, None)
    assert made.id.startswith("video_") and len(made.id) == 30

    clock.now += 1
    started = store.start(made.id).result()
    assert started == replace(made, status="in_progress", started_at=clock.now, attempts=1)
    store.progress(made.id, 40)
    store.progress(made.id, 30)
    assert store.get(made.id, "me") == replace(started, progress=40)
    assert store.unfinished() == [replace(started, progress=40)]

    again = store.requeue(made.id).result()
    assert again == replace(made, attempts=1) == store.get(made.id, None)
    started = store.start(made.id).result()
    assert started == replace(made, status="in_progress", started_at=clock.now, attempts=2)

    clock.now += 1
    store.progress(made.id, 99)
    done = store.complete(made.id, {"keys": ["a.mp4"]}, clock.now + 60).result()
    ends: dict[str, Any] = {"completed_at": clock.now, "expires_at": clock.now + 60, "result": {"keys": ["a.mp4"]}}
    assert started is not None
    assert done == replace(started, status="completed", progress=100, **ends) == store.get(made.id, None)
    assert store.unfinished() == []
    assert store.expired(clock.now) == [] and store.expired(clock.now + 60) == [done]
    assert store.delete(made.id, None).result() == done
    assert store.get(made.id, None) is None and store.delete(made.id, None).result() is None


def test_progress_is_never_written(store: JobStore, path: Path) -> None:
    job = added(store)
    store.progress(job.id, 50)  # not started
    store.progress("video_unknown", 50)
    assert store.get(job.id, None) == job
    store.start(job.id).result()
    with closing(sqlite3.connect(path)) as db:
        before = db.execute("PRAGMA data_version").fetchone()  # changes with every commit of others
        for percent, wanted in ((-1, 0), (40, 40), (30, 40), (98, 98), (101, 100), (3, 100)):
            store.progress(job.id, percent)
            (shown,), _ = store.list(None, None)
            assert shown.progress == wanted
        assert db.execute("PRAGMA data_version").fetchone() == before
    store.complete(job.id, {}, None).result()
    store.progress(job.id, 5)
    found = store.get(job.id, None)
    assert found is not None and found.progress == 100


def test_progress_of_a_job_that_ends_during_a_read(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = added(store)
    store.start(job.id).result()
    store.progress(job.id, 80)
    real, is_over = jobs._select, threading.Event()

    def select(*args: Any) -> list[Job]:
        rows = real(*args)
        if not is_over.is_set():
            is_over.set()
            store.complete(job.id, {}, None).result()
        return rows

    monkeypatch.setattr(jobs, "_select", select)
    seen = [store.get(job.id, None) for _ in range(2)]
    assert [job and (job.status, job.progress) for job in seen] == [("in_progress", 80), ("completed", 100)]


def test_a_command_given_is_a_command_executed(store: JobStore) -> None:
    async def hang_up() -> str:
        job = new()
        answer = asyncio.wrap_future(store.create(job))
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        return job.id

    ids = [asyncio.run(hang_up()), store.create(new()).result(10).id]  # the writer took no harm
    assert [job.id for job in store.unfinished()] == ids


def test_misuse(store: JobStore) -> None:
    job = added(store)
    with pytest.raises(ValueError, match="a new job is queued"):
        store.create(replace(new(), status="completed"))
    with pytest.raises(ValueError):
        store.create(new(guidance=float("nan")))
    with pytest.raises(TypeError):
        store.create(new(picture=b"bytes"))
    with pytest.raises(StoreFailed):
        store.create(replace(new(), id=job.id)).result()
    for id in ("video_unknown", "", "\ud800", "é", "x' OR 1=1 --"):
        assert store.get(id, None) is None and store.delete(id, None).result() is None
    assert store.start("video_unknown").result() is None
    theirs = added(store, owner="they")
    assert store.get(theirs.id, "me") is None and store.delete(theirs.id, "me").result() is None
    assert store.delete(theirs.id, "they").result() == theirs
    assert store.unfinished() == [job]


def test_closed(store: JobStore, path: Path) -> None:
    answers = [store.create(new()) for _ in range(50)]
    store.close()  # commits what waits
    store.close()
    made = [answer.result(0) for answer in answers]
    for call in (lambda: store.get("video_1", None), lambda: store.start("video_1"), store.unfinished):
        with pytest.raises(EngineClosed, match="the job store is closed"):
            call()
    with closing(JobStore(path)) as again:
        assert again.unfinished() == made


# ------------------------------------------------------------------------------------------------------------------ lists
@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_pages_with_ties(store: JobStore, clock: Clock, order: str, limit: int) -> None:
    made = []
    for number in range(20):
        if number in (8, 9, 15):
            clock.now += 1
        if number == 18:
            clock.now -= 2  # a clock set back
        made.append(added(store, owner="me" if number % 5 else "they", kind="video" if number % 7 else "image"))
    kinds: tuple[jobs.JobKind | None, ...] = (None, "video", "image")
    made.sort(key=lambda job: job.created_at)  # a stable sort: ties by creation
    if order == "desc":
        made.reverse()
    for kind in kinds:
        for owner in (None, "me", "they", "nobody"):
            wanted = [job for job in made if kind in (None, job.kind) and owner in (None, job.owner)]
            got: list[Job] = []
            has_more = True
            while has_more:
                page, has_more = store.list(kind, owner, got[-1].id if got else None, limit, order)
                assert len(page) == limit or not has_more
                got += page
            assert got == wanted


def test_pages_while_jobs_come_and_go(store: JobStore) -> None:
    made = [added(store) for _ in range(10)]
    page, _ = store.list(None, None, None, 4, "asc")
    store.delete(made[5].id, None).result()
    late = added(store)
    rest, has_more = store.list(None, None, page[-1].id, 100, "asc")
    assert page + rest == [*made[:5], *made[6:], late] and not has_more


def test_wrong_pages(store: JobStore) -> None:
    video, image = added(store, owner="me"), added(store, owner="me", kind="image")
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("after", lambda: store.list("video", "me", "video_unknown")),
        ("after", lambda: store.list("video", "me", "\ud800")),
        ("after", lambda: store.list("video", "they", video.id)),
        ("after", lambda: store.list("video", "me", image.id)),
        ("limit", lambda: store.list("video", "me", limit=0)),
        ("limit", lambda: store.list("video", "me", limit=10**30)),
        ("order", lambda: store.list("video", "me", order="desc; --")),
    ]
    for param, call in wrong:
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.param == param and caught.value.status == 400


# ------------------------------------------------------------------------------------------------------------ idempotency
def test_one_key_one_job(store: JobStore, path: Path, clock: Clock) -> None:
    key = Idempotency("me", "k", "hash", 60)
    first = store.create(new(owner="me"), key).result()
    assert store.create(new(owner="me"), key).result() == first
    assert store.create(new(owner="they"), replace(key, owner="they")).result().id != first.id
    assert store.create(new(owner="me"), replace(key, key="other")).result().id != first.id
    with pytest.raises(IdempotencyMismatch) as caught:
        store.create(new(owner="me"), replace(key, body_hash="another")).result()
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "idempotency_mismatch", "Idempotency-Key")
    store.complete(first.id, {}, None).result()
    assert store.create(new(owner="me"), key).result() == store.get(first.id, None)  # as it is now
    clock.now += 59.9
    store.close()
    with closing(JobStore(path, clock)) as again:
        assert again.create(new(owner="me"), key).result().id == first.id
        clock.now += 0.1
        second = again.create(new(owner="me"), replace(key, body_hash="another")).result()
        assert second.id != first.id and again.get(first.id, None) is not None
        again.delete(second.id, None).result()
        assert again.create(new(owner="me"), key).result().id not in (first.id, second.id)


def test_twenty_threads_one_key(store: JobStore) -> None:
    line = threading.Barrier(20)

    def race(number: int) -> list[str]:
        made = []
        for turn in range(10):
            line.wait()
            body = "a" if number < 15 else "b"
            answer = store.create(new(owner="me", body=body), Idempotency("me", f"key-{turn}", body, 60))
            error = answer.exception()
            assert error is None or isinstance(error, IdempotencyMismatch)
            made.append(answer.result().id if error is None else "")
        return made

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(race, range(20)))
    for turn, ids in enumerate(zip(*answers, strict=True)):
        (winner,) = set(ids) - {""}
        job = store.get(winner, "me")
        assert job is not None
        assert [id != "" for id in ids] == [("a" if number < 15 else "b") == job.request["body"] for number in range(20)], turn
    assert len(store.unfinished()) == 10


def test_one_that_fails_does_not_spoil_its_group(store: JobStore, path: Path) -> None:
    key, taken = Idempotency("me", "k", "hash", 60), added(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        held = store.create(new())  # waits for the lock, and the next ones for it: they will share a transaction
        answers = [store.create(new(), key), store.create(new(), replace(key, body_hash="b")), store.create(new(), key)]
        answers += [store.create(new()), store.create(replace(new(), id=taken.id)), store.create(new())]
        assert not held.done()
        db.execute("ROLLBACK")
    errors = [answer.exception() for answer in (held, *answers)]
    names = [type(error).__name__ if error else "" for error in errors]
    assert names == ["", "", "IdempotencyMismatch", "", "", "StoreFailed", ""]
    assert answers[0].result() == answers[2].result()
    assert len(store.unfinished()) == 5


# ------------------------------------------------------------------------------------------------------- any order at all
class Life(RuleBasedStateMachine):
    """Every method in any order against a plain model of what must come of it, with the file reopened in between."""

    ids: Bundle[str] = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.store = JobStore(Path(self.folder.name) / "jobs.db", self.clock)
        self.model: dict[str, Job] = {}

    @rule(target=ids, owner=st.sampled_from(["", "me"]))
    def create(self, owner: str) -> str:
        job = added(self.store, owner=owner)
        self.model[job.id] = job
        return job.id

    def expect(self, id: str, answer: Any, when: tuple[str, ...], status: jobs.JobStatus, **changes: Any) -> None:
        if id in self.model and self.model[id].status in when:
            self.model[id] = replace(self.model[id], status=status, **changes)
        assert answer.result() == self.model.get(id)

    @rule(id=ids)
    def start(self, id: str) -> None:
        attempts = self.model[id].attempts + 1 if id in self.model else 0
        self.expect(id, self.store.start(id), ("queued",), "in_progress", started_at=self.clock.now, attempts=attempts)

    @rule(id=ids)
    def requeue(self, id: str) -> None:
        self.expect(id, self.store.requeue(id), ("in_progress",), "queued", started_at=None, progress=0)

    @rule(id=ids, keep_s=st.integers(0, 5))
    def complete(self, id: str, keep_s: int) -> None:
        result, at = {"at": self.clock.now}, {"completed_at": self.clock.now, "expires_at": self.clock.now + keep_s}
        answer = self.store.complete(id, result, at["expires_at"])
        self.expect(id, answer, ("queued", "in_progress"), "completed", progress=100, result=result, **at)

    @rule(id=ids, keep_s=st.integers(0, 5))
    def fail(self, id: str, keep_s: int) -> None:
        at = {"completed_at": self.clock.now, "expires_at": self.clock.now + keep_s}
        answer = self.store.fail(id, ERROR, at["expires_at"])
        self.expect(id, answer, ("queued", "in_progress"), "failed", error=ERROR, **at)

    @rule(id=ids, percent=st.integers(-5, 120))
    def progress(self, id: str, percent: int) -> None:
        self.store.progress(id, percent)
        if id in self.model and self.model[id].status == "in_progress":
            job = self.model[id]
            self.model[id] = replace(job, progress=max(job.progress, min(100, percent)))

    @rule(id=ids)
    def delete(self, id: str) -> None:
        assert self.store.delete(id, None).result() == self.model.pop(id, None)

    @rule(seconds=st.integers(-1, 3))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = JobStore(Path(self.folder.name) / "jobs.db", self.clock)
        for id, job in self.model.items():
            if job.status == "in_progress":  # what a server does first
                self.model[id] = replace(job, status="queued", started_at=None, progress=0)
                assert self.store.requeue(id).result() == self.model[id]

    @invariant()
    def same(self) -> None:
        wanted = sorted(self.model.values(), key=lambda job: job.created_at)
        assert self.store.list(None, None, order="asc", limit=1000) == (wanted, False)
        assert self.store.unfinished() == [job for job in wanted if job.status in ("queued", "in_progress")]
        expired = {job.id for job in wanted if job.expires_at is not None and job.expires_at <= self.clock.now}
        assert {job.id for job in self.store.expired(self.clock.now)} == expired

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


# ------------------------------------------------------------------------------------------------------------- SIGKILL
CHILD = """
import os, sys, threading
from pathlib import Path
from stepwell.serve.jobs import Idempotency, Job, JobStore, new_job_id

store = JobStore(Path(sys.argv[1]))

def tell(*words):  # one write, so that a kill can't split a line among others
    os.write(1, (" ".join(words) + chr(10)).encode())

def work(number):
    for turn in range(10**6):
        key = f"{os.getpid()}-{number}-{turn}"
        made = store.create(Job(id=new_job_id(), kind="video", request={"key": key}), Idempotency("", key, "h", 3600)).result()
        tell("queued", made.id, key)
        if turn % 4 == 3:
            continue
        store.start(made.id).result()
        tell("in_progress", made.id, key)
        store.progress(made.id, 50)
        if turn % 4 == 0:
            store.complete(made.id, {"key": key}, None).result()
            tell("completed", made.id, key)
        elif turn % 4 == 1:
            store.fail(made.id, {"code": "x", "message": key, "param": None}).result()
            tell("failed", made.id, key)

for number in range(3):
    threading.Thread(target=work, args=(number,)).start()
tell("ready")
"""


def killed_child(path: Path, delay_s: float, is_ready: bool = True) -> list[list[str]]:
    """What a child answered its callers until it was killed, `delay_s` seconds after it opened the store, or was begun."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        lines = [child.stdout.readline()] if is_ready else []
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    assert child.wait() == -signal.SIGKILL
    return [line.split() for line in lines if line.endswith("\n") and line != "ready\n"]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    rng = random.Random(0)
    answered: dict[str, tuple[str, str]] = {}  # id: state and key
    retried: set[str] = set()
    for round in range(35):
        is_ready = round % 3 != 2  # or while it may still be opening what the last one left
        for state, id, key in killed_child(path, rng.uniform(0, 0.1), is_ready):
            answered[id] = state, key
        if round % 5 != 4:
            continue
        with closing(JobStore(path)) as store:  # its lock died with the child
            for id, (state, key) in answered.items():
                job = store.get(id, None)
                assert job is not None and RANKS[job.status] >= RANKS[state], (state, job)
                assert RANKS[state] < 2 or job.status == state
                assert job.request == {"key": key} and (id in retried or job.attempts == (job.status != "queued"))
                assert job.status != "completed" or job.result == {"key": key}
            for id in rng.sample(sorted(answered), min(20, len(answered))):
                assert store.create(new(), Idempotency("", answered[id][1], "h", 3600)).result().id == id
            unfinished = store.unfinished()
            assert len({job.request["key"] for job in unfinished}) == len(unfinished)  # one job per key, told of or not
            for job in unfinished:
                answered[job.id] = "failed", job.request["key"]
                store.requeue(job.id)
                store.start(job.id)
            again = [store.fail(job.id, ERROR).result() for job in unfinished]
            assert [job and job.attempts for job in again] == [job.attempts + 1 for job in unfinished]
            retried |= {job.id for job in unfinished}
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert {state for state, _ in answered.values()} >= {"completed", "failed"} and len(answered) > 50


def test_a_torn_log_loses_only_what_was_not_answered(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    answered = {id: state for state, id, _ in killed_child(path, 0.05)}
    log = Path(f"{path}-wal")
    with log.open("ab") as file:
        file.write(os.urandom(5000))  # the beginning of a write that a power cut ended
    with closing(JobStore(path)) as store:
        for id, state in answered.items():
            job = store.get(id, None)
            assert job is not None and RANKS[job.status] >= RANKS[state]


# ------------------------------------------------------------------------------------------------------------ the file
def test_one_server_per_file(store: JobStore, path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(BadStore, match=f"another server \\(process {os.getpid()}\\)") as caught:
            JobStore(name)
        assert str(path) in caught.value.message and caught.value.param == str(path)
    code = "import sys; from pathlib import Path; from stepwell.serve.jobs import JobStore; JobStore(Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert other.returncode == 1 and "has it in use" in other.stderr
    assert added(store).status == "queued"  # the attempts did no harm
    store.close()
    JobStore(path).close()


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def alter(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(os.urandom(8192)), "not a database"),
        (lambda path: (path.unlink(), path.mkdir()), "unable to open"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "malformed|damaged"),
        (lambda path: overwrite(path, 3 * 4096, b"\xff" * 4096), "malformed|damaged"),
        (lambda path: alter(path, "UPDATE schema_version SET version = 99"), "schema 99 and this build reads 1; use the newer"),
        (lambda path: alter(path, "DROP TABLE jobs"), "a database of something else"),
    ],
    ids=["garbage", "folder", "cut", "page", "newer", "alien"],
)
def test_files_that_can_not_be_opened(store: JobStore, path: Path, damage: Callable[[Path], Any], words: str) -> None:
    for answer in [store.create(new(prompt="x" * 500)) for _ in range(100)]:
        answer.result()
    store.close()
    damage(path)
    before = None if path.is_dir() else path.read_bytes()
    for _ in range(2):  # the second finds no lock left behind
        with pytest.raises(BadStore, match=words) as caught:
            JobStore(path)
        assert str(path) in caught.value.message
        assert (caught.value.status, caught.value.code, caught.value.param) == (400, "bad_store", str(path))
    assert path.is_dir() or path.read_bytes() == before  # evidence is left as it is


def test_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadStore, match="file/jobs.db"):
        JobStore(tmp_path / "file" / "jobs.db")


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Every connection made from here on; a store's first is its writer's."""
    real, made = sqlite3.connect, []

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = real(*args, **options)
        made.append(db)
        return db

    monkeypatch.setattr(sqlite3, "connect", connect)
    return made


def test_disk_full(connections: list[sqlite3.Connection], path: Path) -> None:
    with closing(JobStore(path)) as store:
        first = added(store, prompt="x")
        store.start(first.id).result()
        store.progress(first.id, 10)
        connections[0].execute("PRAGMA max_page_count = 30")  # SQLite now says what it says when the disk is full
        answers = [store.create(new(prompt="x" * 3000)) for _ in range(60)]
        errors = [answer.exception() for answer in answers]
        kept = [answer.result().id for answer, error in zip(answers, errors, strict=True) if error is None]
        assert 0 < len(kept) < 60 and [job.id for job in store.unfinished()] == [first.id, *kept]
        for error in errors:
            assert error is None or (isinstance(error, StoreFailed) and error.status == 507 and "full" in error.message)
        key = Idempotency("me", "k", "h", 60)
        with pytest.raises(StoreFailed, match="database or disk is full"):
            store.create(new(prompt="x" * 3000), key).result()
        assert store.get(first.id, None) == replace(store.unfinished()[0], progress=10)
        assert store.delete(kept[0], None).result() is not None  # makes room for what is under way
        assert store.complete(first.id, {}, None).result() is not None
        connections[0].execute("PRAGMA max_page_count = 1000000")
        again = store.create(new(prompt="x" * 3000), key).result()
        assert store.get(again.id, None) == again


def test_a_file_that_can_not_be_read_any_more(connections: list[sqlite3.Connection], path: Path) -> None:
    with closing(JobStore(path)) as store:
        job = added(store)
        with closing(sqlite3.connect(path)) as db:
            db.execute("ALTER TABLE jobs RENAME TO gone")
        with pytest.raises(StoreFailed, match="can't be read"):
            store.get(job.id, None)
        with pytest.raises(StoreFailed, match="not stored"):
            store.start(job.id).result()


def test_every_commit_reaches_the_disk(connections: list[sqlite3.Connection], path: Path) -> None:
    with closing(JobStore(path)):
        assert connections[0].execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connections[0].execute("PRAGMA journal_mode").fetchone() == ("wal",)
