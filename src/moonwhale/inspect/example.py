"""The conversation that `moonwhale xray` looks into if it is given no prompt."""

from itertools import cycle

from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.inspect.settings import MAX_TOKENS

BLOCKS = 4  # so many that MoBA leaves some of them out
TURNS = (
    ("Hi! How are you today?", "I'm good, thanks! How are you?"),
    ("Great. What do you like to do on weekends?", "I like to go for a walk with my dog and read a good book."),
    ("Nice, what kind of books do you read?", "Mostly stories about the sea. Do you like the sea?"),
    ("Yes, I love it. I went to the beach last summer.", "That sounds like fun. Did you go swimming?"),
    ("We did, and we saw a whale far out in the water.", "Wow, a real whale! I have never seen one."),
)
QUESTION = "Do you like whales?"


def example_conversation(engine: Engine, answer_tokens: int) -> list[int]:
    """Returns the ids of a conversation with several MoBA blocks, or as many as leave room for the answer."""
    messages = [{"role": "user", "content": QUESTION}]
    ids = engine.encode(messages)
    room = min(MAX_TOKENS, engine.context) - answer_tokens
    for question, answer in cycle(reversed(TURNS)):
        if len(ids) > (BLOCKS - 1) * engine.config.moba_block_size:
            break
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *messages]
        try:
            longer = engine.encode(messages)
        except UserError:  # longer than the context
            break
        if len(longer) > room:
            break
        ids = longer
    return ids
