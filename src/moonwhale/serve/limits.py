"""The limits of one server, and the refusal of a request when the queue is full."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits on requests and answers.

    body: largest request body, in bytes. A larger one gets a 413.
    receive: time to receive a body, in seconds. A slower one gets a 408.
    queue: how many prompts may wait for a slot. One more gets a 429 (`check_queue`).
    answer: time to generate an answer, in seconds. A slower one ends with a 408.
    """

    body: int = 1_000_000
    receive: float = 30
    queue: int = 256
    answer: float = 600

    def check_queue(self, waiting: int, new: int) -> None:
        """Raises a 429 if `new` prompts do not fit into the queue, where `waiting` ones are."""
        from moonwhale.serve.errors import APIError  # `serve --help` needs the defaults above, without FastAPI

        if waiting + new > self.queue:
            raise APIError(429, f"{self.queue} prompts wait already: try again soon", headers={"retry-after": "1"})
