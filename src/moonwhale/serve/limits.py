"""The limits of one server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits on requests and answers.

    body: largest request body, in bytes. A larger one gets a 413.
    receive: time to receive a body, in seconds. A slower one gets a 408.
    queue: how many prompts may wait for a slot. One more gets a 429.
    answer: time to generate an answer, in seconds. A slower one ends with a 408.
    """

    body: int = 1_000_000
    receive: float = 30
    queue: int = 256
    answer: float = 600
