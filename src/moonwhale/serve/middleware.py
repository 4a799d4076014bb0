"""The middleware in front of the endpoints: it counts requests, checks the host and the API key, and limits bodies.

All of it is plain ASGI. Starlette's BaseHTTPMiddleware would keep a client's disconnect from the endpoint.
"""

import asyncio
import hmac
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moonwhale.serve import page
from moonwhale.serve.errors import APIError, busy
from moonwhale.serve.limits import LOOPBACK, Limits
from moonwhale.serve.metrics import Metrics

CLOSE = {"connection": "close"}  # the server does not read the rest of the body
NO_KEY_NEEDED = {*page.FILES, "/health", "/favicon.ico"}  # a browser loads the page before it can send the key
XRAY_PAGES = "/xray/"  # a frame sends no key; only the client that made an X-ray knows its random name


class RequestCounter:
    """Counts responses by path and status. Paths without a route share one label, so that clients cannot add more."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # if the app raises before it has begun a response

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()


class AccessControl:
    """Refuses requests to another host name (403) or without the API key (401), before their body is read.

    hosts: host names that the server answers to. None allows any name.

    Starlette's TrustedHostMiddleware would answer 400 in plain text. FastAPI's HTTPBearer is a dependency, which runs
    only after the body has been read, and only for paths that have a route.
    """

    def __init__(self, app: ASGIApp, hosts: set[str] | None, api_key: str | None):
        self.app, self.hosts = app, hosts
        self.api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (error.response() if error else self.app)(scope, receive, send)

    def _error(self, path: str, headers: Headers) -> APIError | None:
        # A web page may have pointed its own host name at this machine (DNS rebinding).
        host = re.sub(r":\d*$", "", headers.get("host", "").lower())  # without the port
        if self.hosts is not None and host not in self.hosts:
            names = " and ".join(["localhost", *sorted(self.hosts - LOOPBACK)])
            message = f"this server answers to {names} only: call it by that name, or start it with this one allowed"
            return APIError(403, message)
        if self.api_key and path not in NO_KEY_NEEDED and not path.startswith(XRAY_PAGES):
            scheme, _, given = headers.get("authorization", "").strip().partition(" ")
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.api_key)
            if scheme.lower() != "bearer" or not is_right:
                message = "no valid API key: send it as `Authorization: Bearer KEY`"
                headers = {"www-authenticate": "Bearer"}
                return APIError(401, message, code="invalid_api_key", headers=headers)
        return None


class BodyLimit:
    """Limits the size of a request body (413), the time to receive it (408), and the bytes of all bodies (429).

    The errors are raised where the endpoint reads the body. Starlette's RequestBodyLimitMiddleware has no time limit,
    and answers in plain text.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits
        self._held = 0  # bytes of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        content_length = Headers(scope=scope).get("content-length", "")
        announced = int(content_length) if content_length.isdecimal() else 0
        deadline = asyncio.get_running_loop().time() + self.limits.receive
        received, complete = 0, False

        async def receive_within_limits() -> Message:
            nonlocal received, complete
            if complete:  # the next message is the client's disconnect, which has no deadline
                return await receive()
            self._check_size(announced)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                message = f"the body did not come within {self.limits.receive:g} seconds"
                raise APIError(408, message, headers=CLOSE) from None
            size = len(message.get("body", b""))
            received += size
            self._held += size
            self._check_size(received)
            if self._held > self.limits.bodies:
                raise busy("the bodies of other requests take all the space")
            complete = not message.get("more_body", False)
            return message

        try:
            await self.app(scope, receive_within_limits, send)
        finally:
            self._held -= received

    def _check_size(self, size: int) -> None:
        if size > self.limits.body:
            message = f"the body is larger than {self.limits.body:,} bytes: send less at a time"
            raise APIError(413, message, headers=CLOSE)
