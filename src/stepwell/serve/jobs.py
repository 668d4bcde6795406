"""The durable record of every asynchronous job on one host: SQLite, one writer thread, readers on their own connections.

A write is a command in a queue, answered by a future once it is committed to disk; commands that wait together share one
transaction, and so one flush. A command given is a command executed: its future can't be cancelled. Nothing here knows of an
event loop; there, wrap the futures with `asyncio.wrap_future`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from stepwell.errors import EngineClosed, InvalidRequest, StepwellError

logger = logging.getLogger(__name__)
JobKind = Literal["video", "image"]
JobStatus = Literal["queued", "in_progress", "completed", "failed"]
SCHEMA_VERSION = 1
MAX_PAGE = 1000
BUSY_S = 10.0  # how long to wait for a foreign process, such as a backup, that locks the file
UNFINISHED = "status IN ('queued', 'in_progress')"
OF_OWNER = "id = ? AND (? IS NULL OR owner = ?)"
SCHEMA = (
    "CREATE TABLE schema_version (version INTEGER NOT NULL)",
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, request TEXT NOT NULL, owner TEXT NOT NULL,
        remixed_from TEXT, status TEXT NOT NULL CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
        created_at REAL NOT NULL, started_at REAL, completed_at REAL, expires_at REAL,
        attempts INTEGER NOT NULL, progress INTEGER NOT NULL, error TEXT, result TEXT,
        key_owner TEXT, key TEXT, key_hash TEXT, key_expires_at REAL)""",
    "CREATE INDEX jobs_by_creation ON jobs (created_at)",
    "CREATE INDEX jobs_by_owner ON jobs (owner, kind, created_at)",
    f"CREATE INDEX jobs_unfinished ON jobs (created_at) WHERE {UNFINISHED}",
    "CREATE INDEX jobs_by_expiry ON jobs (expires_at) WHERE expires_at IS NOT NULL",
    "CREATE UNIQUE INDEX jobs_by_key ON jobs (key_owner, key) WHERE key IS NOT NULL",
)


class BadStore(InvalidRequest):
    """A job store that can't be opened: unreadable, damaged, of a newer version, or in use by another server. `param` is it."""

    code = "bad_store"


class StoreFailed(StepwellError):
    """The disk did not take a write, or give back what was written; nothing of the command was stored."""

    status = 507
    code = "store_failed"


class IdempotencyMismatch(InvalidRequest):
    """An idempotency key that came before, with another body."""

    code = "idempotency_mismatch"


def new_job_id(kind: JobKind = "video") -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class Job:
    """One asynchronous job. Times are Unix seconds, None while unknown; `progress` is percent; `request` is opaque JSON.

    `owner` is the hash of an API key, "" where there are none. `error` holds `code`, `message` and `param`.
    A `created_at` of 0 is filled in by `JobStore.create`. `completed_at` is when the job ended, whether well or not.
    """

    id: str
    kind: JobKind
    request: dict[str, Any]
    owner: str = ""
    remixed_from: str | None = None
    status: JobStatus = "queued"
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    attempts: int = 0
    progress: int = 0
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's promise that `key` stands for one body; it holds for `keep_s` seconds, or until the job is deleted."""

    owner: str
    key: str
    body_hash: str
    keep_s: float


Jobs = list[Job]  # inside JobStore, `list` is a method
Page = tuple[list[Job], bool]
COLUMNS = ", ".join(item.name for item in fields(Job))


@dataclass(slots=True)
class _Command:
    run: Callable[[sqlite3.Connection], Job | None]
    is_delete: bool = False
    answer: Future[Any] = field(default_factory=Future)


class JobStore:
    """All methods may be called from any thread. Those that write return futures, resolved once the write is on disk.

    `path` is created where missing; `path.lock` beside it keeps a second server out. Raises `BadStore`. Futures and reads
    fail with `StoreFailed` if the disk does, and every method raises `EngineClosed` after `close`. A job that is not there
    is None. `start requeue complete fail` act on a job in the right state and otherwise just give it back as it is.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time):
        self._path, self._lock_file, self._writer = _open(path)
        self._clock = clock
        self._wake = threading.Condition()  # guards the four below
        self._commands: list[_Command] = []
        self._progress: dict[str, int] = {}  # of the jobs in progress in this process
        self._idle: list[sqlite3.Connection] = []  # for readers
        self._is_closed = False
        self._thread = threading.Thread(target=self._write, name="stepwell-jobs", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------------------- writes
    def create(self, job: Job, idempotency: Idempotency | None = None) -> Future[Job]:
        """Record a queued job. Where its idempotency key came before with the same body, the answer is the job made then,
        which has another id than `job`; with another body the future fails with `IdempotencyMismatch`.
        """
        if job.status != "queued" or not job.id.isascii():
            raise ValueError(f"job {job.id!r} is {job.status!r}: a new job is queued, and its id is ASCII")
        now, key = self._clock(), idempotency
        job = replace(job, created_at=job.created_at or now)
        row = [_packed(getattr(job, item.name)) for item in fields(Job)]  # now, so that changes to `request` can't show later
        row += [None] * 4 if key is None else [key.owner, key.key, key.body_hash, now + key.keep_s]

        def run(db: sqlite3.Connection) -> Job | None:
            made = key and _made_before(db, key, now)
            if made is None:
                columns = f"{COLUMNS}, key_owner, key, key_hash, key_expires_at"
                db.execute(f"INSERT INTO jobs ({columns}) VALUES ({', '.join('?' * len(row))})", row)
            return made or _find(db, job.id, None)

        return self._submit(_Command(run))

    def start(self, id: str) -> Future[Job | None]:
        """queued → in_progress: one more attempt."""
        changes = "status = 'in_progress', started_at = ?, attempts = attempts + 1, progress = 0"
        return self._change(id, "status = 'queued'", changes, self._clock())

    def requeue(self, id: str) -> Future[Job | None]:
        """in_progress → queued, for a job whose attempt was cut short."""
        return self._change(id, "status = 'in_progress'", "status = 'queued', started_at = NULL, progress = 0")

    def complete(self, id: str, result: dict[str, Any], expires_at: float | None) -> Future[Job | None]:
        """Unfinished → completed. The result counts until `expires_at`, in Unix seconds; None is for good."""
        changes = "status = 'completed', result = ?, expires_at = ?, completed_at = ?, progress = 100"
        return self._change(id, UNFINISHED, changes, _packed(result), expires_at, self._clock())

    def fail(self, id: str, error: dict[str, Any], expires_at: float | None = None) -> Future[Job | None]:
        """Unfinished → failed, at the progress it had."""
        with self._wake:
            progress = self._progress.get(id, 0)
        changes = "status = 'failed', error = ?, expires_at = ?, completed_at = ?, progress = ?"
        return self._change(id, UNFINISHED, changes, _packed(error), expires_at, self._clock(), progress)

    def delete(self, id: str, owner: str | None) -> Future[Job | None]:
        """Forget a job in whatever state, and its idempotency key. The answer is the job as it was."""

        def run(db: sqlite3.Connection) -> Job | None:
            job = _find(db, id, owner)
            if job is not None:
                db.execute("DELETE FROM jobs WHERE id = ?", (id,))
            return job

        return self._submit(_Command(run, is_delete=True))

    def progress(self, id: str, percent: int) -> None:
        """Note how far a job in progress is, 0 to 100; in memory only, and never backwards within an attempt."""
        with self._wake:
            if id in self._progress:
                self._progress[id] = max(self._progress[id], min(100, int(percent)))

    def close(self) -> None:
        """Commit what was submitted and let go of the file. May be called again."""
        with self._wake:
            if self._is_closed:
                return
            self._is_closed = True
            self._wake.notify()
        self._thread.join()
        for db in (*self._idle, self._writer):
            db.close()
        fcntl.flock(self._lock_file, fcntl.LOCK_UN)  # closing would not do while a forked child has the file open
        os.close(self._lock_file)

    # -------------------------------------------------------------------------------------------------------------- reads
    def get(self, id: str, owner: str | None) -> Job | None:
        """A job of this owner; of anyone if `owner` is None."""
        found = self._read(OF_OWNER, _plain(id), owner, owner)
        return found[0] if found else None

    def made_for(self, claim: Idempotency) -> Job | None:
        """The job that an idempotency key stands for already, made by the same body."""
        known = "key_owner = ? AND key = ? AND key_hash = ? AND key_expires_at > ?"
        found = self._read(known, claim.owner, claim.key, claim.body_hash, self._clock())
        return found[0] if found else None

    def list(
        self, kind: JobKind | None, owner: str | None, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> Page:
        """At most `limit` jobs in order of creation, from behind the job `after`, and whether there are more.

        Raises InvalidRequest where `after` is no job of this kind and owner, or `limit` or `order` is wrong.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidRequest(f"limit = {limit}: must be between 1 and {MAX_PAGE}", param="limit")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"order = {order!r}: must be 'asc' or 'desc'", param="order")
        given = {name: value for name, value in (("kind", kind), ("owner", owner)) if value is not None}
        conditions, values = ["1", *(f"{name} = ?" for name in given)], [*given.values()]
        if after is not None:
            last = self.get(after, owner)
            if last is None or kind not in (None, last.kind):
                raise InvalidRequest(f"after = {after!r}: there is no such {kind or 'job'}", param="after")
            side = ">" if order == "asc" else "<"
            conditions.append(f"(created_at, seq) {side} (SELECT created_at, seq FROM jobs WHERE id = ?)")
            values.append(after)
        rest = f"{' AND '.join(conditions)} ORDER BY created_at {order}, seq {order} LIMIT ?"
        jobs = self._read(rest, *values, limit + 1)
        return jobs[:limit], len(jobs) > limit

    def unfinished(self) -> Jobs:
        """Every queued or in_progress job in order of creation: what a server that starts has to take up again."""
        return self._read(f"{UNFINISHED} ORDER BY created_at, seq")

    def expired(self, now: float) -> Jobs:
        """The ended jobs whose `expires_at` has come, the longest expired first."""
        return self._read("status IN ('completed', 'failed') AND expires_at <= ? ORDER BY expires_at, seq", now)

    def _read(self, rest: str, *values: object) -> Jobs:
        with self._wake:
            if self._is_closed:
                raise EngineClosed("the job store is closed")
            db = self._idle.pop() if self._idle else None
            progress = self._progress.copy()  # before the row: after it, a job that ends meanwhile would seem to fall to 0
        try:
            db = db or _connect(self._path)
            jobs = _select(db, rest, *values)
        except sqlite3.Error as error:
            logger.error("%s: a read failed: %r", self._path, error)
            raise StoreFailed(f"the job store can't be read: {error}") from None
        with self._wake:
            if not self._is_closed:
                self._idle.append(db)
        return [_with_progress(job, progress) for job in jobs]

    # --------------------------------------------------------------------------------------------------------- the writer
    def _change(self, id: str, when: str, changes: str, *values: object) -> Future[Job | None]:
        def run(db: sqlite3.Connection) -> Job | None:
            db.execute(f"UPDATE jobs SET {changes} WHERE id = ? AND {when}", (*values, id))
            return _find(db, id, None)

        return self._submit(_Command(run))

    def _submit(self, command: _Command) -> Future[Any]:
        command.answer.set_running_or_notify_cancel()  # a caller who goes away must not undo what it asked for
        with self._wake:
            if self._is_closed:
                raise EngineClosed("the job store is closed")
            self._commands.append(command)
            self._wake.notify()
        return command.answer

    def _write(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or self._is_closed)
                group, self._commands = self._commands, []
            if not group:
                return
            self._commit(group)

    def _commit(self, group: Sequence[_Command]) -> None:
        """Run commands in one transaction; should it fail, each in one of its own, so that only the culprit fails."""
        try:
            outcomes = _transact(self._writer, group)
        except Exception as error:
            if len(group) > 1:
                for command in group:
                    self._commit([command])
                return
            logger.error("%s: a write failed: %r", self._path, error)
            is_disk = isinstance(error, sqlite3.Error)
            group[0].answer.set_exception(StoreFailed(f"the job was not stored: {error}") if is_disk else error)
            return
        for command, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, InvalidRequest):
                command.answer.set_exception(outcome)
            else:
                command.answer.set_result(outcome and self._follow(outcome, command.is_delete))

    def _follow(self, job: Job, is_gone: bool) -> Job:
        """Keep the progress of jobs in progress and of no others; the job with what it was."""
        with self._wake:
            shown = _with_progress(job, self._progress)
            if job.status == "in_progress" and not is_gone:
                self._progress.setdefault(job.id, 0)
            else:
                self._progress.pop(job.id, None)
        return shown


def _transact(db: sqlite3.Connection, group: Sequence[_Command]) -> list[Job | InvalidRequest | None]:
    outcomes: list[Job | InvalidRequest | None] = []
    db.execute("BEGIN IMMEDIATE")
    try:
        for command in group:
            try:
                outcomes.append(command.run(db))
            except InvalidRequest as refusal:  # before it wrote anything; an answer only once the reason is committed
                outcomes.append(refusal)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite ends it by itself after some errors
            db.execute("ROLLBACK")
        raise
    return outcomes


def _made_before(db: sqlite3.Connection, claim: Idempotency, now: float) -> Job | None:
    own = claim.owner, claim.key
    db.execute("UPDATE jobs SET key = NULL WHERE key_owner = ? AND key = ? AND key_expires_at <= ?", (*own, now))
    found = db.execute("SELECT id, key_hash FROM jobs WHERE key_owner = ? AND key = ?", own).fetchone()
    if found is not None and found[1] != claim.body_hash:
        message = f"Idempotency-Key = {claim.key!r}: came before with another body; a new request needs a new key"
        raise IdempotencyMismatch(message, param="Idempotency-Key")
    return found and _find(db, found[0], None)


def _find(db: sqlite3.Connection, id: str, owner: str | None) -> Job | None:
    found = _select(db, OF_OWNER, _plain(id), owner, owner)
    return found[0] if found else None


def _plain(id: str) -> str | None:
    return id if id.isascii() else None  # no id is anything else, and SQLite would choke on half of a surrogate pair


def _select(db: sqlite3.Connection, rest: str, *values: object) -> list[Job]:
    jobs = (Job(*row) for row in db.execute(f"SELECT {COLUMNS} FROM jobs WHERE {rest}", values))
    return [replace(job, **{name: _unpacked(getattr(job, name)) for name in ("request", "error", "result")}) for job in jobs]


def _packed(value: Any) -> Any:
    return json.dumps(value, allow_nan=False) if isinstance(value, dict) else value


def _unpacked(text: Any) -> Any:
    return text if text is None else json.loads(text)


def _with_progress(job: Job, progress: dict[str, int]) -> Job:
    return replace(job, progress=progress.get(job.id, 0)) if job.status == "in_progress" else job


def _open(path: Path) -> tuple[Path, int, sqlite3.Connection]:
    """The path without links, the lock file's descriptor, and a connection to a database that is sound and ours."""
    path = Path(os.path.realpath(path))
    try:
        with ExitStack() as undo:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock_file = _claim(path)
            undo.callback(os.close, lock_file)
            db = _connect(path)
            undo.callback(db.close)
            _prepare(db)
            undo.pop_all()
            return path, lock_file, db
    except (OSError, ValueError, sqlite3.Error) as error:
        raise BadStore(f"{path}: can't be opened as a job store: {error}", param=str(path)) from None


def _claim(path: Path) -> int:
    """Two servers on one file would run every job twice, so the second is refused. The kernel frees a dead one's lock."""
    lock_file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock_file, 32).decode("ascii", "replace")
        os.close(lock_file)
        if not isinstance(error, BlockingIOError):
            raise
        raise ValueError(f"another server (process {holder}) has it in use; give each server its own") from None
    with suppress(OSError):  # a full disk; the number is only for the message above
        os.ftruncate(lock_file, 0)
        os.pwrite(lock_file, str(os.getpid()).encode(), 0)
    return lock_file


def _connect(path: Path) -> sqlite3.Connection:
    # no thread check: a reader's connection goes from thread to thread, though never to two at once
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA synchronous = FULL")
    return db


def _prepare(db: sqlite3.Connection) -> None:
    """Check the file, and write the schema into a new one. Raises ValueError with the reason."""
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise ValueError(f"it is damaged ({found}); restore it, or move it away to begin anew")
    mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise ValueError(f"its file system can't hold a write-ahead log (journal mode {mode!r})")
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        db.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            db.execute(statement)
        db.execute("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION,))
        db.execute("COMMIT")
    elif not tables >= {"schema_version", "jobs"}:
        raise ValueError("it is a database of something else")
    (version,) = db.execute("SELECT max(version) FROM schema_version").fetchone()
    if version != SCHEMA_VERSION:
        raise ValueError(f"it has schema {version} and this build reads {SCHEMA_VERSION}; use the newer Stepwell that wrote it")
