"""The HTTP application: what it is made of, in the order in which it is started and stopped. Wiring only."""

import importlib
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from app import handlers, log, routes
from app.bootstrap import ensure_first_key
from app.broker import Publisher
from app.database import Database
from app.http.envelope import ERRORS
from app.http.notifier import Notifier
from app.http.prometheus import Exposition
from app.middleware import Surroundings
from app.settings import Settings
from app.store.blobs import open_blobs
from app.store.session import make_engine


def create_app(settings: Settings | None = None) -> FastAPI:
    """Make the application; nothing is opened before it is started.

    `uvicorn --factory app.main:create_app` reads the settings from the environment.
    """
    settings = settings or Settings()  # pyright: ignore[reportCallIssue]
    exposition = Exposition()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log.configure(settings)
        engine = make_engine(settings.database)
        await run_in_threadpool(ensure_first_key, engine, settings)
        publisher = Publisher(settings)
        notifier = Notifier(engine, streams_per_key=settings.streams_per_key)
        await notifier.start()
        exposition.watch(engine)
        app.state.database, app.state.notifier = Database(engine, publisher), notifier
        app.state.blobs = await run_in_threadpool(open_blobs, settings)
        structlog.get_logger(__name__).info("api.started", mode=settings.mode)
        yield
        await notifier.close()
        await run_in_threadpool(publisher.close)
        engine.dispose()
        structlog.get_logger(__name__).info("api.stopped")

    app = FastAPI(
        title="Tuneyard",
        version=version("tuneyard"),
        summary="Self-hosted training as a service.",
        lifespan=lifespan,
        docs_url=None,  # the stock pages load scripts from other hosts; routes/docs.py serves our own
        redoc_url=None,
        responses=ERRORS,
        generate_unique_id_function=_operation_id,
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.state.settings, app.state.exposition = settings, exposition
    app.add_middleware(Surroundings, settings=settings, observe=exposition.observe)
    handlers.install(app)
    for module in sorted(pkgutil.iter_modules(routes.__path__), key=lambda module: module.name):
        app.include_router(importlib.import_module(f"{routes.__name__}.{module.name}").router)
    return app


def _operation_id(route: APIRoute) -> str:
    return f"{route.tags[0] if route.tags else 'service'}_{route.name}"
