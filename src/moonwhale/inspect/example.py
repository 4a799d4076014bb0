"""The conversation that `moonwhale xray` looks into if it is given no prompt."""

from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.inspect.settings import MAX_TOKENS

BLOCKS = 4  # so many that MoBA leaves some of them out
TURNS = (
    ("Hi! How are you today?", "I'm good, thanks! How are you?"),
    ("I'm good too. Where are you from?", "I'm from a small town by the mountains. What about you?"),
    ("I grew up near the ocean, but I live in the city now.", "Do you like living in the city?"),
    ("Most of the time. There is always something to do.", "That's true. What do you do there?"),
    ("I'm a student. I study history.", "That sounds interesting. What is your favorite class?"),
    ("A class about old ships and the people who sailed them.", "I would love to take that class!"),
    ("You should! What do you study?", "I study biology, but I like to cook, too."),
    ("What do you like to cook?", "Soup, mostly, and bread when I have time. Do you cook?"),
    ("Not really. My roommate makes dinner for both of us.", "That's very kind. What do you eat most often?"),
    ("Pasta with a lot of vegetables. It is really good.", "Now I'm hungry! Do you have any pets?"),
    ("No, but my parents have two cats.", "Cats are great. I have a dog. His name is Max."),
    ("That's a good name. I miss the cats.", "I'm sure that they miss you, too."),
    ("What do you like to do on weekends?", "I like to go for a walk with my dog and read a good book."),
    ("Nice, what kind of books do you read?", "Mostly stories about the sea. Do you like the sea?"),
    ("Yes, I love it. I went to the beach last summer.", "That sounds like fun. Did you go swimming?"),
    ("We did, and we saw a whale far out in the water.", "Wow, a real whale! I have never seen one."),
)
QUESTION = "Do you like whales?"


def example_conversation(engine: Engine, answer_tokens: int) -> list[int]:
    """Returns the ids of a conversation with several MoBA blocks, or as many as TURNS and the answer allow."""
    messages = [{"role": "user", "content": QUESTION}]
    ids = engine.encode(messages)
    room = min(MAX_TOKENS, engine.context) - answer_tokens
    for question, answer in reversed(TURNS):
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
