"""What one connection may cost: bounds on the bytes and the time of a client, in uvicorn's protocol for httptools.

uvicorn's h11 protocol bounds a head as well, but its clients may drip, and an event of a stream costs it three times as
much time.
"""

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moonwhale.serve.limits import Limits

MAX_HEADERS = 100
MAX_PIECES = 20_000  # chunks of a body
MAX_PIPELINED = 16  # requests that a client sends before it has the first one's answer
FRAMING = 4  # bytes on the wire for each byte of the largest body: chunks have sizes, extensions and trailers


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which ends connections that exceed `Limits`."""

    def __init__(self, *args, limits: Limits, **keywords):
        super().__init__(*args, **keywords)
        self.limits = limits
        self._received, self._pieces = 0, 0  # bytes of the request that is being received, and chunks of its body
        self._idle_since = 0.0
        self._head_timer: TimerHandle | None = None  # runs while no request is being answered
        self._read_timer: TimerHandle | None = None  # runs while the client has much to read

    @property
    def _idle(self) -> bool:
        return self._head_timer is not None

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            idle = [other for other in self.connections if other._idle]
            if idle:
                min(idle, key=lambda other: other._idle_since).transport.abort()
            else:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n")
                transport.close()
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._time_head()
        bound = self.limits.head + (0 if self._idle else FRAMING * self.limits.body)
        if self._received > bound:
            self.send_400_response("The request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._received = self._pieces = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise ValueError("too many headers")  # uvicorn answers with a 400

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise ValueError("too many requests before the first answer")

    def on_body(self, body: bytes) -> None:
        self._pieces += 1
        if self._pieces > MAX_PIECES:
            raise ValueError("chunks of a few bytes each cost more time than they are worth")
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.limits.receive, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer:
            self._read_timer.cancel()
            self._read_timer = None

    def _time_head(self) -> None:
        """Starts the time for the next head unless a request is being answered, which stops it.

        The time also runs while the end of an answer is unread, or a body that was refused is still arriving.
        """
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None
        elif not answering and not self._head_timer:
            self._idle_since = self.loop.time()
            self._head_timer = self.loop.call_later(self.limits.receive, self.transport.abort)

    def _cancel_timers(self) -> None:
        for timer in filter(None, (self._head_timer, self._read_timer)):
            timer.cancel()
        self._head_timer = self._read_timer = None
