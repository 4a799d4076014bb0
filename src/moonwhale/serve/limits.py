"""The limits of one server, and the refusal of a request when the queue is full."""

from dataclasses import dataclass

LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Limits:
    """Limits on connections, requests and answers.

    connections: open connections. One more replaces the one that has been idle for longest, or gets a 503.
    head: largest request line with its headers, in bytes. A larger one gets a 400.
    body: largest request body, in bytes. A larger one gets a 413.
    bodies: bytes of all bodies that are held at a time. A request for more gets a 429.
    receive: time in seconds that a client has to send a head, to send a body, and to read what it has not read yet.
        A body that takes longer gets a 408, and any other delay ends the connection.
    queue: how many prompts may wait for a slot. One more gets a 429. A request for more gets a 400.
    answer: time to generate an answer, in seconds. A slower one ends with a 408.
    xrays: X-rays that may wait while one is drawn. One more gets a 429.
    """

    connections: int = 512
    head: int = 64_000
    body: int = 1_000_000
    bodies: int = 64_000_000
    receive: float = 30
    queue: int = 256
    answer: float = 600
    xrays: int = 4

    def check_queue(self, waiting: int, prompts: int, choices: int) -> None:
        """Raises a 400 if `prompts` × `choices` exceed the queue, and a 429 if they do with the `waiting` ones."""
        from moonwhale.serve.errors import APIError, busy  # `serve --help` needs the defaults, without FastAPI

        new = prompts * choices
        if new > self.queue:
            message = (
                f"{prompts} prompts with n = {choices} are {new} answers, and {self.queue} may wait: ask for fewer"
            )
            raise APIError(400, message, param="prompt" if prompts > choices else "n")
        if waiting + new > self.queue:
            raise busy(f"{self.queue} prompts wait already")
