"""Decides whether a regular expression of a tokenizer takes time linear in the text, whatever the text is.

A pattern is read into pieces. Each has a bound on the steps that a match from one place takes, where an unbounded
repetition counts as one step. Two rules keep the whole linear in the text:

- A repetition inside a repetition must match each text in one way only, as `(\\r?\\n)+` does and `(a+)+` does not.
- A repetition is given back when what follows it fails. In `[a-z]*x` that happens from every place of a long word, so
  the time is quadratic. It is harmless if the next alternative then takes the same run whole: `\\s*\\n|\\s+`.

What the reader doesn't know is refused, for the library could read it differently.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from moonwhale.data.deterministic_patterns import is_deterministic
from moonwhale.errors import shown

LONGEST_PATTERN = 4000
FEW = 32  # repetitions; more count as unbounded
MOST_STEPS = 1000  # of all patterns of a tokenizer together; those of known ones take about 100
FEW_STEPS = 64  # where a loop is given back: it may be scanned once for each
# Known tokenizers have these. The time is quadratic in the length of a run of spaces or digits.
KNOWN_QUADRATIC = {r"\s+$", r"\d{1,3}(?=(?:\d{3})*\b)", r"(?=(\d{3})+(?!\d))"}
ESCAPE = r"\\(?:[pP]\{\^?\w+\}|[sSdDwWbBhHrnftvAzZ]|x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|\W)"
TOKEN = re.compile(
    r"(?P<group>\((?:\?(?:[ims-]*:|[=!>]|<[=!]))?)|(?P<end>\))|(?P<or>\|)"
    r"|(?P<quantifier>[*+?][?+]?|\{\d+\}|\{(?:\d+,\d*|,\d+)\}\??)"
    rf"|(?P<atom>{ESCAPE}|[^\\\[\](){{}}*+?|])",
    re.DOTALL,
)
IN_CLASS = re.compile(rf"{ESCAPE}|\[:\^?[a-z]+:\]|\[(?!:|\^?\])\^?|\]|[^\\\[\]]", re.DOTALL)
PLAIN_LETTERS = re.compile(r"[!-~]|\[[0-9A-Za-z'-]+\]")  # without case, other characters may match two at once
EMPTY = re.compile(r"[\^$]|\\[bBAzZ]")  # these take no character
NOT_PLAIN = ""  # stands for a loop over more than an atom


@dataclass
class Piece:
    """A part of a pattern. A loop is an unbounded repetition; it is written as the text of the atom it repeats."""

    ways: int = 1  # to match one text, where loops have one way
    steps: int = 0  # to try all ways
    width: int = 0  # the least number of characters
    varies: bool = False  # whether it may match in several ways
    given_back: list[str] = field(default_factory=list)  # loops that are given back when a later part fails
    kept: list[str] = field(default_factory=list)  # loops that would be if something followed that may fail
    optional: bool = False
    opening: str | None = None  # the atom of a loop that takes at least one, if nothing is required before it

    def then(self, other: "Piece") -> "Piece":
        return Piece(
            self.ways * other.ways,
            self.steps + self.ways * other.steps,
            self.width + other.width,
            self.varies or other.varies,
            self.given_back + other.given_back + ([] if other.optional else self.kept),
            (self.kept if other.optional else []) + other.kept,
            self.optional and other.optional,
            other.opening if self.optional else self.opening,
        )


def check_pattern(pattern: object) -> Piece:
    """Returns what a pattern is made of: its steps and its least width.

    Raises:
        ValueError: its time may be more than linear in the text, or it is not understood.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"a pattern is no text of at most {LONGEST_PATTERN:,} characters")
    if pattern in KNOWN_QUADRATIC:
        return Piece()
    reader = _Reader(pattern)
    alternatives = reader.read_alternatives()
    if reader.at < len(reader.items):
        raise reader.refusal()
    for i, one in enumerate(alternatives):
        if one.given_back and not (one.steps <= FEW_STEPS and _is_taken_whole(one.given_back, alternatives[i + 1 :])):
            raise reader.refusal()
    whole = _any_of(alternatives)
    if whole.steps > MOST_STEPS:
        raise reader.refusal()
    return whole


def _is_taken_whole(given_back: list[str], later: list[Piece]) -> bool:
    """Whether the next alternatives take the run of the only loop that was given back."""
    if given_back == [NOT_PLAIN]:
        return False
    taking = next((one for one in later if one.given_back != given_back), Piece())
    return not taking.given_back and [taking.opening] == given_back


def _any_of(alternatives: list[Piece]) -> Piece:
    if len(alternatives) == 1:
        return alternatives[0]
    return Piece(
        sum(one.ways for one in alternatives),
        sum(one.steps for one in alternatives),
        min(one.width for one in alternatives),
        True,
        [loop for one in alternatives for loop in one.given_back],
        [loop for one in alternatives for loop in one.kept],
    )


class _Reader:
    def __init__(self, pattern: str):
        self.pattern, self.at, self.depth, self.ignores_case = pattern, 0, 0, False
        self.items = list(self._split())

    def refusal(self) -> ValueError:
        return ValueError(f"the pattern {shown(self.pattern)} could take very long: moonwhale reads simpler ones")

    def _split(self) -> Iterator[tuple[str, str]]:
        """Splits the pattern into (kind, text). A class in brackets is one atom."""
        at = 0
        while at < len(self.pattern):
            if self.pattern[at] == "[":
                end = self._end_of_class(at)
                yield "atom", self.pattern[at:end]
                at = end
                continue
            found = TOKEN.match(self.pattern, at)
            if not found:  # references to groups, conditions and the like
                raise self.refusal()
            yield found.lastgroup, found[0]
            at = found.end()

    def _end_of_class(self, at: int) -> int:
        depth = 0
        while found := IN_CLASS.match(self.pattern, at):
            depth += (found[0] in ("[", "[^")) - (found[0] == "]")
            at = found.end()
            if depth == 0:
                return at
        raise self.refusal()

    def _next_is(self, *kinds: str) -> bool:
        return self.at < len(self.items) and self.items[self.at][0] in kinds

    def read_alternatives(self) -> list[Piece]:
        alternatives = [self._read_sequence()]
        while self._next_is("or"):
            self.at += 1
            alternatives.append(self._read_sequence())
        return alternatives

    def _read_sequence(self) -> Piece:
        sequence = Piece(optional=True)
        while self.at < len(self.items) and not self._next_is("or", "end"):
            sequence = sequence.then(self._read_piece())
            if sequence.steps > MOST_STEPS:  # before the numbers become large
                raise self.refusal()
        return sequence

    def _read_piece(self) -> Piece:
        """Reads an atom or a group with its quantifier."""
        start = self.at
        kind, text = self.items[start]
        self.at += 1
        if kind == "quantifier":
            raise self.refusal()  # of a quantifier
        piece = self._read_group(text) if kind == "group" else self._atom(text)
        if not self._next_is("quantifier"):
            return piece
        quantifier = self.items[self.at][1]
        self.at += 1
        least, most = bounds(quantifier)
        if least > most or (piece.varies and most > 1 and not is_deterministic(self.items, start, bounds)):
            raise self.refusal()
        return _repeat(piece, text if kind == "atom" else NOT_PLAIN, quantifier)

    def _atom(self, text: str) -> Piece:
        if self.ignores_case and not PLAIN_LETTERS.fullmatch(text):
            raise self.refusal()
        return Piece(steps=1, width=0 if EMPTY.fullmatch(text) else 1)

    def _read_group(self, opening: str) -> Piece:
        outside, self.ignores_case = self.ignores_case, self.ignores_case or "i" in opening
        self.depth += 1
        if self.depth > FEW:
            raise self.refusal()
        group = _any_of(self.read_alternatives())
        if not self._next_is("end"):
            raise self.refusal()
        self.at, self.depth, self.ignores_case = self.at + 1, self.depth - 1, outside
        given_back, kept = [NOT_PLAIN] * len(group.given_back), [NOT_PLAIN] * len(group.kept)
        if opening == "(?>":
            return Piece(1, group.steps, group.width, group.varies, given_back, kept)
        if opening in ("(?=", "(?!", "(?<=", "(?<!"):  # what a loop looks at is not taken
            return Piece(1, group.steps, 0, False, given_back + kept)
        return Piece(group.ways, group.steps, group.width, group.varies, given_back, kept)


def bounds(quantifier: str) -> tuple[int, float]:
    """Returns the least and the largest number of repetitions."""
    if quantifier[0] in "*+?":
        return int(quantifier[0] == "+"), 1 if quantifier[0] == "?" else float("inf")
    least, comma, most = quantifier.strip("?{}").partition(",")
    return int(least or 0), float(most or "inf") if comma else int(least or 0)


def _repeat(piece: Piece, atom: str, quantifier: str) -> Piece:
    """Repeats a piece that matches each text in one way, or at most once."""
    least, most = bounds(quantifier)
    is_loop, is_plain = most > FEW, atom != NOT_PLAIN and quantifier in ("*", "+")
    given_back, kept = list(piece.given_back), list(piece.kept)
    if least > 1:  # the second time may fail
        given_back, kept = given_back + kept, []
    if is_loop:
        kept.append(atom if is_plain else NOT_PLAIN)
    return Piece(
        ways=1 if is_loop else int(most - least + 1) * piece.ways,
        steps=piece.steps * (1 if is_loop else int(most)),
        width=least * piece.width,
        varies=piece.varies or least != most,
        given_back=given_back,
        kept=kept,
        optional=least == 0,
        opening=atom if is_plain and least else None,
    )
