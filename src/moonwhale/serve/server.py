"""Runs the application in uvicorn, tuned for many streams at a time."""

import gc
import logging
import os
import re
import socket
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG
from uvicorn.logging import DefaultFormatter

from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.serve.app import create_app
from moonwhale.serve.connection import BoundedProtocol
from moonwhale.serve.limits import Limits


class LineFormatter(DefaultFormatter):
    """Escapes control characters: an error's message may repeat what a client or the model wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", lambda found: repr(found[0])[1:-1], super().format(record))


def run_server(
    engine: Engine,
    model_name: str,
    folder: Path,
    listener: socket.socket,
    limits: Limits,
    api_key: str | None,
    hosts: set[str] | None,
    origins: list[str],
    restarts: bool,
) -> None:
    """Answers requests on a bound socket until Ctrl-C or SIGTERM. `create_app` describes the rest.

    Raises:
        UserError: the model's thread has ended, which ends the server.
    """
    if engine.fits_cache and engine.decoder.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Steps of so small a model gain nothing from more threads, and the event loop needs a core. On two cores this
        # doubles the tokens per second.
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    # The model's thread waits at most 0.2 ms for the event loop to release the GIL. Python's default is 5 ms.
    sys.setswitchinterval(2e-4)

    def stop() -> None:
        server.should_exit = True  # uvicorn looks ten times a second, and lets open requests end

    app = create_app(engine, model_name, folder, limits, api_key, hosts, origins, restarts, on_end=stop)
    server = uvicorn_server(app, limits)
    gc.freeze()  # all objects so far live as long as the server: the garbage collector can skip them
    # Without TCP_NODELAY the second packet of an answer waits 40 ms for the acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{model_name} at {url} (a page to chat) and {url}/v1 (OpenAI's API); Ctrl-C stops", flush=True)
    server.run(sockets=[listener])
    if app.state.worker.failure:
        raise UserError(f"the model had to stop: {app.state.worker.failure}")


def uvicorn_server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """Returns a server whose connections keep the limits. It has no web sockets.

    It logs errors only: a client could fill a disk with warnings about its requests.
    """
    logs = deepcopy(LOGGING_CONFIG)
    logs["formatters"]["default"]["()"] = LineFormatter
    logs["loggers"]["asyncio"] = {"handlers": ["default"], "level": "ERROR", "propagate": False}
    protocol = partial(BoundedProtocol, limits=limits)
    options = {"log_config": logs, "log_level": "error", "server_header": False, "timeout_graceful_shutdown": 5}
    return uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", **options))
