"""The HTTP application: routes over an engine. Bodies are `api`'s business, generation is the engine's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Depends, FastAPI

from stepwell import __version__
from stepwell.api.models import check_names
from stepwell.config.schema import EngineOptions, ServerOptions, one_or_more
from stepwell.engine.api import Engine
from stepwell.errors import InvalidRequest
from stepwell.media.storage import Storage
from stepwell.serve import images, operations, texts, videos
from stepwell.serve.docs import complete_document
from stepwell.serve.edges import OPEN, Edge, add_error_handlers, check_query
from stepwell.serve.files import Files
from stepwell.serve.jobs import JobStore
from stepwell.serve.keys import Keys
from stepwell.serve.metrics import Metrics
from stepwell.serve.runner import JobRunner
from stepwell.serve.state import Server
from stepwell.serve.webhooks import Webhooks

logger = logging.getLogger(__name__)


def open_server(engine: Engine, options: ServerOptions, engine_options: EngineOptions) -> Server:
    """What the routes share. Raises InvalidRequest for names, places and keys that are of no use."""
    check_names(one_or_more(options.served_model_name), engine_options.model_paths)
    data = Path(options.data_path)
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"data_path = {options.data_path!r} can't be made: {error.strerror}", param="data_path") from None
    storage = Storage(options.media_output_fs_url or str((data / "media").absolute()), options.media_output_http_url)
    files, metrics, webhooks = Files(storage), Metrics(), _webhooks(options)
    store = JobStore(data / "jobs.sqlite")
    jobs = JobRunner(store, files, engine, metrics, ttl_s=options.media_ttl_seconds, webhooks=webhooks)
    return Server(engine, engine_options, options, jobs, files, metrics)


def create_app(server: Server) -> FastAPI:
    """The application of a server. The engine may still be loading; `Server.begin` says when it is there."""
    keys = Keys.of(server.options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await close(server)

    app = FastAPI(title="Stepwell", version=__version__, lifespan=lifespan, redirect_slashes=False)
    routers = [operations.router(server), images.router(server), videos.router(server), texts.router(server)]
    for router in routers:
        app.include_router(router, dependencies=[Depends(check_query)])
    add_error_handlers(app, [route for router in routers for route in router.routes])
    complete_document(app, asks_for_key=keys.any, is_open=OPEN)
    names_matter = not keys.any and not server.options.allow_no_key
    app.add_middleware(Edge, keys=keys, metrics=server.metrics, is_draining=lambda: server.is_draining, names_matter=names_matter)
    return app


async def drain(server: Server) -> None:
    """Take nothing new in, and give what is running its time."""
    server.is_draining = True
    limit_s = server.options.drain_seconds
    deadline = asyncio.get_running_loop().time() + limit_s
    await server.jobs.drain(limit_s)
    while server.live and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    await server.engine.close()  # whoever still waits is told so


async def close(server: Server) -> None:
    """End what is still running, and let go of everything."""
    server.is_draining = True
    await server.engine.close()  # first: a job that is cancelled loses its checkpoint, one that is cut short keeps it
    await server.jobs.close()
    server.files.close()
    await asyncio.to_thread(server.inputs.close)


def _webhooks(options: ServerOptions) -> Webhooks | None:
    if options.webhook_url is None:
        return None
    if options.webhook_secret is None:
        raise InvalidRequest("webhook_url needs webhook_secret, which signs the messages", param="webhook_secret")
    return Webhooks(options.webhook_url, options.webhook_secret)
