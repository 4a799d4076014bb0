"""The limits of one server, and the refusal of a request when the queue is full."""

from dataclasses import dataclass

LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Limits:
    """Limits on requests and answers.

    body: largest request body, in bytes. A larger one gets a 413.
    receive: time to receive a body, in seconds. A slower one gets a 408.
    queue: how many prompts may wait for a slot. One more gets a 429. A request for more gets a 400.
    answer: time to generate an answer, in seconds. A slower one ends with a 408.
    """

    body: int = 1_000_000
    receive: float = 30
    queue: int = 256
    answer: float = 600

    def check_queue(self, waiting: int, prompts: int, choices: int) -> None:
        """Raises a 400 if `prompts` × `choices` exceed the queue, and a 429 if they do with the `waiting` ones."""
        from moonwhale.serve.errors import APIError  # `serve --help` needs the defaults above, without FastAPI

        new = prompts * choices
        if new > self.queue:
            message = (
                f"{prompts} prompts with n = {choices} are {new} answers, and {self.queue} may wait: ask for fewer"
            )
            raise APIError(400, message, param="prompt" if prompts > choices else "n")
        if waiting + new > self.queue:
            raise APIError(429, f"{self.queue} prompts wait already: try again soon", headers={"retry-after": "1"})
