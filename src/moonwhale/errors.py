"""The one exception that means "the input is at fault, not the program"."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do.

    The message names an option by its field, in backquotes: "`batch_size`: 0 is impossible: it must be at least 1".
    """


def one_line(message: object) -> str:
    """What somebody else's error says, without line breaks and at most 300 characters of it."""
    return " ".join(str(message).split())[:300]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word nearest to a mistyped one, or nothing."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def with_option_names(message: str) -> str:
    """Spells each field in backquotes as the command line does: `batch_size` becomes --batch-size."""

    def option(field: re.Match) -> str:
        name, dot, key = field[1].partition(".")
        return f"--{name.replace('_', '-')}{dot}{key}"

    return re.sub(r"`([a-z][a-z0-9_]*(?:\.[A-Za-z_]\w*)?)`", option, message)
