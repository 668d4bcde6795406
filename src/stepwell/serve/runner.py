"""Runs jobs: from the store through the engine into storage, whatever happens to the server in between.

A job is answered for once it is in the store. From there it goes to the engine, which orders it among everything else; a
server that starts takes up again what an earlier one left unfinished.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict

from stepwell.api.answers import cache_answer
from stepwell.api.body import Models, with_previews
from stepwell.engine.api import Engine
from stepwell.errors import EngineClosed, QueueFull, StepwellError, Unavailable, by_code
from stepwell.media.images import Parameters, decode_image
from stepwell.media.storage import StorageFailed
from stepwell.media.video import encode_mp4, spritesheet, thumbnail
from stepwell.serve.files import Files
from stepwell.serve.jobs import Idempotency, Job, JobStore, StoreFailed
from stepwell.serve.metrics import Metrics
from stepwell.serve.records import model_of, to_request
from stepwell.serve.webhooks import Webhooks
from stepwell.types import Done, Failed, Frames, Output, Preview, Progress, Request

logger = logging.getLogger(__name__)
MOST_ATTEMPTS = 25  # of one job, counting those a dying server cut short; hardly ever was it the job's fault
RETRY_S = 1.0
PREVIEWS = 5  # of a video, about


class JobRunner:
    """One server's jobs. Lives on the event loop; what blocks goes to threads."""

    def __init__(
        self, store: JobStore, files: Files, engine: Engine, metrics: Metrics, *, ttl_s: float, webhooks: Webhooks | None
    ):
        self.store = store
        self._files = files
        self._webhooks = webhooks
        self._engine = engine
        self._metrics = metrics
        self._ttl_s = ttl_s
        self._models: Models = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._begun: set[str] = set()
        self._coming: set[str] = set()
        self.previews: dict[str, Preview] = {}  # the latest of each running job
        self._janitor: asyncio.Task[None] | None = None
        self._is_draining = False
        self.is_awake = asyncio.Event()  # jobs wait in the store while the engine sleeps
        self.is_awake.set()

    # ---------------------------------------------------------------------------------------------------------- lifetime
    def start(self, models: Models) -> None:
        """Take up what was left unfinished, and tidy up from now on."""
        self._models = models
        for job in self.store.unfinished():
            if job.kind == "image":  # the record of a stored picture, made by a server that died before it was whole
                self.drop(job.id)
            else:
                self._take_up(job)
        self._janitor = asyncio.create_task(self._tidy())

    async def drain(self, timeout_s: float) -> None:
        """Let running jobs end within the time; everything else stays in the store for the next start."""
        self._is_draining = True
        waiting = [task for id, task in self._tasks.items() if id not in self._begun]
        for task in waiting:
            task.cancel()
        running = [task for id, task in self._tasks.items() if id in self._begun]
        if running:
            await asyncio.wait(running, timeout=timeout_s)  # those who are late end with the engine, and keep their checkpoints

    async def close(self) -> None:
        """Stop, and leave what is unfinished in the store."""
        self._is_draining = True
        tasks = [*self._tasks.values(), *([self._janitor] if self._janitor else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.store.close)
        if self._webhooks is not None:
            await asyncio.to_thread(self._webhooks.close, 5.0)

    def leaves(self, id: str) -> bool:
        """Whether a job that has not ended is left to the next start."""
        return self._is_draining and id not in self._tasks

    @property
    def active(self) -> int:
        """Jobs that are waiting or running, or about to be."""
        return len(self._tasks.keys() | self._coming)

    @contextmanager
    def coming(self, id: str) -> Iterator[None]:
        """Keep a place for a job while it is being recorded."""
        self._coming.add(id)
        try:
            yield
        finally:
            self._coming.discard(id)

    # -------------------------------------------------------------------------------------------------------------- verbs
    async def create(self, job: Job, claim: Idempotency | None = None) -> Job:
        """Record a job, then run it. The answer is there once it can't be lost any more; what was recorded is run even if
        nobody waits for the answer."""

        async def record() -> Job:
            recorded = await asyncio.wrap_future(self.store.create(job, claim))
            if recorded.id == job.id:
                self._take_up(recorded)
            return recorded

        return await asyncio.shield(asyncio.ensure_future(record()))

    async def delete(self, id: str, owner: str | None) -> Job | None:
        """Stop a job and erase it with its files. Raises StorageFailed, and keeps the row, where a file can't be erased."""
        if self.store.get(id, owner) is None:
            return None
        await self.stop(id)
        job = self.store.get(id, owner)
        if job is not None:
            try:
                await self._erase(job)
            except StorageFailed:
                await self._fail(id, "cancelled", "the job was stopped, but its files could not be erased")
                raise
        return job

    async def cancel(self, id: str) -> None:
        """Stop a job; it ends as failed."""
        await self.stop(id)
        await self._fail(id, "cancelled", "the job was cancelled")

    def drop(self, id: str) -> None:
        """Have what is unfinished expire at once, so that it goes with its files."""
        self.store.fail(id, {"code": "aborted", "message": "not finished", "param": None}, 0.0)

    async def stop(self, id: str) -> None:
        """Stop working on a job."""
        task = self._tasks.get(id)
        if task is not None:
            await self._engine.abort(id)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------------------ one job
    def _take_up(self, job: Job) -> None:
        task = self._tasks[job.id] = asyncio.create_task(self._run(job))

        def forget(_: asyncio.Task[None]) -> None:
            self._tasks.pop(job.id, None)
            self._begun.discard(job.id)
            self.previews.pop(job.id, None)

        task.add_done_callback(forget)

    async def _run(self, job: Job) -> None:
        try:
            if job.attempts >= MOST_ATTEMPTS:
                await self._end(job.id, "server_lost", f"the server died {job.attempts} times with this job under way")
                return
            model_of(job, self._models)  # it may be gone
            if job.status == "in_progress":
                await asyncio.wrap_future(self.store.requeue(job.id))
            while not await self._attempt(job):
                await asyncio.sleep(RETRY_S)
        except EngineClosed:
            pass  # the server is going; the next one finds the job in the store
        except StepwellError as error:
            await self._end(job.id, error.code, error.message, error.param)
        except Exception as error:
            logger.exception("job %s failed", job.id)
            await self._end(job.id, "internal_error", f"internal error: {type(error).__name__}")

    async def _attempt(self, job: Job) -> bool:
        """Run a job to its end. False if there is no room for it just now."""
        await self.is_awake.wait()
        request = with_previews(to_request(job, self._models, await self.image_of(job)), PREVIEWS)
        try:
            async with aclosing(self._engine.generate(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, Progress):
                        await self._note(job.id, event)
                    elif isinstance(event, Preview):
                        self.previews[job.id] = event
                    elif isinstance(event, Failed):
                        raise by_code(event.code, event.message, event.param)
                    elif isinstance(event, Done):
                        await self._finish(job, request, event.outputs[0])
        except (QueueFull, Unavailable):
            if job.id in self._begun:  # cut short; it is one of those that wait again
                self._begun.discard(job.id)
                await asyncio.wrap_future(self.store.requeue(job.id))
            return False
        return True

    async def _note(self, id: str, event: Progress) -> None:
        if id not in self._begun:
            self._begun.add(id)
            await asyncio.wrap_future(self.store.start(id))
        self.store.progress(id, min(99, int(100 * event.share)))

    async def _finish(self, job: Job, request: Request, output: Output) -> None:
        """Write the files, then the row's end: a completed row without its files never is. The names were in the row before, so
        that an attempt that was cut short leaves nothing that the next one would not overwrite."""
        parameters = Parameters.of(request, output, model_of(job, self._models))
        files = await asyncio.to_thread(_encode, request, output, parameters)
        keys: dict[str, str] = job.request["keys"]
        for name, content in files.items():
            await self._files.put(keys[name], content)
        timings = {name: round(ms, 3) for name, ms in output.timings_ms.items()}
        result = {"keys": keys, "timings_ms": timings, "cache": cache_answer(output.cache)}
        ended = await asyncio.wrap_future(self.store.complete(job.id, result, time.time() + self._ttl_s))
        if ended is None or ended.result is None or ended.result.get("keys") != keys:  # deleted, or ended otherwise, meanwhile
            for key in keys.values():
                await self._files.delete(key)
            return
        self._tell(ended)

    async def _end(self, id: str, code: str, message: str, param: str | None = None) -> None:
        """Fail a job that nobody works on any more; without its end it would hang, so a disk that fails is tried again."""
        with suppress(EngineClosed):  # the next server finds the job in the store
            while True:
                with suppress(StoreFailed):
                    await self._fail(id, code, message, param)
                    return
                await asyncio.sleep(RETRY_S)

    async def _fail(self, id: str, code: str, message: str, param: str | None = None) -> None:
        error = {"code": code, "message": message, "param": param}
        ended = await asyncio.wrap_future(self.store.fail(id, error, time.time() + self._ttl_s))
        if ended is not None and ended.error == error:
            self._metrics.failures.labels(code).inc()
            self._tell(ended)

    def _tell(self, job: Job) -> None:
        self._metrics.jobs.labels(job.status).inc()
        if self._webhooks is not None:
            self._webhooks.notify(f"{job.id}_{job.status}", f"{job.kind}.{job.status}", {"id": job.id, "status": job.status})

    async def image_of(self, job: Job) -> Frames | None:
        """The picture a job starts from."""
        key = job.request.get("image_key")
        return None if key is None else decode_image(await self._files.get(key))

    # ------------------------------------------------------------------------------------------------------------- tidying
    async def _tidy(self) -> None:
        while True:
            with suppress(StepwellError):
                for job in self.store.expired(time.time()):
                    with suppress(StorageFailed):  # once more, the next time
                        await self._erase(job)
            await asyncio.sleep(min(60.0, max(0.2, self._ttl_s / 4)))

    async def _erase(self, job: Job) -> None:
        """The files, then the row that names them: a failure or a kill in between leaves nothing that nobody knows of."""
        keys = {*job.request.get("keys", {}).values(), *(job.result or {}).get("keys", {}).values()}
        for key in filter(None, (*keys, job.request.get("image_key"))):
            await self._files.delete(key)
        await asyncio.wrap_future(self.store.delete(job.id, None))


def _encode(request: Request, output: Output, parameters: Parameters) -> dict[str, bytes]:
    frames = output.frames
    fps = request.sampling.fps or 1
    return {
        "video": encode_mp4(frames, fps, asdict(parameters)),
        "thumbnail": thumbnail(frames),
        "spritesheet": spritesheet(frames),
    }
