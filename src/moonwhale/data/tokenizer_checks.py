"""Checks a tokenizer's files before the tokenizers library reads them: what they are made of, and how much of it.

Only parts on short lists are read, for the library has others that grow the text with every application, panic, or take
time without a bound. Most kinds may occur once. A tokenizer that is not made of our trainer's parts is then tried in a
process of its own: see tokenizer_trial.py.
"""

import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from moonwhale.data.tokenizer_patterns import MOST_STEPS, check_pattern
from moonwhale.data.tokenizer_trial import try_tokenizer
from moonwhale.errors import UserError, one_line, shown
from moonwhale.files import read_json, read_text

TOKENIZER_BYTES = 1 << 26  # the largest known tokenizer.json has 33 MB
MOST_VALUES = 1 << 21  # of JSON; 262,144 tokens with their merges have 1.6 million
OTHER_BYTES = 1 << 21
TEMPLATE_BYTES = 1 << 17
MOST_TEMPLATES = 16  # in addition to the default one
MOST_IDS = 1 << 22  # the largest known vocabulary has 262,144 tokens
MOST_ADDED = 20_000
MOST_ADDED_CHARACTERS = 1 << 18  # the library and every chat build automata of them; DeepSeek-V3's have 18,540
LONGEST_TOKEN = 1000
JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
LOADED_FROM = ("vocab_file", "tokenizer_object", "gguf_file", "fast_tokenizer_files")  # other files than tokenizer.json
MOST_PARTS = 16  # of a kind; DeepSeek-V3 has four
LONGEST_ADDITION = 32  # characters that are prepended, or ids that are added to a text
FORMS = {"NFC", "NFD", "NFKC", "NFKD"}  # together once: NFKD makes up to 18 characters of one
REPEATABLE = {"Sequence", "Replace", "Split"}
KNOWN = {
    "normalizer": FORMS | {"Sequence", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend"},
    "pre_tokenizer": {"Sequence", "Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
    | {"CharDelimiterSplit", "UnicodeScripts"},
    "post_processor": {"Sequence", "ByteLevel", "TemplateProcessing", "RobertaProcessing", "BertProcessing"},
    "decoder": {"Sequence", "ByteLevel", "Fuse", "Replace"},
}
LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
OURS = {"Sequence", "ByteLevel", "Digits", "TemplateProcessing"}  # the kinds of parts that our trainer writes


def check_tokenizer_folder(folder: Path) -> None:
    """Raises UserError if a tokenizer's file is no plain file, is too large, is damaged or holds what is refused."""
    for name in JSON_FILES:
        if os.path.lexists(folder / name):
            _check_added(read_json(folder / name, OTHER_BYTES), folder / name)
    more = list(islice((folder / "additional_chat_templates").glob("*.jinja"), MOST_TEMPLATES + 1))
    if len(more) > MOST_TEMPLATES:
        raise UserError(f"{more[0].parent}: it holds more than {MOST_TEMPLATES} templates: leave some out")
    for path in (folder / "chat_template.jinja", *more):
        if os.path.lexists(path):
            read_text(path, TEMPLATE_BYTES)
    check_tokenizer_file(folder / "tokenizer.json")


def _check_added(values: dict, path: Path) -> None:
    """Checks the tokens that another file than tokenizer.json adds, and that it names no other file."""
    for name in LOADED_FROM:
        if values.get(name) is not None:
            raise UserError(f"{path}: leave out {name}: only tokenizer.json is read")
    of_tokens = {key: value for key, value in values.items() if "token" in key or path.name == "added_tokens.json"}
    lengths = [len(text) for text in _texts(of_tokens)]
    if sum(lengths) > MOST_ADDED_CHARACTERS or max(lengths, default=0) > LONGEST_TOKEN:
        raise UserError(f"{path}: its texts are too long for tokens")


def check_tokenizer_file(path: Path) -> None:
    """Raises UserError if a tokenizer.json is damaged, holds what is refused, or exceeds the limits of the trial."""
    values = read_json(path, TOKENIZER_BYTES, MOST_VALUES)
    check_tokenizer(values, str(path))
    if not _is_like_ours(values):
        try_tokenizer(path)


def check_tokenizer(values: dict, source: str) -> None:
    """Raises UserError if the content of a tokenizer.json, read from `source`, has bad ids or dangerous parts."""
    try:
        tokens = _check_ids(values)
        _check_model(values["model"])
        ids = set(tokens.values())
        if sum(_check_component(kind, values.get(kind), ids) for kind in KNOWN) > MOST_STEPS:
            raise ValueError("its patterns could take very long together")
    except KeyError as error:
        raise UserError(f"{source}: a part lacks its {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{source}: {one_line(error)}") from error


def _is_like_ours(values: dict) -> bool:
    """Whether a tokenizer that passed the checks has only parts that our trainer writes, none of which can take long.

    The kinds of parts decide, not who wrote them. GPT-2's are among them.
    """
    return not any(values.get(name) for name in ("truncation", "padding")) and all(
        part["type"] in OURS for kind in LISTS for part in _parts(kind, values.get(kind))
    )


def _check_ids(values: dict) -> dict[str, int]:
    """Returns the id of each token."""
    vocabulary = (values.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict):
        raise ValueError("its model has no vocabulary of names and ids")
    added = values.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MOST_ADDED:
        raise ValueError(f"its added_tokens are no list of at most {MOST_ADDED:,}")
    tokens = vocabulary | {token["content"]: token["id"] for token in added if isinstance(token, dict)}
    if len(tokens) != len(vocabulary.keys() | {token.get("content") for token in added}) or "" in tokens:
        raise ValueError("an added token has no text")
    if sum(len(token["content"]) for token in added) > MOST_ADDED_CHARACTERS:
        raise ValueError(f"its added tokens have more than {MOST_ADDED_CHARACTERS:,} characters")
    if max(map(len, tokens), default=0) > LONGEST_TOKEN:
        raise ValueError(f"a token has more than {LONGEST_TOKEN:,} characters")
    for token, id in tokens.items():
        if type(id) is not int or not 0 <= id < MOST_IDS:
            raise ValueError(f"the token {shown(token)} has the id {shown(id)}: ids go from 0 to {MOST_IDS - 1:,}")
    if len(set(tokens.values())) < len(tokens):
        raise ValueError("two tokens have the same id")
    return tokens


def _check_model(model: dict) -> None:
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type", "BPE") != "BPE" or odd:
        reason = f"it has the {odd[0]} {shown(model[odd[0]])}" if odd else f"its model is {shown(model['type'])}"
        raise ValueError(f"not a byte-level BPE tokenizer, for {reason} (train one, or use deepseek or gpt2)")


def _parts(kind: str, component: object) -> Iterator[dict]:
    """Yields a normalizer, pre_tokenizer, post_processor or decoder and, if it is a sequence, its parts."""
    if component is None:
        return
    if component["type"] not in KNOWN[kind]:  # the library also guesses the type of a part that names none
        raise ValueError(f"the {kind} {shown(component['type'])} is not one of {', '.join(sorted(KNOWN[kind]))}")
    yield component
    if component["type"] == "Sequence":
        for part in component[LISTS[kind]]:
            yield from _parts(kind, {} if part is None else part)


def _texts(value: object) -> Iterator[str]:
    """Yields every text inside a value of any depth, the names of mappings included."""
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict):
            left += [*inner, *inner.values()]
        elif isinstance(inner, list):
            left += inner


def _check_component(kind: str, component: object, ids: set[int]) -> int:
    """Checks the parts of a normalizer, pre_tokenizer, post_processor or decoder. Returns its patterns' steps."""
    parts = list(_parts(kind, component))
    numbers = Counter("NFKD" if part["type"] in FORMS else part["type"] for part in parts)
    for name, number in numbers.items():
        if number > (MOST_PARTS if name in REPEATABLE else 1):
            raise ValueError(f"its {kind} has {number:,} parts of the kind {name}")
    for part in parts:
        _check_additions(part, ids)
    return sum(_steps_of_pattern(part) for part in parts)


def _steps_of_pattern(part: dict) -> int:
    pattern, steps, width = part.get("pattern"), 0, 0
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        steps = width = len(pattern["String"])
    elif pattern is not None:
        piece = check_pattern(pattern["Regex"])
        steps, width = piece.steps, min(piece.width, 1)
    if part["type"] == "Replace":
        content = part["content"]
        if not isinstance(content, str) or len(content) > width or width == 0:
            raise ValueError(f"replacing {shown(pattern)} by {shown(content)} would make texts longer")
    return steps


def _check_additions(part: dict, ids: set[int]) -> None:
    """Checks what a part adds to a text: a few characters or ids. A post_processor has the text itself once."""
    if part["type"] == "Prepend" and len(part["prepend"]) > LONGEST_ADDITION:
        raise ValueError("it prepends a long text")
    added = [part[name][1] for name in ("sep", "cls") if name in part]
    if part["type"] == "TemplateProcessing":
        for name in ("single", "pair"):
            texts = Counter(piece["Sequence"]["id"] for piece in list(part[name]) if "Sequence" in piece)
            if len(part[name]) > LONGEST_ADDITION or max(texts.values(), default=0) > 1:
                raise ValueError(f"its post_processor repeats a text or adds more than {LONGEST_ADDITION} tokens to it")
        added = [id for token in part["special_tokens"].values() for id in token["ids"]]
    if len(added) > LONGEST_ADDITION or not ids.issuperset(added):
        raise ValueError(f"its post_processor adds the ids {shown(added)}, which are too many or not the vocabulary's")
