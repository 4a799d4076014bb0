"""The exception for bad input, and help with its message."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The input is wrong, not the program. The message is one line: what is wrong, where, and what to do.

    The message names an option by its field, in backquotes: "`batch_size`: 0 is impossible: it must be at least 1". The
    command line spells the field as the option. Backquotes enclose no other lower-case identifier.
    """


def one_line(message: object) -> str:
    """Return the message of a library's error without line breaks, cut to 300 characters."""
    return " ".join(str(message).split())[:300]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` with the known word nearest to `word`, or "" if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def with_option_names(message: str) -> str:
    """Replace each field in backquotes by its option: `batch_size` becomes --batch-size."""

    def option(field: re.Match) -> str:
        name, dot, key = field[1].partition(".")
        return f"--{name.replace('_', '-')}{dot}{key}"

    return re.sub(r"`([a-z][a-z0-9_]*(?:\.[A-Za-z_]\w*)?)`", option, message)
