"""The engine as a worker of Dynamo's runtime, through its unified backend. The only module that imports Dynamo."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from dynamo.common.backend import DiffusionEngine, EngineConfig, LLMEngine, LlmRegistration, Worker, WorkerConfig
from dynamo.common.backend.health_check import build_raw_health_check_payload
from dynamo.llm import ModelInput
from dynamo.llm.exceptions import Cancelled, EngineShutdown, HttpError, InvalidArgument, Unknown
from dynamo.runtime import DistributedRuntime

from stepwell.api.body import Models
from stepwell.api.models import check_names, named
from stepwell.config.schema import EngineOptions, WorkerOptions, one_or_more
from stepwell.dynamo.live import Live
from stepwell.dynamo.media import Media
from stepwell.dynamo.text import Text
from stepwell.engine.api import Engine, EngineInfo
from stepwell.engine.remote import RemoteEngine
from stepwell.errors import InvalidRequest, StepwellError, Unavailable
from stepwell.media.incoming import Incoming
from stepwell.media.storage import Storage
from stepwell.samplers.calls import BEGIN

logger = logging.getLogger(__name__)
LOOK_S, MOST_MISSING, MOST_PATIENT = 1.0, 8, 30  # more than the usual grace period; the last is for registering
LEASES = ("etcd", "file")
ROUTES = {"pictures": "images", "videos": "videos"}
CALLS = "hermes"  # Dynamo's reader of <tool_call>{"name": …, "arguments": …}</tool_call>


class Handler(Protocol):
    """What answers requests of one kind: `dynamo.media`, `dynamo.text`."""

    def probe(self) -> dict[str, Any]: ...

    def answers(self, request: Any, context: Any) -> AsyncIterator[dict[str, Any]]: ...

    def close(self) -> None: ...


class Core:
    """What workers of all kinds do, several of which may share the engine. Dynamo calls on the event loop that that lives on."""

    def __init__(self, live: Live, handler: Handler, drain_s: float, registration: WorkerConfig):
        self.live, self.handler = live, handler
        self._drain_s, self._registration = drain_s, registration
        self._watch: asyncio.Task[None] | None = None
        self.begun = asyncio.Event()  # the runtime is there

    def watch(self, worker_id: int) -> None:
        """Look after this worker's registration, where that is a lease."""

        def complain(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                logger.error("this worker can't see its own registration: %s", task.exception())

        if self._registration.discovery_backend in LEASES:
            self._watch = asyncio.create_task(self._watched(worker_id))
            self._watch.add_done_callback(complain)

    async def _watched(self, worker_id: int) -> None:
        """Leave once nobody finds this worker any more: the runtime does not take a lease up again that ended while the host was
        cut off, or the process stopped, and whoever starts workers will start a new one."""
        r = self._registration
        runtime = DistributedRuntime(
            asyncio.get_running_loop(), r.discovery_backend, r.request_plane, event_plane=r.event_plane
        )  # the worker's own is out of reach
        client = await runtime.endpoint(f"{r.namespace}.{r.component}.{r.endpoint}").client()
        missing = -MOST_PATIENT  # looks since it was there
        while missing < MOST_MISSING:
            await asyncio.sleep(LOOK_S)
            missing = 0 if worker_id in client.instance_ids() else missing + 1
        logger.error("nobody finds this worker any more; it leaves, so that a new one can take its place")
        os.kill(os.getpid(), signal.SIGTERM)

    async def generate(self, request: Any, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        with self.live.entered():
            try:
                async with aclosing(self.handler.answers(request, context)) as answers:  # type: ignore[type-var]
                    async for answer in answers:
                        yield answer
            except StepwellError as error:
                raise told(error) from None
            except (ValueError, TypeError):  # Dynamo would blame the client
                logger.exception("a request failed")
                raise Unknown("internal error; the worker's log has the details") from None

    async def cleanup(self) -> None:
        """Dynamo has unregistered the worker, waited out its grace period, and cancels what is left after this."""
        if self._watch is not None:
            self._watch.cancel()
        await self.live.drain(self._drain_s)
        await asyncio.to_thread(self.handler.close)


def told(error: StepwellError) -> Exception:
    """An error in Dynamo's words. Clients see the message of an InvalidArgument only; the router passes by a worker that is
    shut down, and no other."""
    if error.code == "aborted":
        return Cancelled(error.message)
    if error.status in (400, 404, 413):
        return InvalidArgument(error.message)
    logger.error("%s: %s", error.code, error.message)
    if error.code == "engine_closed":
        return EngineShutdown(error.message)
    if error.code in ("storage_failed", "storage_full"):  # another worker may have room
        return HttpError(503, error.message)
    return HttpError(error.status, error.message) if error.status in (429, 503) else Unknown(f"{error.code}: {error.message}")


class Served:
    """What Dynamo asks of an engine, whatever it makes."""

    def __init__(self, core: Core, config: EngineConfig):
        self._core, self._config = core, config

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, WorkerConfig]:
        """Dynamo's own way to start, which `serve` does not take."""
        raise NotImplementedError("options come from stepwell worker")

    async def start(self, worker_id: int) -> EngineConfig:
        self._core.begun.set()
        self._core.watch(worker_id)
        return self._config

    async def health_check_payload(self) -> dict[str, Any]:
        return build_raw_health_check_payload(self._core.handler.probe())

    def generate(self, request: Any, context: Any) -> AsyncGenerator[dict[str, Any], None]:
        return self._core.generate(request, context)

    async def abort(self, context: Any) -> None:
        await self._core.live.abort(context)

    async def cleanup(self) -> None:
        await self._core.cleanup()


class MediaWorker(Served, DiffusionEngine):
    """Pictures or videos: the frontend passes requests on as they are."""


class TextWorker(Served, LLMEngine):
    """Text: tokens come and go; the frontend has the words."""


async def serve(options: WorkerOptions, engine_options: EngineOptions) -> None:
    """Load the models, and answer requests until SIGTERM. Raises StepwellError for what can't be served."""
    check_names(one_or_more(options.served_model_name), engine_options.model_paths)
    url = options.media_output_fs_url
    if url is None and options.media_output_http_url is not None:
        said = "this worker keeps nothing there; give media_output_fs_url"
        raise InvalidRequest(f"media_output_http_url = {options.media_output_http_url!r}: {said}", param="media_output_http_url")
    storage = None if url is None else Storage(url, options.media_output_http_url)
    engine = RemoteEngine(engine_options)
    info = await engine.start()
    try:
        workers = [
            _media(engine, info, models, options, storage) if _kind(models) in ROUTES else _text(engine, models, options)
            for models in groups_of(info, options)
        ]
        try:
            await together(workers)
        except Exception as error:  # the runtime is no Python, and raises what it likes
            logger.debug("the runtime ended", exc_info=True)
            raise Unavailable(f"Dynamo's runtime, by discovery_backend = {options.discovery_backend!r}: {error}") from error
    finally:
        await engine.close()


async def together(workers: Sequence[tuple[Worker, Core]]) -> None:
    """Run them until they have ended, all by the same signal. The first has begun before the others, so that it is the one that
    gets what a process has one of."""
    (worker, core), *others = workers
    first = asyncio.ensure_future(worker.run())
    begun = asyncio.ensure_future(core.begun.wait())
    await asyncio.wait((first, begun), return_when=asyncio.FIRST_COMPLETED)
    begun.cancel()
    await asyncio.gather(first, *(worker.run() for worker, _ in others))


def _kind(models: Models) -> str:
    return next(iter(models.values())).makes


def groups_of(info: EngineInfo, options: WorkerOptions) -> Sequence[Models]:
    """What is registered together: the model of text, all of pictures, all of videos. Raises InvalidRequest.

    Text is first, as the first one has `DYN_SYSTEM_PORT`, where frontends elsewhere find a tokenizer."""
    wishes = (
        ("image_diffusion_worker", options.image_diffusion_worker, "pictures"),
        ("video_generation_worker", options.video_generation_worker, "videos"),
    )
    for name, is_wanted, makes in wishes:
        other = next((model for model in info.models if model.makes != makes), None)
        if is_wanted and other is not None:
            raise InvalidRequest(f"{name} = True: {other.id!r} makes {other.makes}", param=name)
    models = named(info.models, one_or_more(options.served_model_name))
    groups = [{name: model for name, model in models.items() if model.makes == kind} for kind in ("text", *ROUTES)]
    if len(groups[0]) > 1:
        both = " and ".join(repr(model.id) for model in groups[0].values())
        raise InvalidRequest(f"model_path: {both} make text; a worker has one model of text: start several", param="model_path")
    kinds = [models for models in groups if models]
    if len(kinds) > 1 and options.endpoint is not None:
        said = f"each of {len(kinds)} kinds has its own; leave it out"
        raise InvalidRequest(f"endpoint = {options.endpoint!r}: {said}", param="endpoint")
    return kinds


def _media(
    engine: Engine, info: EngineInfo, models: Models, options: WorkerOptions, storage: Storage | None
) -> tuple[Worker, Core]:
    live = Live(engine)
    first, *others = models
    registration = _registration(options, first, ROUTES[_kind(models)], ModelInput.Text)
    handler = Media(live, info, models, Incoming(options), storage)
    config = EngineConfig(model=first, served_model_name=first, model_aliases=others)
    core = Core(live, handler, options.drain_seconds, registration)
    return Worker(MediaWorker(core, config), registration), core


def _text(engine: Engine, models: Models, options: WorkerOptions) -> tuple[Worker, Core]:
    ((name, model),) = models.items()
    assert model.text is not None
    live = Live(engine)
    config = EngineConfig(model=model.path, served_model_name=name, llm=LlmRegistration(context_length=model.text.context))
    folder = Path(model.path)
    template = template_of(folder)
    routes = "chat,completions" if template else "completions"
    if routes == "completions":
        logger.warning("%s has no chat template, so there will be /v1/completions only", folder)
    registration = _registration(options, name, routes, ModelInput.Tokens, model.path)
    if BEGIN in template:
        registration.tool_call_parser = CALLS  # else frontends leave calls in the text, but those they ask for by a schema
    core = Core(live, Text(live, model), options.drain_seconds, registration)
    return Worker(TextWorker(core, config), registration), core


def template_of(folder: Path) -> str:
    """The chat template that frontends find in a model's folder, or several as they are written; empty if there is none."""
    own, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text()
    return str(json.loads(path.read_bytes()).get("chat_template") or "") if path.is_file() else ""


def _registration(options: WorkerOptions, name: str, routes: str, takes: ModelInput, path: str | None = None) -> WorkerConfig:
    """Where and how the worker is found. Dynamo wants an endpoint of its own for each model."""
    endpoint = options.endpoint or f"{options.namespace}.{component_of(name)}.generate"
    namespace, component, endpoint = endpoint.removeprefix("dyn://").split(".")
    return WorkerConfig(
        namespace=namespace,
        component=component,
        endpoint=endpoint,
        model_name=path or name,
        served_model_name=name,
        model_input=takes,
        endpoint_types=routes,
        discovery_backend=options.discovery_backend,
        request_plane=options.request_plane,
        response_plane=options.response_plane,
        event_plane=options.event_plane,
        enable_kv_routing=False,
        enable_local_indexer=False,
    )


def component_of(name: str) -> str:
    """A model's name as Dynamo takes it. Letters that it has no room for are told apart by a hash."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain and name.isascii():
        return plain
    return f"{plain}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}".lstrip("-")
