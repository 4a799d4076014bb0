"""Runs the application in uvicorn, tuned for many streams at a time."""

import gc
import os
import socket
import sys
from pathlib import Path

import torch
import uvicorn

from moonwhale.infer.engine import Engine
from moonwhale.serve.app import create_app
from moonwhale.serve.limits import Limits


def run_server(
    engine: Engine,
    model_name: str,
    folder: Path,
    listener: socket.socket,
    limits: Limits,
    api_key: str | None,
    hosts: set[str] | None,
    origins: list[str],
) -> None:
    """Answers requests on a bound socket until Ctrl-C or SIGTERM. `create_app` describes the rest."""
    if engine.fits_cache and engine.decoder.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Steps of so small a model gain nothing from more threads, and the event loop needs a core. On two cores this
        # doubles the tokens per second.
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    # The model's thread waits at most 0.2 ms for the event loop to release the GIL. Python's default is 5 ms.
    sys.setswitchinterval(2e-4)
    app = create_app(engine, model_name, folder, limits, api_key, hosts, origins)
    gc.freeze()  # all objects so far live as long as the server: the garbage collector can skip them
    # Without TCP_NODELAY the second packet of an answer waits 40 ms for the acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{model_name} at {url} (a page to chat) and {url}/v1 (OpenAI's API); Ctrl-C stops", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
