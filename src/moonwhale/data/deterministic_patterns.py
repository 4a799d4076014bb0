"""Decides whether a repeated group of a regular expression can match any text in one way only.

Such a group takes time linear in the text, however its repetitions are nested: `(?:\\r?\\n)+` and `(?:[a-z]+-)*` do,
`(a+)+` does not. The test is Glushkov's: number the atoms, list for each which ones may follow, and require that no two
atoms of a list take the same character (Brüggemann-Klein and Wood, 1998). Unlike theirs, an atom that follows by two
paths, such as an inner and an outer loop, counts twice. What is not understood counts as ambiguous.
"""

import itertools
import re
import sys
from functools import lru_cache

import regex

MOST_COPIES = 4  # `{2,4}` is written out
MOST_POSITIONS, MOST_CLASSES = 64, 10  # two classes are compared in a tenth of a second
# One character each, with the same meaning in Python's regex as in the tokenizers library
KNOWN_ATOM = re.compile(r"[^\\\[\]^$]|\\[rntfvsd]|\\[^\w\s]|\\[pP]\{\^?\w+\}|\[.*\]", re.DOTALL)
UNKNOWN_IN_CLASS = re.compile(r"\\[^rntfvsdpP\W]|\[\^.*\\s|\[:", re.DOTALL)


class AmbiguousError(Exception):
    """A text may be matched in several ways, or it is not known."""


def is_deterministic(items: list[tuple[str, str]], at: int, bounds) -> bool:
    """Whether the group that begins at item `at`, with its quantifier, matches any text in one way only.

    Args:
        items: the pattern's parts, (kind, text), where kind is "group", "end", "or", "quantifier" or "atom".
        bounds: function that returns the least and the largest number of repetitions of a quantifier.
    """
    flags = "".join(text[2:-1] for kind, text in items if kind == "group" and text.endswith(":"))
    classes = {text for kind, text in items if kind == "atom" and len(text) > 1}
    if "x" in flags or len(classes) > MOST_CLASSES:  # with x, spaces are no atoms
        return False
    try:
        positions = _Positions(items, bounds)
        _, first, _, _ = positions.read_piece(at)
        for together in (first, *positions.follow):
            for a, b in itertools.combinations((positions.atoms[i] for i in together), 2):
                if a == b or not are_disjoint(a, b, "i" in flags):
                    return False
    except (AmbiguousError, RecursionError):
        return False
    return True


class _Positions:
    """The atoms of an expression, with repetitions written out, and for each which ones may follow it.

    The `read_` methods return whether a part matches the empty text, its first and its last atoms, and the item after
    it.
    """

    def __init__(self, items: list[tuple[str, str]], bounds):
        self.items, self.bounds = items, bounds
        self.atoms: list[str] = []
        self.follow: list[list[int]] = []

    def _link(self, last: list[int], first: list[int]) -> None:
        for position in last:
            self.follow[position] += first

    def read_piece(self, at: int) -> tuple[bool, list[int], list[int], int]:
        """Reads an atom or a group with its quantifier."""
        empty, first, last, end = self._read_unquantified(at)
        if end == len(self.items) or self.items[end][0] != "quantifier":
            return empty, first, last, end
        least, most = self.bounds(self.items[end][1])
        copies = max(least, 1) if most == float("inf") else int(most)
        if empty or not 1 <= copies <= MOST_COPIES:
            raise AmbiguousError  # the empty text could be matched or left out
        latest, exits = first, last if least <= 1 else []
        for number in range(2, copies + 1):
            _, latest, copied_last, _ = self._read_unquantified(at)
            self._link(last, latest)
            last = copied_last
            exits = exits + last if number >= least else exits
        if most == float("inf"):
            self._link(last, latest)
        return least == 0, first, exits, end + 1

    def _read_unquantified(self, at: int) -> tuple[bool, list[int], list[int], int]:
        kind, text = self.items[at]
        if kind == "atom":
            self.atoms.append(text)
            self.follow.append([])
            if len(self.atoms) > MOST_POSITIONS:
                raise AmbiguousError
            return False, [len(self.atoms) - 1], [len(self.atoms) - 1], at + 1
        if kind != "group" or text.startswith(("(?=", "(?!", "(?<", "(?>")):
            raise AmbiguousError
        return self._read_alternatives(at + 1)

    def _read_alternatives(self, at: int) -> tuple[bool, list[int], list[int], int]:
        empty, first, last = 0, [], []
        while True:
            one_empty, one_first, one_last, at = self._read_sequence(at)
            empty, first, last = empty + one_empty, first + one_first, last + one_last
            if empty > 1:
                raise AmbiguousError  # the empty text in two ways
            at += 1
            if self.items[at - 1][0] == "end":
                return bool(empty), first, last, at

    def _read_sequence(self, at: int) -> tuple[bool, list[int], list[int], int]:
        empty, first, last = True, [], []
        while self.items[at][0] not in ("or", "end"):
            piece_empty, piece_first, piece_last, at = self.read_piece(at)
            self._link(last, piece_first)
            first = first + piece_first if empty else first
            last = piece_last + (last if piece_empty else [])
            empty &= piece_empty
        return empty, first, last, at


@lru_cache(1000)
def are_disjoint(a: str, b: str, ignores_case: bool) -> bool:
    """Whether no character is taken by both atoms.

    Raises:
        AmbiguousError: it is not known.
    """
    for atom in (a, b):
        if not KNOWN_ATOM.fullmatch(atom) or (atom[0] == "[" and UNKNOWN_IN_CLASS.search(atom)):
            raise AmbiguousError
    literal = next((atom for atom in (a, b) if len(atom) == 1 and atom != "."), None)
    text = _every_character() if literal is None else literal.lower() + literal.upper()
    flags = regex.V1 | regex.IGNORECASE if ignores_case else regex.V1
    try:
        return not regex.search(f"(?s:(?={a}){b})", text, flags)
    except regex.error as error:
        raise AmbiguousError from error


@lru_cache(1)
def _every_character() -> str:
    return "".join(map(chr, itertools.chain(range(0xD800), range(0xE000, sys.maxunicode + 1))))
