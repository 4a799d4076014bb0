"""`ChatSession`: a conversation that stays within the model's context, and the rule by which it does."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import count, repeat

from moonwhale.errors import UserError
from moonwhale.infer.engine import Completion, Engine
from moonwhale.infer.sampling_options import SamplingOptions


def forget_oldest(engine: Engine, messages: list[dict], max_new_tokens: int) -> tuple[list[dict], list[int]]:
    """Drop as few of the oldest turns as leave room for an answer. Return the messages that stay, and the prompt's ids.

    A turn is a user's message and what follows it. The room is `max_new_tokens`, but at most a quarter of the context.
    The last turn always stays, and so do system messages at the start.

    Raises:
        UserError: the last turn is longer than the context, or as `Engine.encode`.
    """
    room = min(max_new_tokens, engine.context // 4)
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
    turns = [i for i, message in enumerate(messages) if i > start and message["role"] == "user"]
    starts = [start, *turns]  # the oldest message that may stay

    def fits(i: int) -> bool:
        try:
            return len(engine.encode(messages[:start] + messages[i:])) + room <= engine.context
        except UserError:
            return False

    oldest = starts[bisect_left(starts, True, hi=len(starts) - 1, key=fits)]
    kept = messages[:start] + messages[oldest:]
    return kept, engine.encode(kept)


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
        self._max_new_tokens = SamplingOptions(**options).max_new_tokens

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces. If the caller stops early, the session remembers the answer so far.

        Raises:
            UserError: the text alone is longer than the context, or there is no memory for it. The session stays as it
                was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        kept, ids = forget_oldest(self.engine, messages, self._max_new_tokens)
        stream = self.engine.stream(ids, **self.options | {"seed": next(self._seeds)})
        self.forgetful |= len(kept) < len(messages)
        self.messages = kept
        try:
            yield from stream
        finally:
            self.last = stream.completion()
            self.messages.append({"role": "assistant", "content": self.last.text})

    def undo(self) -> str | None:
        """Take the last turn back, and return the user's text. Return None if there is no turn."""
        if not self.messages:
            return None
        question, _ = self.messages[-2:]
        del self.messages[-2:]
        return question["content"]
