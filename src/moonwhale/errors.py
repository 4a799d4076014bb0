"""The exception for bad input, help with its message, and the check for an optional package."""

import codecs
import importlib.util
import re
import reprlib
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The input is wrong, not the program. The message is one line: what is wrong, where, and what to do.

    The message names an option by its field, in backquotes: "`batch_size`: 0 is impossible: it must be at least 1". The
    command line spells the field as the option. Backquotes enclose no other lower-case identifier.
    """


class NotFiniteError(UserError):
    """A loss, a gradient norm or a weight is not finite."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 3, 6, 12, 120, 120
_SHORT.repr_bytes = lambda value, level: repr(value[: _SHORT.maxother])
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def one_line(message: object) -> str:
    """Return the message of a library's error without line breaks, cut to 300 characters."""
    return " ".join(str(message).split())[:300]


def shown(value: object) -> str:
    """Return a value's repr for a message, shortened: a file's values can be of any size and depth."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return f"{type(value).__name__} too long to print"


def printable(text: str, keep: str = "\n\t") -> str:
    """Escape a text's control characters except those in `keep`, so that a terminal shows but doesn't obey them.

    Halves of surrogate pairs, which stand for bytes that are not UTF-8, are escaped too: no stream could encode them.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


_SPELLED = str.maketrans(
    {"✓": "+", "✗": "-", "…": "...", "–": "-", "—": "-", "−": "-", "·": "*", "×": "x", "±": "+/-", "→": "->"}
    | {"≤": "<=", "≥": ">=", "≈": "~", "‘": "'", "’": "'", "“": '"', "”": '"', "█": "#", "│": "|", "─": "-"}
)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Spell in ASCII what an encoding lacks: λ becomes lambda, é becomes e, ✓ becomes +, and 你 becomes \\u4f60."""
    spelled = []
    for c in error.object[error.start : error.end]:
        letter = re.fullmatch("GREEK (?:SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(c, ""))
        plain = letter[1].lower().replace("lamda", "lambda") if letter else c.translate(_SPELLED)
        bare = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        spelled.append(bare or plain.encode("ascii", "backslashreplace").decode())
    return "".join(spelled), error.end


codecs.register_error("moonwhale.spell", _spell)


class PrintableStream:
    """A text stream in place of another, which it hands every text as `printable` returns it.

    A character that the other's encoding lacks is spelled in ASCII, as in a Windows console with code page 1252.
    """

    def __init__(self, stream, keep: str = "\n\t"):
        self._stream, self._keep = stream, keep
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        whole = printable(text, self._keep)
        self._stream.write(whole.encode(self._encoding, "moonwhale.spell").decode(self._encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` with the known word nearest to `word`, or "" if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def require_package(module: str, extra: str, purpose: str) -> None:
    """Check, without importing it, that the module of an optional package is there.

    extra: the extra of moonwhale that brings the package.
    purpose: what needs it, as the message begins: "`task`".

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f'{purpose} needs the package {module}, which is missing: pip install "moonwhale[{extra}]"')


def with_option_names(message: str) -> str:
    """Replace each field in backquotes by its option: `batch_size` becomes --batch-size."""

    def option(field: re.Match) -> str:
        name, dot, key = field[1].partition(".")
        return f"--{name.rstrip('_').replace('_', '-')}{dot}{key}"  # `from_` avoids Python's keyword

    return re.sub(r"`([a-z][a-z0-9_]*(?:\.[A-Za-z_]\w*)?)`", option, message)
