"""`SamplingOptions`: how to choose tokens, and when to stop. The command line needs it, so it imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass

from moonwhale.errors import UserError
from moonwhale.options import require

INFINITY = float("inf")
MOST_ANSWERS = 10_000_000  # to all questions together: they fit into memory


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to continue a prompt.

    max_new_tokens: the largest number of tokens to generate. The model's context can end an answer earlier.
    temperature: 0 always takes the most likely token (greedy); 1 samples from the model's own distribution.
    top_k, top_p, min_p: sample among the k most likely tokens only (0 means all), among the most likely tokens that
        together reach probability top_p, and among those at least min_p times as likely as the most likely token.
        The default is a mild min_p.
    repetition_penalty: divides the logits of tokens that have occurred, also in the prompt; 1 changes nothing.
    stop: strings that end the answer and are not part of it.
    seed: row i of a batch draws from a generator of its own, seeded with seed + i. None takes a random seed.

    Raises:
        UserError: a value is impossible.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        require(self, "max_new_tokens", self.max_new_tokens >= 1, "give at least 1")
        require(self, "temperature", 0 <= self.temperature < INFINITY, "give 0 (greedy) or more")
        require(self, "top_k", self.top_k >= 0, "give the number of tokens to choose from, or 0 for all")
        require(self, "top_p", 0 < self.top_p <= 1, "give a probability above 0, at most 1 (1 keeps every token)")
        require(self, "min_p", 0 <= self.min_p <= 1, "give a number from 0 (keeps every token) to 1")
        require(self, "repetition_penalty", 0 < self.repetition_penalty < INFINITY, "give a number above 0 (1 is none)")
        require(self, "stop", not isinstance(self.stop, str) and all(self.stop), "give strings that are not empty")
        require(self, "seed", self.seed is None or 0 <= self.seed < 2**63, "give a whole number from 0 to 2^63 - 1")


def require_answers_that_fit(option: str, questions: int, each: int) -> None:
    """Raise a UserError, naming the option for the number of questions, if `each` has so many answers."""
    if questions * each > MOST_ANSWERS:
        raise UserError(
            f"`{option}`: {questions:,} with {each:,} answers each are too many: give fewer, or a smaller `samples` "
            f"(at most {MOST_ANSWERS:,} answers fit into memory)"
        )
