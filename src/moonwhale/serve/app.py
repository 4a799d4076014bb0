"""The server's ASGI application: OpenAI's API, the chat page, X-rays and metrics over one engine."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from moonwhale import __version__
from moonwhale.infer.engine import Engine
from moonwhale.serve.body import Preparation, describe_bodies
from moonwhale.serve.endpoints import DROPPED_HEADER, OpenAIEndpoints
from moonwhale.serve.errors import add_error_handlers
from moonwhale.serve.limits import Limits
from moonwhale.serve.metrics import Metrics, add_status_routes
from moonwhale.serve.middleware import AccessControl, BodyLimit, RequestCounter
from moonwhale.serve.page import add_page_routes
from moonwhale.serve.requests import ChatRequest, CompletionRequest, XrayRequest, XraySettings
from moonwhale.serve.worker import Worker
from moonwhale.serve.xray import XrayEndpoints

DEFAULT_LIMITS = Limits()


def create_app(
    engine: Engine,
    model_name: str,
    folder: Path,
    limits: Limits = DEFAULT_LIMITS,
    api_key: str | None = None,
    hosts: set[str] | None = None,
    origins: Sequence[str] = (),
    restarts: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Returns the ASGI application.

    model_name: name of the model in the API.
    folder: the model's checkpoint, which X-rays open.
    api_key: key that clients must send. None lets all clients in.
    hosts: host names that the server answers to, in lower case. None allows any name.
    origins: origins of web pages that may call the server from a browser (CORS); "*" allows all.
    restarts, on_end: what happens if the model's thread fails; see `Worker`.
    """
    worker = Worker(engine.scheduler, restarts, on_end)
    metrics = Metrics(worker)

    @asynccontextmanager
    async def run_worker(_: FastAPI):
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="moonwhale", version=__version__, docs_url=None, redoc_url=None, lifespan=run_worker)
    app.state.worker = worker
    preparation = Preparation()
    OpenAIEndpoints(engine, model_name, worker, preparation, limits, metrics).add_routes(app)
    XrayEndpoints(engine, model_name, folder, preparation, limits).add_routes(app)
    add_status_routes(app, model_name, worker, metrics)
    add_page_routes(app)
    add_error_handlers(app)
    describe_bodies(app, ChatRequest, CompletionRequest, XrayRequest, XraySettings)

    # The middleware added last is the outermost.
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(AccessControl, hosts=hosts, api_key=api_key)
    if origins:  # outside of AccessControl: a browser asks without a key whether it may send one
        methods = ["GET", "HEAD", "POST"]
        readable = [DROPPED_HEADER, "retry-after"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=["*"], expose_headers=readable
        )
    app.add_middleware(RequestCounter, metrics=metrics, paths={route.path for route in app.routes})
    return app
