"""`moonwhale serve`: OpenAI's API and a chat page over one engine, for one machine."""

import asyncio
import gc
import os
import re
import socket
import sys
import time
import uuid
from contextlib import asynccontextmanager
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from starlette.exceptions import HTTPException

from moonwhale import __version__
from moonwhale.checkpoint import open_checkpoint
from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.inspect.xray import xray as draw
from moonwhale.serve.endpoints import Answering
from moonwhale.serve.middleware import APIError, Guard, Limits, Metrics
from moonwhale.serve.requests import XrayRequest
from moonwhale.serve.responses import invalid
from moonwhale.serve.worker import Worker

LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
NOTHING = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
PAGE_POLICY = f"{NOTHING}script-src 'self'; style-src 'self'; connect-src 'self'; frame-src 'self'"
XRAY_POLICY = f"{NOTHING}script-src 'unsafe-inline'; style-src 'unsafe-inline'"
KEPT_XRAYS = 16


def create_app(
    engine: Engine,
    name: str,
    folder: Path,
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: set[str] | None = None,
) -> FastAPI:
    """The ASGI application: `name` is the model's, `folder` its checkpoint, `hosts` the only names it answers to (None:
    any).
    """
    limits, metrics, worker = limits or Limits(), Metrics(), Worker(engine.scheduler)
    created = int(time.time())
    for gauge, help, value in (
        ("running", "Sequences in the batch", lambda: worker.running),
        ("waiting", "Prompts that wait for a slot", lambda: worker.waiting),
        ("cache_bytes", "Bytes of the latent cache", lambda: engine.scheduler.cache.bytes),
    ):
        Gauge(f"moonwhale_{gauge}", help, registry=metrics.registry).set_function(value)

    @asynccontextmanager
    async def lifespan(_):
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="moonwhale", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.worker = worker
    answering = Answering(engine, name, worker, limits, metrics)
    app.post("/v1/chat/completions")(answering.chat)
    app.post("/v1/completions")(answering.complete)

    card = {"id": name, "object": "model", "created": created, "owned_by": "moonwhale", "context": engine.context}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model}")
    async def model(model: str):
        answering.known(model)
        return card

    @app.get("/health")
    async def health():
        return {"status": "ok", "model": name, "running": worker.running, "waiting": worker.waiting}

    @app.get("/metrics")
    async def prometheus():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    pages = {
        "/": ("index.html", "text/html"),
        "/page.js": ("page.js", "text/javascript"),
        "/page.css": ("page.css", "text/css"),
    }
    for path, (file, kind) in pages.items():
        text = (files("moonwhale.serve") / "web" / file).read_text(encoding="utf-8")
        app.get(path, include_in_schema=False)(partial(_page, text, kind, PAGE_POLICY))

    xrays: dict[str, str] = {}
    looking = asyncio.Lock()

    @app.post("/xray")
    async def xray(body: XrayRequest):
        answering.known(body.model)
        messages = [message.model_dump() for message in body.messages]
        async with looking:
            page = await asyncio.to_thread(_look, folder, engine, messages)
        number = uuid.uuid4().hex
        xrays[number] = page
        while len(xrays) > KEPT_XRAYS:
            del xrays[next(iter(xrays))]
        return {"url": f"/xray/{number}"}

    @app.get("/xray/{number}", include_in_schema=False)
    async def xray_page(number: str):
        if number not in xrays:
            raise APIError(404, "this X-ray is gone: make it again")
        return _page(xrays[number], "text/html", XRAY_POLICY)

    _explain_errors(app)
    paths = {route.path for route in app.routes}
    app.add_middleware(Guard, limits=limits, metrics=metrics, api_key=api_key, hosts=hosts, paths=paths)
    return app


def _explain_errors(app: FastAPI) -> None:
    """Every failure as OpenAI's error object."""

    @app.exception_handler(APIError)
    async def _(_, error: APIError):
        headers = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(UserError)
    async def _(_, error: UserError):
        message = str(error)
        field = re.match(r"`([\w.]+)`", message)
        return JSONResponse(APIError(400, message.replace("`", ""), param=field and field[1]).body, 400)

    @app.exception_handler(RequestValidationError)
    async def _(_, error: RequestValidationError):
        return JSONResponse(invalid(error).body, 400)

    @app.exception_handler(HTTPException)
    async def _(http: HTTPRequest, error: HTTPException):
        what = {404: "there is nothing at this path", 405: "this path does not take this method"}
        message = what.get(error.status_code, str(error.detail))
        return JSONResponse(
            APIError(error.status_code, f"{message}: see /v1/models and /health").body, error.status_code
        )

    @app.exception_handler(Exception)
    async def _(_, error: Exception):
        return JSONResponse(APIError(500, "the server made a mistake; its log says which", "server_error").body, 500)


def _page(text: str, kind: str, policy: str) -> Response:
    """A page that may load what its policy says, all of it from here."""
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return Response(text, media_type=kind, headers=headers)


@cache
def _model(folder: Path):
    """The model as it was trained, for looking inside; opened when first asked for."""
    return open_checkpoint(folder)[0]


def _look(folder: Path, engine: Engine, messages: list[dict]) -> str:
    """The X-ray of a conversation whose last turn is the assistant's."""
    if messages[-1]["role"] != "assistant":
        raise UserError("messages: the last one has to be the assistant's, whose answer is looked into")
    prompt = engine.encode(messages[:-1])
    answer = engine.tokenizer(messages[-1]["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return draw(_model(folder), engine.tokenizer, prompt + answer, len(prompt))


def serve(
    engine: Engine, name: str, listener: socket.socket, limits: Limits, api_key: str | None, local: bool, folder: Path
) -> None:
    """Answers on a bound socket until Ctrl-C or SIGTERM; `local` refuses other names than this machine's."""
    if engine.fits_cache and engine.decoder.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Steps so small are not worth sharing out, and the event loop needs a core: twice the tokens on two of them.
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    sys.setswitchinterval(2e-4)  # seconds the model's thread waits for the event loop's to let go, not 5 ms
    app = create_app(engine, name, folder, limits, api_key, LOOPBACK if local else None)
    gc.freeze()  # what is here by now will stay: garbage collection need not look through it again and again
    # Else the second packet of an answer waits for the first one's acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    host, port = listener.getsockname()[:2]
    at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{name} at {at} (a page to chat) and {at}/v1 (OpenAI's API); Ctrl-C stops", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
