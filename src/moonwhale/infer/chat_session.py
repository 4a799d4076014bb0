"""A conversation that keeps itself within the model's context."""

from collections.abc import Iterator
from itertools import count, repeat

from moonwhale.errors import UserError
from moonwhale.infer.engine import Completion, Engine
from moonwhale.infer.sampling_options import SamplingOptions


class Conversation:
    """Turns of user and assistant. Once they outgrow the context, the oldest are dropped, and `forgetful` becomes true.

    Options are the fields of `SamplingOptions`.
    """

    def __init__(self, engine: Engine, **options):
        self.engine, self.options = engine, options
        seed = options.get("seed")
        self._seeds = repeat(None) if seed is None else count(seed)  # another one for each turn
        self.messages: list[dict] = []
        self.last: Completion | None = None
        self.forgetful = False
        # Tokens that an answer shall find free.
        self._room = min(SamplingOptions(**options).max_new_tokens, engine.context // 4)

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece. One that is left half way is remembered as far as it got.

        Raises:
            UserError: the text alone is longer than the context; the conversation is as if it had not been said.
        """
        self._admit({"role": "user", "content": text})
        stream = self.engine.stream(self.messages, **self.options | {"seed": next(self._seeds)})
        try:
            yield from stream
        finally:
            self.last = stream.completion()
            self.messages.append({"role": "assistant", "content": self.last.text})

    def _admit(self, message: dict) -> None:
        """Adds a user's message, dropping as many of the oldest turns as it takes."""
        messages = [*self.messages, message]
        while len(messages) > 1 and not self._fits(messages):
            del messages[:2]
        self.engine.encode(messages)
        self.forgetful |= len(messages) <= len(self.messages)
        self.messages = messages

    def _fits(self, messages: list[dict]) -> bool:
        try:
            return len(self.engine.encode(messages)) + self._room <= self.engine.context
        except UserError:
            return False
