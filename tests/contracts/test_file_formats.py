"""Files and folders are read as the tools that wrote them mean them, or refused in one line."""

import bz2
import csv
import gzip
import importlib
import json
import lzma

import pytest

from moonwhale.data.loading import load_source
from moonwhale.data.packing import pack_split
from moonwhale.data.sft_dataset import load_conversations
from moonwhale.errors import UserError

pytestmark = pytest.mark.contract("File formats", "datasets.save_to_disk, hub clones, pandas, csv, json")
Q, A = {"role": "user", "content": "Who sang?"}, {"role": "assistant", "content": "The whale."}


def in_parts(message):
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def read(path, **options):
    return list(load_source(str(path), **options))


def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    importlib.import_module("pyarrow.parquet").write_table(importlib.import_module("pyarrow").table(columns), path)
    return path


# ---- paths


@pytest.mark.parametrize(
    "name",
    ["chat[1].jsonl", "a b.jsonl", "wal*.jsonl", "鯨?.jsonl", "A.JSONL", "x=1,y=2.jsonl", "-.ndjson", "a.Ndjson"],
)
def test_a_path_that_exists_is_that_file(tmp_path, name, monkeypatch):
    for decoy in ("chat1.jsonl", "walx.jsonl", "鯨x.jsonl"):
        lines(tmp_path / decoy, [{"text": "another file"}])
    lines(tmp_path / name, [{"text": "mine"}])
    assert read(tmp_path / name) == ["mine"]
    monkeypatch.chdir(tmp_path)
    assert read(f"./{name}") == ["mine"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(f"~/{name}") == ["mine"]


def test_a_glob_below_a_folder_whose_name_has_brackets(tmp_path):
    lines(tmp_path / "run[1]" / "a.jsonl", [{"text": "mine"}])
    lines(tmp_path / "run1" / "a.jsonl", [{"text": "another"}])
    assert read(tmp_path / "run[1]" / "*.jsonl") == read(f"{tmp_path}/run[1]/") == ["mine"]


def test_links(tmp_path, caplog):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "deep").mkdir(parents=True)
    outside.mkdir()
    (root / "deep" / "a.txt").write_text("a")
    (outside / "b.txt").write_text("b")
    (root / "deep" / "loop").symlink_to("..")
    (root / "again.txt").symlink_to("deep/a.txt")
    (root / "linked").symlink_to("../outside")
    (root / "broken.txt").symlink_to("nowhere")
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "c.txt").write_text("c")
    assert read(root) == ["a", "b"]
    assert sorted(read(f"{root}/**/*.txt")) == ["a", "b", "c"]
    (line,) = [line for line in caplog.text.splitlines() if "left out" in line]
    assert "1 folders that another link names" in line and "1 files that another link names" in line
    assert "1 broken links" in line
    refused(root / "broken.txt", "is a broken link")


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress, "zstd"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.CSV", "a.tsv", "a.json", "a.parquet"])
def test_compressed_files(tmp_path, compress, name):
    suffix = {gzip.compress: "gz", lzma.compress: "XZ", bz2.compress: "bz2", "zstd": "zst"}[compress]
    if name == "a.parquet":
        parquet(tmp_path / name, {"text": ["whale"]})
    else:
        bodies = {"a.txt": "whale", "a.jsonl": '{"text": "whale"}', "a.json": '[{"text": "whale"}]'}
        (tmp_path / name).write_text(bodies.get(name, "text\nwhale\n"))
    data = (tmp_path / name).read_bytes()
    if compress == "zstd":
        packed = importlib.import_module("pyarrow").compress(data, codec="zstd", asbytes=True)
    else:
        packed = compress(data)
    packed_path = tmp_path / f"{name}.{suffix}"
    packed_path.write_bytes(packed)
    assert read(packed_path) == ["whale"]
    packed_path.write_bytes(packed[:-5])
    with pytest.raises(UserError):
        read(packed_path)


# ---- values are what the file says


def test_no_type_is_guessed(tmp_path):
    many = [{"id": i, "note": None, "text": "2024-01-01"} for i in range(50)]
    late = [{"id": "a7", "note": "late", "text": "12:30"}, {"id": [1], "note": {"x": 1}, "more": 5, "text": "Z"}]
    assert read(lines(tmp_path / "a.jsonl", many + late)) == ["2024-01-01"] * 50 + ["12:30", "Z"]
    (tmp_path / "a.csv").write_text("text,id\r\n007,1\r\nNA,a7\r\nnull,\r\n1e5,x\r\n")
    assert read(tmp_path / "a.csv") == ["007", "NA", "null", "1e5"]
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"a\tb"\n2\tc\n')
    assert read(tmp_path / "a.tsv") == ["a\tb", "c"]


def test_csv_as_python_and_excel_write_it(tmp_path):
    rows = ["x" * 200_000, 'two\nlines "quoted", with a comma', "é\u2028é"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["text", "n"], *([row, i] for i, row in enumerate(rows))])
    assert read(tmp_path / "a.csv") == rows
    (tmp_path / "short.csv").write_text("text,n\n" + "a,1\n" * 30 + "b\n")
    assert read(tmp_path / "short.csv") == ["a"] * 30
    (tmp_path / "open.csv").write_text('text,n\na,1\n"b,2\nc,3\n')
    refused(tmp_path / "open.csv", "quote in the row of line 3 is never closed")
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    refused(tmp_path / "twice.csv", "two columns called text")
    (tmp_path / "excel.csv").write_bytes("text,n\r\na,1\r\n".encode("utf-16"))
    refused(tmp_path / "excel.csv", "excel.csv is not UTF-8 text")
    (tmp_path / "latin.csv").write_bytes("Füße,n\r\na,1\r\n".encode("latin-1"))
    refused(tmp_path / "latin.csv", r"it has F\\udcfc")
    (tmp_path / "chat.csv").write_text('conversations\n"{}"\n'.format(json.dumps([Q, A]).replace('"', '""')))
    assert read(tmp_path / "chat.csv") == [[Q, A]]


def test_unicode_in_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n{"text": "\\ud83d\\ude00"}\n')
    assert read(path) == ["a\u2028b", "😀"]
    path.write_bytes(b'{"text": "x", "id": "\xff"}\n' * 40 + b'{"text": "\\ud800"}\n{"text": "\xe9"}\n')
    assert read(path) == ["x"] * 40
    path.write_bytes('{"text": "x"}\n'.encode("utf-16"))
    refused(path, "UTF-16, not UTF-8")


def test_one_bad_line_costs_one_row(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "x"}\n'
    path.write_bytes(good * 30 + b'{"text": "cut\n' + good * 30 + b"[1]\n" + good)
    assert read(path) == ["x"] * 61
    assert "1 with a line that is not JSON (row 31 of" in caplog.text
    assert "1 with a row that is no JSON object (row 62 of" in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '\ufeff[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
        '{"data": [{"text": "a"}, {"text": "b"}], "version": 1}',
        '{"text": "a"}\n{"text": "b"}\n',
        '\n{"text": "a"}\n\n{"text": "b"}',
    ],
)
def test_json_files(tmp_path, body, monkeypatch):
    monkeypatch.setattr("moonwhale.data.json_rows.CHUNK_CHARACTERS", 5)
    (tmp_path / "a.json").write_text(body, encoding="utf-8")
    assert read(tmp_path / "a.json") == ["a", "b"]


def test_json_that_is_damaged_or_no_table(tmp_path):
    (tmp_path / "cut.json").write_text('[{"text": "a"}, {"text": "b"')
    refused(tmp_path / "cut.json", "cut.json is not JSON after row 1 of its array")
    (tmp_path / "cut.json").write_text('[{"text": "a"} {"text": "b"}]')
    refused(tmp_path / "cut.json", "a comma or ] is missing")
    (tmp_path / "cut.json").unlink()
    (tmp_path / "settings.json").write_text('{\n "a": 1\n}')
    (tmp_path / "tasks.json").write_text('[{"label": 1}]')
    assert read(tmp_path / "settings.json") == ['{\n "a": 1\n}']
    assert len(read(tmp_path)) == 2, "in a folder, they are texts"
    refused(tmp_path / "tasks.json", "no column of messages or text; it has label")


def test_columnar_files(tmp_path):
    pa = importlib.import_module("pyarrow")
    table = {"text": ["a", "b"], "image": [b"\xff", None]}
    parquet(tmp_path / "a.parquet", table)
    for name, writer in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with writer(str(tmp_path / f"{name}.arrow"), pa.table(table).schema) as out:
            out.write_table(pa.table(table))
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert read(tmp_path / name) == ["a", "b"]
    parquet(tmp_path / "none.parquet", {"id": [1], "vector": [[1.0]]})
    refused(tmp_path / "none.parquet", "no column of messages or text; it has id, vector")
    refused(tmp_path / "a.parquet", "no column title; it has text", columns=["text", "title"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing of the kind")
    refused(tmp_path / "bad.parquet", "cannot read .*bad.parquet as parquet")
    (tmp_path / "bad.arrow").write_bytes(b"nothing of the kind")
    refused(tmp_path / "bad.arrow", "cannot read .*bad.arrow")


# ---- folders


def test_a_folder_that_datasets_saved(tmp_path, caplog):
    datasets = importlib.import_module("datasets")
    both = datasets.Dataset.from_dict({"text": [f"{i}" for i in range(12)], "label": [0] * 12}).train_test_split(
        4, seed=1
    )
    both.save_to_disk(str(tmp_path / "both"))
    both["train"].save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert read(tmp_path / "one") == read(tmp_path / "both") == both["train"]["text"]
    assert read(tmp_path / "both", split="test") == both["test"]["text"]
    assert "left out: 1 splits (test)" in caplog.text
    refused(tmp_path / "both", "has only train, test", split="dev")
    refused(tmp_path / "one", "only hub data sets and folders with train and test files have splits", split="test")


def test_a_cloned_hub_set(tmp_path, caplog):
    clone = tmp_path / "clone"
    parquet(clone / "data" / "train-00000-of-00001.parquet", {"text": ["a"]})
    parquet(clone / "data" / "test-00000-of-00001.parquet", {"text": ["t"]})
    parquet(clone / "data" / "validation-00000-of-00001.parquet", {"text": ["v"]})
    (clone / "README.md").write_text("---\nlicense: mit\n---\n# A set")
    (clone / ".gitattributes").write_text("*.parquet filter=lfs")
    (clone / "dataset_infos.json").write_text("{}")
    assert read(clone) == ["a"] and read(clone, split="test") == ["t"]
    (line,) = [line for line in caplog.text.splitlines() if "the split test" in line]
    assert "1 files of the split test" in line and "1 files of the split validation" in line
    assert "2 files that are no tables" in line


def test_fine_tuning_evaluates_on_the_validation_split(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "cache"))
    lines(tmp_path / "data" / "train.jsonl", [{"messages": [Q | {"content": str(i)}, A]} for i in range(3)])
    lines(tmp_path / "data" / "dev.jsonl", [{"messages": [Q, A]}])
    train, held_out = load_conversations(load_source(str(tmp_path / "data")), small_tokenizer)
    assert (len(train), len(held_out)) == (3, 1) and train.column_names == ["input_ids", "labels"]


def declare(clone, *configs: str) -> None:
    (clone / "README.md").write_text("---\nlicense: mit\nconfigs:\n" + "".join(configs) + "---\n# A set\n")


def test_a_cloned_hub_set_whose_readme_declares_its_splits(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "cache"))
    clone = tmp_path / "clone"
    for name in ("a-1", "a-2", "b", "c", "d/e"):
        parquet(clone / "data" / f"{name}.parquet", {"text": [f"whale {name} sang {i}" for i in range(3)]})
    declare(
        clone,
        "- config_name: other\n  data_files: data/c.parquet\n",
        "- config_name: main\n  default: true\n  data_dir: data\n  data_files:\n",
        "  - {split: train, path: ['*.parquet']}\n",
        "  - split: test\n    path: b.parquet\n",
        "  - {split: dev, path: d/**}\n  - {split: none, path: x.csv}\n",
    )
    rows = {name: [f"whale {name} sang {i}" for i in range(3)] for name in ("a-1", "a-2", "b", "c", "d/e")}
    assert read(clone) == rows["a-1"] + rows["a-2"] + rows["c"]  # b is in the test split
    assert read(clone, split="test") == rows["b"] and read(f"{clone}:other") == rows["c"]
    source = load_source(str(clone))
    assert list(source.held_out) == rows["d/e"]  # validation comes before test
    train, held_out = pack_split(source, small_tokenizer, 16)
    assert (train.n_documents, held_out.n_documents) == (9, 3)
    assert load_source(str(clone), "train").held_out is None
    refused(clone, "has only train, test, dev, none", split="validation")
    refused(clone, "the files of the split none that .*README.md declares are not here", split="none")
    refused(f"{clone}:others", r"has no configuration others \(did you mean other\?\).*FOLDER:NAME.*other, main")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("- data_files: ../secret.csv\n", "names files outside of its folder"),
        ("- data_files: /etc/passwd\n", "names files outside of its folder"),
        ("- data_files: https://example.com/a.csv\n", "names files outside of its folder"),
        ("- data_files: [{split: train}]\n", "data_files without split and path"),
        ("- data_files: [{split: train, path: 3}]\n", "data_files without split and path"),
        ("- data_files: 3\n", "data_files without split and path"),
        ("- {config_name: a, data_files: a}\n- {config_name: b, data_files: b}\n", "needs a configuration.*a, b"),
        ("- data_files: [{split: train, path: a.csv}, {split: test, path: a.csv}]\n", "are all in another split too"),
        ("- [\n", "is not YAML"),
    ],
)
def test_a_readme_that_declares_nothing_readable(tmp_path, config, reason):
    (tmp_path / "a.csv").write_text("text\na\n")
    declare(tmp_path, config)
    refused(tmp_path, reason)


@pytest.mark.parametrize("head", ["", "---\nlicense: mit\n---\n", "---\nconfigs: 3\n---\n", "configs:\n- a\n", "---\n"])
def test_a_readme_that_declares_no_files(tmp_path, head):
    (tmp_path / "README.md").write_text(head)
    (tmp_path / "train.csv").write_text("text\na\n")
    assert read(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train_sft.json", "test_sft.json"),
        ("train/a.csv", "dev/a.csv"),
        ("wiki.train.txt", "wiki.valid.txt"),
    ],
)
def test_a_held_out_split_is_not_trained_on(tmp_path, train, held_out):
    for name, text in ((train, "a"), (held_out, "t")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        bodies = {".csv": f"text\n{text}\n", ".txt": text}
        path.write_text(
            bodies.get(path.suffix) or json.dumps([{"text": text}] if name[-4:] == "json" else {"text": text})
        )
    assert read(tmp_path) == ["a"]


def test_a_folder_of_texts_stays_a_folder_of_texts(tmp_path):
    for name in ("README.md", "train/loop.py", "tests/test_loop.py", "test-of-time.txt", "train-journey.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert len(read(tmp_path)) == 5


# ---- shapes of a row

THOUGHT = "<think>Large animals sing.</think>\nThe whale."
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Who sang?", "input": "", "output": "The whale."}, [Q, A]),
        (
            {"instruction": "Who", "input": "sang?", "output": "x", "text": "no"},
            [("user", "Who\n\nsang?"), ("assistant", "x")],
        ),
        ({"instruction": "Who sang?", "output": "The whale.", "system": "Be brief."}, [SYSTEM, Q, A]),
        ({"conversations": [{"from": "human", "value": "Who sang?"}, {"from": "gpt", "value": "The whale."}]}, [Q, A]),
        ({"conversations": [Q, A], "system": "Be brief."}, [SYSTEM, Q, A]),
        ({"messages": [{"role": "developer", "content": "Be brief."}, Q, A]}, [SYSTEM, Q, A]),
        ({"messages": [in_parts(Q), in_parts(A)]}, [Q, A]),
        ({"messages": [Q, {**A, "reasoning_content": "Large animals sing."}]}, [Q, ("assistant", THOUGHT)]),
        ({"messages": [Q, {**A, "thinking": "Large animals sing."}]}, [Q, ("assistant", THOUGHT)]),
        ({"messages": [Q, {**A, "reasoning_content": None, "tool_calls": []}]}, [Q, A]),
        ({"prompt": "Who sang?", "completion": "The whale."}, [Q, A]),
        ({"prompt": [Q], "completion": [A]}, [Q, A]),
        ({"question": "Who sang?", "answer": "The whale."}, [Q, A]),
        ({"text": "whale song"}, "whale song"),
    ],
)
def test_rows_as_other_trainers_write_them(tmp_path, row, expected):
    if isinstance(expected, list):
        pairs = [tuple(message.values()) if isinstance(message, dict) else message for message in expected]
        expected = [{"role": role, "content": content} for role, content in pairs]
    assert read(lines(tmp_path / "a.jsonl", [row])) == [expected]
    parquet(tmp_path / "a.parquet", {name: [value] for name, value in row.items()})
    assert read(tmp_path / "a.parquet") == [expected]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [Q, {**A, "tool_calls": [{"id": "1"}]}]}, "a call of a tool"),
        ({"messages": [Q, {"role": "tool", "content": "5"}]}, "a role other than"),
        ({"messages": [Q, {"role": "assistant", "content": None}]}, "a message without text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A]},
            "a part of a message",
        ),
        ({"prompt": "Who sang?", "completion": None}, "a message without text"),
        ({"instruction": None, "input": "", "output": "x"}, "a blank message"),
    ],
)
def test_what_a_chat_here_cannot_hold_is_counted(tmp_path, caplog, row, reason):
    path = lines(tmp_path / "a.jsonl", [{"messages": [Q, A]}] * 20 + [row])
    assert read(path) == [[Q, A]] * 20
    assert f"1 with {reason}" in caplog.text and "(row 21 of" in caplog.text


def test_preference_pairs_are_refused(tmp_path):
    path = lines(tmp_path / "dpo.jsonl", [{"chosen": [Q, A], "rejected": [Q, A]}])
    refused(path, "no column of messages or text; it has chosen, rejected")


def test_conversations_without_an_answer_are_counted(tmp_path, small_tokenizer, caplog):
    silent = [{"messages": [{"role": "user", "content": f"Hello {i}"}]} for i in range(3)]
    with pytest.raises(UserError, match="no conversation in which the assistant says something"):
        load_conversations(load_source(str(lines(tmp_path / "a.jsonl", silent))), small_tokenizer, tmp_path)
    answered = [{"messages": [{"role": "user", "content": f"Hello {i}"}, A]} for i in range(9)]
    mixed = load_source(str(lines(tmp_path / "b.jsonl", silent + answered)))
    train, held_out = load_conversations(mixed, small_tokenizer, tmp_path)
    assert len(train) + len(held_out) == 9 and "left out 3 of 12 conversations" in caplog.text


def test_rows_without_an_answer_are_left_out(caplog):
    datasets, sft_trainer = (
        importlib.import_module("datasets"),
        importlib.import_module("moonwhale.posttrain.sft_trainer"),
    )
    conversations = datasets.Dataset.from_dict({"input_ids": [[5] * 20], "labels": [[-100] * 18 + [5, 6]]})
    rows, n_split = sft_trainer.pack(conversations, 8)
    assert n_split == 1 and len(rows) == 1 and rows[0]["labels"][-2:] == [5, 6]
    assert "left out 2 of 3 rows" in caplog.text


# ---- caches


def test_tokens_made_from_plain_text_stay_valid_and_those_of_tables_do_not(tmp_path):
    from moonwhale.data.loading import _file_state
    from moonwhale.data.source import digest

    text, table = tmp_path / "a.txt", lines(tmp_path / "a.jsonl", [{"text": "x"}])
    text.write_text("whale")
    assert load_source(str(text)).fingerprint == digest([], None, _file_state(text))
    assert load_source(str(table)).fingerprint != digest([], None, _file_state(table))
