"""Checks a tokenizer's files before the tokenizers library reads them: sizes, ids, and patterns that would never end.

A pattern with one repetition inside another (as in `(a+)+b`) may take time exponential in the text's length, unless
each text is matched in one way (as by `(\\r?\\n)+`). Two repetitions that can take the same characters (as in `a*a*b`)
take its square, from every start. The patterns of known tokenizers have neither, so both are refused.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from moonwhale.data.deterministic_patterns import is_deterministic
from moonwhale.errors import UserError, one_line, shown
from moonwhale.files import read_json, read_text

TOKENIZER_BYTES = 1 << 26  # the largest known tokenizer.json has 33 MB
TEMPLATE_BYTES = 1 << 17
MOST_IDS = 1 << 22  # the largest known vocabulary has 262,144 tokens
MOST_ADDED = 20_000
JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
LOADED_FROM = ("vocab_file", "tokenizer_object", "gguf_file", "fast_tokenizer_files")  # other files than tokenizer.json
NORMALIZERS = {"Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend"}
LONGEST_PATTERN = 4000
FEW = 32  # repetitions; more count as unbounded
TOKEN = re.compile(
    r"(?P<group>\((?:\?(?:[imsx-]*:|[=!>]|<[=!]))?)|(?P<end>\))|(?P<or>\|)"
    r"|(?P<quantifier>[*+?][?+]?|\{\d*,?\d*\}\??)|(?P<atom>\\[pP]\{\^?\w+\}|\\[^1-9kg]|[^\\\[\](){}*+?|])",
    re.DOTALL,
)


def check_tokenizer_folder(folder: Path) -> None:
    """Raises UserError if a tokenizer's file is no plain file, is too large, is damaged or holds what is refused."""
    for name in JSON_FILES:
        if os.path.lexists(folder / name):
            read_json(folder / name)
    if os.path.lexists(folder / "chat_template.jinja"):
        read_text(folder / "chat_template.jinja", TEMPLATE_BYTES)
    if os.path.lexists(folder / "tokenizer_config.json"):
        values = read_json(folder / "tokenizer_config.json")
        for name in LOADED_FROM:
            if values.get(name) is not None:
                raise UserError(f"{folder / 'tokenizer_config.json'}: leave out {name}: only tokenizer.json is read")
    path = folder / "tokenizer.json"
    check_tokenizer(read_json(path, TOKENIZER_BYTES), str(path))


def check_tokenizer(values: dict, source: str) -> None:
    """Raises UserError if the content of a tokenizer.json, read from `source`, has bad ids or dangerous parts."""
    try:
        _check_ids(values)
        for part in _parts([values.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]):
            _check_part(part)
        for part in _parts(values.get("normalizer")):
            if "type" in part and part["type"] not in NORMALIZERS:
                raise ValueError(f"the normalizer {shown(part['type'])} is not one of {', '.join(sorted(NORMALIZERS))}")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"{source}: {one_line(error)}") from error


def _check_ids(values: dict) -> None:
    vocabulary = (values.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict):
        raise ValueError("its model has no vocabulary of names and ids")
    added = values.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MOST_ADDED:
        raise ValueError(f"its added_tokens are no list of at most {MOST_ADDED:,}")
    tokens = vocabulary | {token["content"]: token["id"] for token in added if isinstance(token, dict)}
    if len(tokens) != len(vocabulary.keys() | {token.get("content") for token in added}) or "" in tokens:
        raise ValueError("an added token has no text")
    for token, id in tokens.items():
        if type(id) is not int or not 0 <= id < MOST_IDS:
            raise ValueError(f"the token {shown(token)} has the id {shown(id)}: ids go from 0 to {MOST_IDS - 1:,}")
    if len(set(tokens.values())) < len(tokens):
        raise ValueError("two tokens have the same id")


def _parts(value: object) -> Iterator[dict]:
    """Yields every mapping inside a value, itself included."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(inner)


def _check_part(part: dict) -> None:
    if "Regex" in part:
        check_pattern(part["Regex"])
    if part.get("type") == "Replace":
        pattern, content = part.get("pattern"), part.get("content")
        room = len(pattern["String"]) if isinstance(pattern, dict) and isinstance(pattern.get("String"), str) else 1
        if not isinstance(content, str) or len(content) > room:
            raise ValueError(f"replacing {shown(pattern)} by {shown(content)} would make texts longer")
    if part.get("type") == "Prepend" and len(part.get("prepend", "")) > FEW:
        raise ValueError("it prepends a long text")


def check_pattern(pattern: object) -> None:
    """Raises ValueError if a regular expression may take more than a time linear in the text from every start."""
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"a pattern is no text of at most {LONGEST_PATTERN:,} characters")
    items = list(_items(pattern))
    backtracking, _, _, end = _alternatives(items, 0, pattern)
    if end < len(items) or backtracking > 1:
        raise _refusal(pattern)


def _refusal(pattern: str) -> ValueError:
    return ValueError(f"the pattern {shown(pattern)} could take very long: moonwhale reads simpler ones")


def _items(pattern: str) -> Iterator[tuple[str, str]]:
    """Splits a pattern into (kind, text). A class in brackets is one atom."""
    at = 0
    while at < len(pattern):
        if pattern[at] == "[":
            start, depth = at, 0
            while at < len(pattern):
                depth += {"[": 1, "]": -1}.get(pattern[at], 0)
                at += 2 if pattern[at] == "\\" else 1
                if depth == 0:
                    break
            if depth:
                raise _refusal(pattern)
            yield "atom", pattern[start:at]
            continue
        found = TOKEN.match(pattern, at)
        if not found:  # references to groups, conditions and the like
            raise _refusal(pattern)
        yield found.lastgroup, found[0]
        at = found.end()


def _alternatives(items: list, at: int, pattern: str) -> tuple[int, int, bool, int]:
    """Reads the alternatives from item `at` to the end of their group.

    Returns:
        how many repetitions are given back when what follows fails; how many more at the alternative's end would be;
        whether the group may match in several ways; the index after it.
    """
    backtracking = pending = most = most_pending = 0
    ambiguous = False
    while at < len(items) and items[at][0] != "end":
        kind, text = items[at]
        at += 1
        if kind == "quantifier":
            raise _refusal(pattern)  # of a quantifier
        if kind == "or":
            most, most_pending = max(most, backtracking), max(most_pending, pending)
            backtracking, pending, ambiguous = 0, 0, True
            continue
        start, inner, inner_pending = at - 1, 0, 0
        inner_ambiguous = False
        if kind == "group":
            inner, inner_pending, inner_ambiguous, at = _alternatives(items, at, pattern)
            if at >= len(items):
                raise _refusal(pattern)
            at += 1
            if text in ("(?=", "(?!", "(?<=", "(?<!", "(?>"):
                inner_pending = 0
        least, most_repeats = 1, 1
        if at < len(items) and items[at][0] == "quantifier":
            least, most_repeats = _bounds(items[at][1])
            at += 1
        varies = least != most_repeats
        long = varies and most_repeats > FEW
        if inner_ambiguous and most_repeats > 1:
            if not is_deterministic(items, start, _bounds):
                raise _refusal(pattern)
            inner, inner_pending, long = 0, 0, long or inner > 0 or inner_pending > 0  # all of it is like one
        ambiguous |= varies or inner_ambiguous
        if least:
            backtracking, pending = backtracking + pending, 0
        backtracking += inner
        pending += inner_pending + long
    return max(most, backtracking), max(most_pending, pending), ambiguous, at


def _bounds(quantifier: str) -> tuple[int, float]:
    """Returns the least and the largest number of repetitions."""
    if quantifier[0] in "*+?":
        return int(quantifier[0] == "+"), 1 if quantifier[0] == "?" else float("inf")
    least, comma, most = quantifier.strip("?{}").partition(",")
    return int(least or 0), float(most or "inf") if comma else int(least or 0)
