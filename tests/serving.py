"""Runs a server in a thread, for the tests of the server and of its page."""

import json
import socket
import threading
import time

import httpx

from moonwhale.serve.app import DEFAULT_LIMITS
from moonwhale.serve.server import uvicorn_server

NAME = "tiny"
HELLO = [{"role": "user", "content": "Hello"}]


class Running:
    """Runs a server in a thread, on a free loopback port, while the context is open."""

    def __init__(self, app, limits=DEFAULT_LIMITS):
        self.app, self.listener = app, socket.create_server(("127.0.0.1", 0))
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as run_server does
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._server = uvicorn_server(app, limits)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not shut down"

    def post(self, path="/v1/chat/completions", **body):
        data = json.dumps({"model": NAME, "messages": HELLO} | body)  # httpx refuses to encode broken text
        return httpx.post(self.url + path, content=data, headers={"content-type": "application/json"}, timeout=20)

    def health(self):
        return httpx.get(self.url + "/health").json()

    def metric(self, name: str) -> float:
        """Returns the sum of a metric over its labels."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def comes_to_rest(self) -> bool:
        """Returns whether the server becomes idle within about five seconds: no request runs or waits."""
        return any(self.health()["running"] == self.health()["waiting"] == 0 or time.sleep(0.05) for _ in range(100))
