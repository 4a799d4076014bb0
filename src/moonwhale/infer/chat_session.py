"""`ChatSession`: a conversation that stays within the model's context."""

from collections.abc import Iterator
from itertools import count, repeat

from moonwhale.errors import UserError
from moonwhale.infer.engine import Completion, Engine
from moonwhale.infer.sampling_options import SamplingOptions


class ChatSession:
    """Turns of the user and the assistant. When they outgrow the context, the oldest turns are dropped.

    `options` are the fields of `SamplingOptions`. `messages` holds the turns that are left, `last` the last answer.
    `forgetful` becomes true when the first turn is dropped, and stays true.
    """

    def __init__(self, engine: Engine, **options):
        self.engine, self.options = engine, options
        seed = options.get("seed")
        self._seeds = repeat(None) if seed is None else count(seed)  # each turn has its own
        self.messages: list[dict] = []
        self.last: Completion | None = None
        self.forgetful = False
        self._answer_room = min(SamplingOptions(**options).max_new_tokens, engine.context // 4)  # tokens kept free

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces. If the caller stops early, the session remembers the answer so far.

        Raises:
            UserError: the text alone is longer than the context. The session stays as it was.
        """
        ids = self._admit({"role": "user", "content": text})
        stream = self.engine.stream(ids, **self.options | {"seed": next(self._seeds)})
        try:
            yield from stream
        finally:
            self.last = stream.completion()
            self.messages.append({"role": "assistant", "content": self.last.text})

    def _admit(self, message: dict) -> list[int]:
        """Add a user's message, dropping the oldest turns until an answer fits too. Return the prompt's ids."""
        messages = [*self.messages, message]
        while True:
            try:
                ids = self.engine.encode(messages)
                if len(messages) == 1 or len(ids) + self._answer_room <= self.engine.context:
                    break
            except UserError:
                if len(messages) == 1:
                    raise
            del messages[:2]
        self.forgetful |= len(messages) <= len(self.messages)
        self.messages = messages
        return ids
