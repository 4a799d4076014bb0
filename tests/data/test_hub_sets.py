"""Tests the named hub datasets on files with their schemas, mixtures, and unreadable rows."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moonwhale.data import source
from moonwhale.data.commands import main_data
from moonwhale.data.hub_sets import HUB_SETS
from moonwhale.data.loading import load_source
from moonwhale.data.mixture import mix, parse_mixture
from moonwhale.data.packing import build_data
from moonwhale.data.source import Source
from moonwhale.errors import UserError

STRING = pa.string()
FLAGS = ["harassment", "hate", "self-harm", "sexual", "violence"]
SCHEMAS = {
    "wikimedia/wikipedia": pa.schema([("id", STRING), ("url", STRING), ("title", STRING), ("text", STRING)]),
    "HuggingFaceFW/fineweb-edu": pa.schema(
        [("text", STRING), ("id", STRING), ("dump", STRING), ("score", pa.float64()), ("token_count", pa.int64())]
    ),
    "roneneldan/TinyStories": pa.schema([("text", STRING)]),
    "Open-Orca/OpenOrca": pa.schema([(name, STRING) for name in ("id", "system_prompt", "question", "response")]),
    "BAAI/Infinity-Instruct": pa.schema(
        [
            ("id", pa.int64()),
            ("conversations", pa.list_(pa.struct([("from", STRING), ("value", STRING)]))),
            ("label", pa.struct([("ability_en", pa.list_(STRING))])),
            ("langdetect", STRING),
            ("source", STRING),
        ]
    ),
    "lmsys/lmsys-chat-1m": pa.schema(
        [
            ("conversation_id", STRING),
            ("model", STRING),
            ("conversation", pa.list_(pa.struct([("content", STRING), ("role", STRING)]))),
            ("turn", pa.int64()),
            ("language", STRING),
            (
                "openai_moderation",
                pa.list_(
                    pa.struct(
                        [
                            ("categories", pa.struct([(flag, pa.bool_()) for flag in FLAGS])),
                            ("category_scores", pa.struct([(flag, pa.float64()) for flag in FLAGS])),
                            ("flagged", pa.bool_()),
                        ]
                    )
                ),
            ),
            ("redacted", pa.bool_()),
        ]
    ),
    "some/set": pa.schema([("text", STRING), ("title", STRING)]),
}


@pytest.fixture(autouse=True)
def reset_warnings():
    source.warn_once.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(id, rows, configuration)` makes a dataset loadable from a folder of Parquet files instead of the hub."""
    import datasets

    folders = {}
    load = datasets.load_dataset_builder

    def builder(id, configuration):
        return load(str(folders[id]), configuration, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)

    def hub(id, rows, configuration="default", split="train"):
        folder = folders.setdefault(id, tmp_path / "hub" / id)
        file = folder / configuration / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        filled = [dict.fromkeys(SCHEMAS[id].names) | row for row in rows]
        pq.write_table(pa.Table.from_pylist(filled, SCHEMAS[id]), file)
        known = sorted(path.name for path in folder.iterdir() if path.is_dir())
        card = "".join(f"- config_name: '{name}'\n  data_dir: '{name}'\n" for name in known)
        (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")

    return hub


def fails(match, *args, **options):
    with pytest.raises(UserError, match=match) as caught:
        list(load_source(*args, **options))
    assert "\n" not in str(caught.value)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# ---- the named sets


def test_text_sets(hub, caplog):
    hub("roneneldan/TinyStories", [{"text": "Once."}, {"text": ""}, {"text": "Twice."}])
    hub("HuggingFaceFW/fineweb-edu", [{"text": "edu", "score": 3.1, "id": "u"}], "sample-10BT")
    hub("HuggingFaceFW/fineweb-edu", [{"text": "other"}], "CC-MAIN-2024-10")
    hub("wikimedia/wikipedia", [{"title": "Whale", "text": "A whale."}, {"title": "", "text": "x"}], "20231101.en")
    hub("wikimedia/wikipedia", [{"title": "Wal", "text": "Ein Wal."}, {"title": "Leer", "text": ""}], "20231101.de")
    assert list(load_source("tinystories")) == ["Once.", "Twice."]
    assert list(load_source("fineweb-edu")) == ["edu"]
    assert list(load_source("fineweb-edu:CC-MAIN-2024-10")) == ["other"]
    assert list(load_source("wikicorpus")) == ["Whale\n\nA whale.", "x"]
    assert list(load_source("wikicorpus:20231101.de")) == ["Wal\n\nEin Wal."]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("moonwhale")]
    assert lines[0] == "`data` tinystories: roneneldan/TinyStories, licence CDLA-Sharing 1.0"
    assert lines[3].startswith(
        "`data` wikicorpus: wikimedia/wikipedia 20231101.en, licence CC BY-SA 3.0 and GFDL (wiki"
    )
    assert "no longer works" in lines[3] and len(lines) == 5 and not any("\n" in line for line in lines)


def test_openorca(hub):
    rows = [
        {"id": "flan.1", "system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
        {"id": "flan.2", "system_prompt": "", "question": "How?", "response": "So."},
        {"id": "flan.3", "system_prompt": None, "question": "Who?", "response": "You."},
    ]
    hub("Open-Orca/OpenOrca", rows)
    assert list(load_source("openorca")) == [
        [{"role": "system", "content": "Be brief."}, *turns("Why?", "Because.")],
        turns("How?", "So."),
        turns("Who?", "You."),
    ]


def said(*pairs):
    return {"conversations": [{"from": who, "value": what} for who, what in pairs]}


def test_infinity_instruct(hub):
    rows = [
        said(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")) | {"langdetect": "en"},
        said(("system", "s"), ("human", "a"), ("gpt", "b")) | {"label": {"ability_en": ["x"]}},
        said(("system", ""), ("human", "a"), ("gpt", "b")) | {"source": "z", "langdetect": "zh-cn"},
    ]
    hub("BAAI/Infinity-Instruct", rows, "0625")
    hub("BAAI/Infinity-Instruct", rows[:1], "7M_core")
    system = {"role": "system", "content": "s"}
    assert list(load_source("infinity-instruct:0625")) == [
        turns("a", "b", "c", "d"),
        [system, *turns("a", "b")],
        turns("a", "b"),
    ]
    assert list(load_source("infinity-instruct:7M_core")) == [turns("a", "b", "c", "d")]
    fails("infinity-instruct needs a configuration: infinity-instruct:NAME, .* 3M, 7M, 0625", "infinity-instruct")
    fails("there is no configuration 0652 .did you mean 0625..; give infinity-instruct:NAME with one of 0625, 7M_core",
          "infinity-instruct:0652")  # fmt: skip
    fails("a configuration is missing; give BAAI/Infinity-Instruct:NAME .* 0625, 7M_core", "BAAI/Infinity-Instruct")


def spoken(language, *contents, flagged=(), redacted=False):
    return {
        "conversation": turns(*contents),
        "language": language,
        "redacted": redacted,
        "openai_moderation": [
            {
                "categories": dict.fromkeys(FLAGS, i in flagged),
                "category_scores": dict.fromkeys(FLAGS, 0.5),
                "flagged": i in flagged,
            }
            for i in range(len(contents))
        ],
    }


def test_lmsys_chat_keeps_harmless_conversations_of_one_language(hub, caplog):
    rows = [
        spoken("English", "a", "b"),
        spoken("Portuguese", "c", "d"),
        spoken("English", "e", "f", flagged=[1]),
        spoken("English", "g", "h", redacted=True),
        spoken(None, "i", "j"),
        spoken("English", "k", "l", redacted=None),
        spoken("English", "m", "n"),
    ]
    hub("lmsys/lmsys-chat-1m", rows)
    assert list(load_source("lmsys-chat-1m")) == [turns("a", "b"), turns("m", "n")]
    assert "lmsys-chat-1m keeps what is in English, not flagged by the moderation, and not redacted: 5 of 7" in (
        caplog.text
    )
    assert "skipped" not in caplog.text, "filtered rows are not bad ones"
    assert list(load_source("lmsys-chat-1m:portuguese")) == [turns("c", "d")]
    fails(
        "no text in lmsys-chat-1m:Klingon: it keeps only what is in Klingon, .*, and no row is that",
        "lmsys-chat-1m:Klingon",
    )
    prints = {load_source(spec).fingerprint for spec in ("lmsys-chat-1m", "lmsys-chat-1m:German")}
    assert len(prints) == 2


BAD = {
    "tinystories": ({"text": "x"}, [({"text": None}, "no text")]),
    "wikicorpus": ({"text": "x", "title": "y"}, [({"title": "only"}, "no text")]),
    "openorca": (
        {"system_prompt": "", "question": "q", "response": "r"},
        [
            ({"system_prompt": "s", "question": None, "response": "r"}, "a message without text"),
            ({"system_prompt": "s", "question": "q", "response": " "}, "a blank message"),
        ],
    ),
    "infinity-instruct:3M": (
        said(("human", "a"), ("gpt", "b")),
        [
            (said(("tool", "a"), ("gpt", "b")), "a role other than"),
            (said(("gpt", "a"), ("human", "b")), "not in turn"),
            (said(("human", "a"), ("human", "b")), "not in turn"),
            (said(("human", "a"), ("system", "b")), "not in turn"),
            (said(("system", "a")), "not in turn"),
            (said((None, "a")), "a role other than"),
            (said(("human", None)), "a message without text"),
            (said(), "no conversation"),
            ({"conversations": None}, "no conversation"),
            ({"conversations": [None]}, "a role other than"),
        ],
    ),
    "lmsys-chat-1m": (
        spoken("English", "a", "b"),
        [
            (spoken("English"), "no moderation"),
            (spoken("English", "a") | {"openai_moderation": None}, "no moderation"),
            (spoken("English", "a") | {"openai_moderation": [{"flagged": None}]}, "no moderation"),
            (spoken("English", "a") | {"conversation": None}, "no conversation"),
            (spoken("English", "a") | {"conversation": turns("a", "b")[1:]}, "not in turn"),
        ],
    ),
}


@pytest.mark.parametrize("limit", [None, 999])
@pytest.mark.parametrize("spec", BAD)
def test_bad_rows_are_skipped_with_reasons(hub, caplog, spec, limit):
    good, bad = BAD[spec]
    name, _, choice = spec.partition(":")
    rows = [good] * (19 * len(bad)) + [row for row, _ in bad]
    hub(HUB_SETS[name].id, rows, choice or (HUB_SETS[name].default if not HUB_SETS[name].keeps else None) or "default")
    assert len(list(load_source(spec, limit=limit))) == 19 * len(bad)
    (line,) = [line for line in caplog.text.splitlines() if "skipped" in line]
    assert f"skipped {len(bad)} of {20 * len(bad)} rows of {spec}: " in line
    for reason, n in Counter(reason for _, reason in bad).items():
        first = 19 * len(bad) + [why for _, why in bad].index(reason) + 1
        assert re.search(rf"{n} with [^;]*{reason}[^;]* \(row {first} of {spec}: ", line), (reason, line)


def test_too_many_bad_rows_raise_an_error_with_the_commonest_reason(hub):
    good, bad = said(("human", "a"), ("gpt", "b")), [said(("human", "a"), ("human", "b")), said(("tool", "a"))]
    hub("BAAI/Infinity-Instruct", [good] * 8 + [bad[1], bad[0], bad[0]], "3M")
    fails(
        "3 of 11 rows of infinity-instruct:3M .27.3%. cannot be read, mostly those with user and assistant not in turn "
        r".row 10 of infinity-instruct:3M: user, user.: fix .*up to 5% bad rows are skipped",
        "infinity-instruct:3M",
    )


def test_a_long_bad_table_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(source, "EARLY_FAILURE_ROWS", 100)
    read = []

    def rows(bad):
        for i in range(1000):
            read.append(i)
            yield source.SkippedRow("no text") if bad(i) else "text"

    with pytest.raises(UserError, match="6 of 100 rows"):
        list(Source("s", "s", lambda: rows(lambda i: i >= 94)))
    assert len(read) == 100
    assert len(list(Source("s", "s", lambda: rows(lambda i: i % 20 == 19)))) == 950


def test_bad_rows_of_a_users_own_table_are_skipped_too(tmp_path, caplog):
    spoilt = [
        {"messages": None},
        {"messages": "text in one row only"},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"from": "gpt", "value": "first"}]},
        {},
    ]
    rows = [{"messages": [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}]}] * 120 + spoilt
    path = jsonl(tmp_path / "a.jsonl", rows)
    got = list(load_source(path))
    assert got == [turns("a", "b")] * 120 + ["text in one row only"]
    assert f"skipped 4 of 125 rows of {path}: 2 with no text (row 121" in caplog.text
    assert "1 with a message without text (row 123" in caplog.text and "1 with user and assist" in caplog.text
    numbers = jsonl(tmp_path / "b.jsonl", [{"text": "x"}] * 20 + [{"text": 5}])
    assert len(list(load_source(numbers))) == 20
    assert "1 with a text that is neither text nor a list of messages (row 21" in caplog.text
    part = jsonl(tmp_path / "c.jsonl", [{"a": "x", "b": "y"}, {"a": None, "b": "z"}])
    assert list(load_source(part, columns=["a", "b"])) == ["x\n\ny", "z"], "one column is enough"


def test_a_table_in_both_formats_gives_every_message_all_fields(tmp_path):
    old = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    table = pa.table({"conversations": [turns("a", "b"), old]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert set(pq.read_table(tmp_path / "a.parquet")["conversations"][0][0].as_py()) == {*old[0], "role", "content"}
    assert list(load_source(str(tmp_path / "a.parquet"))) == [turns("a", "b")] * 2


# ---- loading from the hub


def test_any_hub_set(hub, tmp_path):
    hub("some/set", [{"text": f"{i}", "title": f"T{i}"} for i in range(10)])
    hub("some/set", [{"text": "v"}], split="validation")
    assert list(load_source("some/set:default")) == [f"{i}" for i in range(10)]
    assert list(load_source("some/set", "train[:30%]", ["title", "text"])) == ["T0\n\n0", "T1\n\n1", "T2\n\n2"]
    assert list(load_source("some/set", "validation")) == ["v"]
    assert load_source("some/set").n_documents == 10
    fails("no column nope; it has text, title", "some/set", columns=["text", "nope"])
    fails("no column nope; it has text, title", "some/set", columns=["text", "nope"], limit=3)
    fails("`data_split`: some/set: Unknown split .test", "some/set", split="test")
    fails("`data_split`: some/set: Bad split: test", "some/set", split="test", limit=3)
    fails("a slice needs the whole set", "some/set", split="train[:1%]", limit=3)
    fails("there is no configuration wrong; give some/set:NAME with one of default", "some/set:wrong")


def test_the_number_of_documents_can_be_limited(hub, tmp_path):
    hub("some/set", [{"text": f"{i}" if i % 2 else ""} for i in range(10)])
    source = load_source("some/set", limit=3)
    assert list(source) == list(source) == ["1", "3", "5"] and source.n_documents == 3
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.arrow")), "streamed"
    assert len({load_source("some/set", limit=limit).fingerprint for limit in (None, 3, 4)}) == 3
    lines = jsonl(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(5)])
    assert list(load_source(lines, limit=2)) == ["0", "1"]
    assert len({load_source(lines, limit=limit).fingerprint for limit in (None, 3, 4)}) == 3
    assert len(list(load_source("chitchat", limit=7))) == 7
    fails("`data_documents` 0: read at least 1", "chitchat", limit=0)


@pytest.mark.parametrize(
    ("spec", "error", "line"),
    [
        ("a/b", "Dataset 'a/b' is a gated dataset on the Hub.\nYou must be", "a/b is gated: ask for .*/a/b.* HF_TOKEN"),
        ("lmsys-chat-1m", "Dataset 'x' doesn't exist on the Hub or", "gated: .*/lmsys/lmsys-chat-1m, .*HF_TOKEN"),
        ("a/b", "Dataset 'a/b' doesn't exist on the Hub or cannot be", "no such file, folder or hub data set: a/b"),
        ("a/b", "Dataset scripts are no longer supported, but found b.py", "loading script.*copy of it in Parquet"),
        ("gboleda/wikicorpus:raw_en", "Dataset scripts are no longer supported, but found w.py", "use wikicorpus"),
        ("tinystories", "Couldn't reach 'x' on the Hub (ConnectError)", "not in the cache, .*connect once, or copy"),
        ("a/b", "Something\nelse", "a/b is no file or folder here, .* the hub: Something else"),
        (
            "a/b:q",
            "Couldn't find cache for a/b for config 'q'\nAvailable configs in the cache: ['p']",
            "no .* q; .* p .in the",
        ),
    ],
)
def test_hub_failures_are_one_line_each(monkeypatch, spec, error, line):
    import datasets

    def load_dataset_builder(id, configuration):
        raise RuntimeError(error)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    fails(line, spec)


@pytest.mark.parametrize("limit", [None, 3])
def test_a_damaged_file(hub, tmp_path, limit):
    hub("some/set", [{"text": "x"}])
    (file,) = (tmp_path / "hub").rglob("*.parquet")
    file.write_bytes(b"PAR1 and then nothing of the kind")
    fails("some/set .*[Pp]arquet magic bytes", "some/set", limit=limit)


def test_a_connection_that_breaks(hub, monkeypatch):
    import datasets

    hub("some/set", [{"text": f"{i}"} for i in range(10)])

    def broken(self):
        yield {"text": "0"}
        raise ConnectionError("the line\nis dead")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    fails("reading some/set was interrupted, try again: the line is dead", "some/set", limit=5)


def test_offline(tmp_path):
    """Offline mode is tested in its own process, because the library reads HF_HUB_OFFLINE at import."""
    code = "from moonwhale.data.loading import load_source\nload_source('tinystories')"
    places = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | places)
    line = done.stderr.splitlines()[-1]
    assert "UserError: `data`: tinystories is not in the cache, and the hub (roneneldan/TinyStories) cannot be" in line


# ---- names and mixtures


def test_misspelled_names_get_a_suggestion():
    fails("no such file or folder: tinystory .did you mean tinystories..*lmsys-chat-1m", "tinystory")
    fails("did you mean lmsys-chat-1m", "lmsys-chat1m:German")
    fails("did you mean python", "phyton")
    fails(
        "`data_columns` a: openorca has fixed columns here .use its name on the hub, Open-Orca/OpenOrca",
        "openorca",
        columns=["a"],
    )


def counted(name, n):
    return Source(name, name, lambda: iter([f"{name}{i}" for i in range(n)]))


def test_a_mixture_follows_the_weights_at_every_point():
    source = mix("m", [counted("a", 700), counted("b", 999), counted("c", 999)], [0.7, 0.2, 0.1])
    mixed = list(source)
    assert mixed == list(source) and len(set(mixed)) == len(mixed) and mixed[0] == "a0"
    for name, weight in {"a": 0.7, "b": 0.2, "c": 0.1}.items():
        given = [i for i, document in enumerate(mixed) if document.startswith(name)]
        assert [mixed[i] for i in given] == [f"{name}{i}" for i in range(len(given))], "in its own order"
        for n in range(len(mixed)):
            assert abs(sum(i < n for i in given[: n + 1]) - weight * n) <= 1.5
    assert 995 <= len(mixed) <= 1005, "it ends with a: its 700 documents are 70 %"


def test_a_mixture_ends_with_its_first_exhausted_part_and_reports_it(caplog):
    order = " ".join(mix("m", [counted("a", 2), counted("b", 9)], [1, 3]))
    assert order == "b0 a0 b1 b2 b3 a1 b4 b5 b6"
    assert "the mixture ends with a, its first source to end, after 2 of a, 7 of b" in caplog.text
    assert list(islice(mix("m", [counted("a", 2), counted("b", 9)], [1, 3], limit=3), 9)) == ["b0", "a0", "b1"]
    prints = {mix("m", [counted("a", 2), counted("b", 9)], [1, 3], limit).fingerprint for limit in (None, 3, 4)}
    assert len(prints) == 3
    with pytest.raises(UserError, match="no text in a"):
        list(mix("m", [counted("b", 9), counted("a", 0)], [1, 1]))


def test_mixture_of_files_and_hub_sets(hub, tmp_path, caplog):
    hub("roneneldan/TinyStories", [{"text": f"story {i}"} for i in range(40)])
    hub("Open-Orca/OpenOrca", [{"system_prompt": "", "question": f"q{i}", "response": "r"} for i in range(40)])
    own = jsonl(tmp_path / "own=mine.jsonl", [{"body": f"own {i}"} for i in range(40)] + [{"body": None}])
    spec = f"tinystories=2, openorca=1,{own}=1"
    mixed = list(load_source(spec, columns=["body"], limit=40))
    kinds = Counter("chat" if isinstance(document, list) else document.split()[0] for document in mixed)
    assert kinds == {"story": 20, "chat": 10, "own": 10}
    with pytest.raises(UserError, match="no column of messages or text; it has body"):
        list(load_source(spec))
    prints = {
        load_source(*args, **options).fingerprint
        for args, options in [
            ((spec,), {}),
            ((spec,), {"limit": 9}),
            ((spec.replace("=2", "=3"),), {}),
            ((spec, "train[:50%]"), {}),
        ]
    }
    before = load_source(spec).fingerprint
    jsonl(Path(own), [{"body": "changed"}])
    assert len(prints) == 4 and load_source(spec).fingerprint not in prints and before in prints


def test_bad_rows_of_a_part_count_even_if_the_mixture_ends_early():
    def rows(bad):
        yield from [source.SkippedRow("no text", "row 1")] * bad
        yield from "x" * 99

    def mixed(bad):
        return mix("m", [counted("a", 50), Source("b", "b", lambda: rows(bad))], [1, 1])

    assert len(list(mixed(2))) == 100
    with pytest.raises(UserError, match=r"9 of 5. rows of b .1...%. cannot be read"):
        list(mixed(9))


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("tinystories=-1,openorca=1", "the weight of tinystories is '-1', which is not a number above 0"),
        ("tinystories=0,openorca=1", "the weight of tinystories is '0'"),
        ("tinystories=1,openorca=much", "the weight of openorca is 'much'"),
        ("tinystories=nan,openorca=1", "the weight of tinystories is 'nan'"),
        ("tinystories=inf,openorca=1", "the weight of tinystories is 'inf'"),
        ("tinystories=1,openorca=", "the weight of openorca is ''"),
        ("tinystories=1,openorca", "'openorca' in tinystories=1,openorca is not of the form NAME=WEIGHT"),
        ("tinystories,openorca", "'tinystories' in .* is not of the form NAME=WEIGHT"),
        ("tinystories=1,", "'nothing' in .* is not of the form NAME=WEIGHT"),
        ("=1,openorca=1", "'=1' in .* is not of the form NAME=WEIGHT"),
        ("tinystories=1", "tinystories=1 mixes only one source: leave out the weight, or add another source"),
        ("openorca=1,openorca=2", "openorca is named twice"),
        ("tinystories=1,nothere=1", "no such file or folder: nothere"),
        ("tinystories=1,infinity-instruct=1", "infinity-instruct needs a configuration"),
        ("chitchat=1,python=1", "`data_split`"),
    ],
)
def test_bad_mixtures_are_one_line_each(hub, spec, line):
    hub("roneneldan/TinyStories", [{"text": "x"}])
    hub("Open-Orca/OpenOrca", [{"question": "x", "response": "y"}])
    fails(line, spec, "train" if "split" in line else None)


def test_which_names_are_mixtures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=0.5,b=1").mkdir()
    (tmp_path / "a=0.5,b=1" / "x.txt").write_text("inside")
    for spec in ("a=0.5,b=1", "lang=en/*.parquet", "a,b/*.txt", "some/set:config", "notes.txt"):
        assert parse_mixture(spec) == {}
    assert list(load_source("a=0.5,b=1")) == ["inside"]
    assert parse_mixture("lang=en/*.txt=1e-1, b = .5") == {"lang=en/*.txt": 0.1, "b": 0.5}


def test_a_mixture_in_yaml(tmp_path):
    from moonwhale.train.config import TrainConfig

    (tmp_path / "run.yaml").write_text("data: tinystories=0.7,openorca=0.3\ndata_documents: 90\n")
    config = TrainConfig.resolve({}, str(tmp_path / "run.yaml"))
    assert parse_mixture(config.data) == {"tinystories": 0.7, "openorca": 0.3} and config.data_documents == 90


def test_a_mixture_is_tokenized_and_cached_like_any_source(hub, tmp_path, capsys, caplog):
    hub("roneneldan/TinyStories", [{"text": f"The whale sang {i} songs."} for i in range(60)])
    hub("Open-Orca/OpenOrca", [{"question": f"q{i}", "response": "r"} for i in range(59)] + [{"response": "r"}])
    sizes = ["--data-documents", "50", "--vocab-size", "300", "--context", "32", "--cache", str(tmp_path / "built")]
    main_data(["--data", "tinystories=0.5,openorca=0.5", *sizes])
    assert "tinystories=0.5,openorca=0.5" in capsys.readouterr().out
    source = load_source("tinystories=1,openorca=1")
    data = build_data(source, vocab_size=300, context=32, cache_dir=tmp_path / "built")
    assert data.train.n_documents + data.held_out.n_documents == 119
    assert caplog.text.count("skipped 1 of 60 rows of openorca") == 1, "both passes count it; it is said once"


# ---- documentation


def test_the_documentation_lists_every_set_correctly():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, known in HUB_SETS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        for word in (known.id, *known.columns, known.licence, known.default or "", *known.choices.split(", ")):
            assert word in line, (name, word)
        assert ("yes" in line.split("|")[-2]) == known.gated, name
