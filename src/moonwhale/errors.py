"""The one exception that means "the input is at fault, not the program"."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do. The command line prints it bare."""


def one_line(message: object) -> str:
    """What somebody else's error says, without line breaks and at most 300 characters of it."""
    return " ".join(str(message).split())[:300]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word nearest to a mistyped one, or nothing."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
