"""What stands before the server's endpoints: who may ask, how large a body may be, and what is counted."""

import asyncio
import hmac
import json
import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram

OPEN = {"/", "/health", "/favicon.ico"}  # without a key
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class APIError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param=None, code=None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Limits:
    """Bytes of a body, seconds to receive one, prompts that may wait, seconds for an answer."""

    body: int = 1_000_000
    receive: float = 30.0
    queue: int = 256
    answer: float = 600.0


@dataclass
class Metrics:
    """What /metrics tells, besides the gauges that the server adds."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self):
        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"moonwhale_{name}", help, labels, registry=self.registry)

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(f"moonwhale_{name}", help, buckets=SECONDS, registry=self.registry)

        self.requests = counter("requests", "HTTP requests answered", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts read")
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.drafts_tested = counter("drafts_tested", "MTP guesses put to the test", "depth")
        self.drafts_accepted = counter("drafts_accepted", "MTP guesses that held", "depth")
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token")
        self.answer = histogram("answer_seconds", "From the request to its last token")


class Guard:
    """ASGI middleware. Pure, so that a client's going away still reaches the endpoint."""

    def __init__(
        self, app, limits: Limits, metrics: Metrics, api_key: str | None, hosts: set[str] | None, paths: set[str]
    ):
        self.app, self.limits, self.metrics, self.hosts, self.paths = app, limits, metrics, hosts, paths
        self.key = api_key.encode() if api_key else None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._admit(scope["path"], headers)
            await self.app(scope, await self._whole_body(headers, receive), counted)
        except APIError as error:
            body = json.dumps(error.body).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            if error.status in (408, 413):  # the rest of the body is not read
                headers.append((b"connection", b"close"))
            await counted({"type": "http.response.start", "status": error.status, "headers": headers})
            await counted({"type": "http.response.body", "body": body})
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if self.hosts is not None and host not in self.hosts:  # a web page whose name was pointed at this machine
            raise APIError(403, "this server answers to localhost only: call it by that name, or serve with --host")
        if self.key and path not in OPEN:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.key):
                raise APIError(
                    401,
                    "no valid API key: send it as `Authorization: Bearer KEY`",
                    "authentication_error",
                    code="invalid_api_key",
                )

    async def _whole_body(self, headers: dict[bytes, bytes], receive):
        """Reads the body within its limits; returns a `receive` that gives it and then goes on with the real one."""
        too_large = APIError(413, f"the body is larger than {self.limits.body:,} bytes: send less at a time")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body:
            raise too_large
        body, more, message = b"", True, {"type": "http.request", "body": b""}
        try:
            async with asyncio.timeout(self.limits.receive):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.limits.body:
                        raise too_large
        except TimeoutError:
            raise APIError(408, f"the body did not come within {self.limits.receive:g} seconds", "timeout") from None
        first = message if more else {"type": "http.request", "body": body, "more_body": False}

        async def replay():
            nonlocal first
            if first is not None:
                given, first = first, None
                return given
            return await receive()

        return replay


class Stopwatch:
    """Times one answer for the histograms."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._start, self._first = metrics, time.perf_counter(), True

    def token(self) -> None:
        if self._first:
            self._first = False
            self._metrics.first_token.observe(time.perf_counter() - self._start)

    def end(self) -> None:
        self._metrics.answer.observe(time.perf_counter() - self._start)
