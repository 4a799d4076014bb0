"""Tests sources, shards and packed rows."""

import abc
import ast
import csv
import errno
import gzip
import importlib
import json
import lzma
import os
import pickle
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from moonwhale.data import packing, shards
from moonwhale.data.chat import encode_document
from moonwhale.data.commands import main_data, main_tokenizer
from moonwhale.data.loading import load_source
from moonwhale.data.packing import PackedDataset, build_data, choose_rows, pack_split
from moonwhale.data.shards import TokenShards, build_shards
from moonwhale.data.source import Source
from moonwhale.data.split import document_hash
from moonwhale.data.tokenizer import train_tokenizer
from moonwhale.errors import UserError
from moonwhale.files import cache_folder, new_folder

WORDS = ["whale", "moon", "sea", "song", "tide", "night"]
DOCUMENTS = [" ".join(WORDS[(i * k) % 6] for k in range(i % 9 + 1)) + f" {i}" for i in range(60)]
MESSAGES = [{"role": "user", "content": "Who sang?"}, {"role": "assistant", "content": "The whale."}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:02}.txt").write_text(text)
    return folder


def source_of(documents, print="print"):
    return Source("given", print, lambda: iter(documents))


def fails(match, *args, **options):
    with pytest.raises(UserError, match=match) as caught:
        list(load_source(*args, **options))
    assert "\n" not in str(caught.value)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- sources


def test_chitchat():
    source = load_source("chitchat")
    conversations = list(source)
    assert len(conversations) == 3243
    for messages in conversations:
        roles = [message["role"] for message in messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert all(message["content"].strip() for message in messages)
    assert conversations[0][0] == {"role": "user", "content": "Hello\nHow are you doing today?"}
    assert conversations[0][1]["content"].split("\n") == ["whats up MD", "im doing good", "how are you doing?"]


def test_chitchat_merges_turns_and_drops_group_chats(tmp_path, monkeypatch):
    def turn(sender, *texts):
        return [{"sender": sender, "text": text, "timestamp": ""} for text in texts]

    pair = [turn("b", "hi", " "), turn("b", "there"), turn("a", "yes"), turn("b", ""), turn("a", "so"), turn("b", "ok")]
    crowd = [turn(sender, "x") for sender in "abca"]
    alone, short = [turn("a", "x")] * 4, [turn("a", "x"), turn("b", "x"), turn("a", "x")]
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({i: {"messages": c} for i, c in enumerate([crowd, pair, alone, short])}))
    monkeypatch.setattr("moonwhale.data.loading.chitchat_file", lambda: file)
    assert [[(m["role"], m["content"]) for m in c] for c in load_source("chitchat")] == [
        [("user", "hi\nthere"), ("assistant", "yes\nso"), ("user", "ok")]
    ]


def test_python_is_the_standard_library():
    source = load_source("python")
    assert source.n_documents > 300
    texts = list(islice(source, 80))
    assert all(Path(module.__file__).read_text("utf-8") in texts for module in (abc, ast))


def test_file_folder_glob_and_compressed(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.txt").write_text("a\r\nä", newline="", encoding="utf-8-sig")
    (tmp_path / "deep" / "b.py").write_text("b")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"c"))
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(b"d"))
    jsonl(tmp_path / "e.jsonl", [{"text": "e"}])
    assert list(load_source(str(tmp_path / "a.txt"))) == ["a\r\nä"]
    assert list(load_source(str(tmp_path))) == ["a\r\nä", "c", "d", "b", "e"]
    assert list(load_source(str(tmp_path / "**" / "*.[pt][yx]*"))) == ["a\r\nä", "d", "b"]


def test_a_folder_skips_binary_files_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    assert list(load_source(str(tmp_path))) == ["a"]
    assert "skipped 1 files" in caplog.text and "picture.png" in caplog.text


def test_tables(tmp_path):
    rows = [{"id": 1, "text": "one", "more": "uno"}, {"id": 2, "text": " ", "more": "dos"}, {"id": 3, "text": "three"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert list(load_source(path)) == ["one", "three"]
    assert list(load_source(path, columns=["more", "text"])) == ["uno\n\none", "dos\n\n ", "three"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    assert list(load_source(f"{path}.gz", columns="text")) == ["one", "three"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["content"], ['two\nlines, "quoted"']])
    assert list(load_source(str(tmp_path / "a.csv"))) == ['two\nlines, "quoted"']
    table = importlib.import_module("pyarrow").table({"text": ["p", "q"]})
    importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    assert list(load_source(str(tmp_path / "a.parquet"))) == ["p", "q"]


def test_messages_in_both_formats(tmp_path):
    spelled = [{"from": "human", "value": "Who sang?"}, {"from": "gpt", "value": "The whale."}]
    path = jsonl(tmp_path / "a.jsonl", [{"text": "no", "messages": MESSAGES}, {"text": "no", "messages": MESSAGES[:1]}])
    assert list(load_source(path)) == [MESSAGES, MESSAGES[:1]]
    assert list(load_source(jsonl(tmp_path / "b.jsonl", [{"talk": spelled}]), columns=["talk"])) == [MESSAGES]


def test_bad_local_data_is_one_line_each(tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "zeros.txt").write_bytes(b"text\0more")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    (tmp_path / "plain.txt.xz").write_bytes(b"not xz")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "two.json").write_text('[{"text": "a"}]\n \n[{"text": "b"}]\n')
    (tmp_path / "bare.jsonl").write_text(f"{json.dumps(MESSAGES)}\n" * 2)
    (tmp_path / "nothing").mkdir()
    good = jsonl(tmp_path / "good.jsonl", [{"id": 1, "body": "x"}])
    tool = jsonl(tmp_path / "tool.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}])
    fails("no such file or folder: foo.txt", "foo.txt")
    fails("no such file or folder: corpus/foo.txt", "corpus/foo.txt")
    monkeypatch.chdir(tmp_path)
    fails("no such file or folder: nothing/foo", "nothing/foo")
    fails("no files in", str(tmp_path / "nothing"))
    fails("no files in", str(tmp_path / "*.nope"))
    fails("there is no text in", str(tmp_path / "empty.txt"))
    fails("there is no text in", str(tmp_path / "empty.jsonl"))
    fails("zeros.txt is not text but binary", str(tmp_path / "zeros.txt"))
    fails("latin.txt is not UTF-8 text", str(tmp_path / "latin.txt"))
    fails("cannot read .*cut.txt.gz", str(tmp_path / "cut.txt.gz"))
    fails("cannot read .*plain.txt.xz", str(tmp_path / "plain.txt.xz"))
    fails("1 of 2 rows of .*bad.jsonl .*a line that is not JSON .row 2", str(tmp_path / "bad.jsonl"))
    for name in ("two.json", "bare.jsonl"):
        fails(f"{name} has more after the end of its array: write one object per line", str(tmp_path / name))
    fails("`data`: it is empty", "")
    fails("no column of messages or text; it has id, body", good)
    fails("no column title; it has id, body", good, columns=["title"])
    fails("id that is neither text nor a list of messages", good, columns=["id"])
    fails("`data_split` test: only hub data sets and", good, split="test")
    fails("has no columns", str(tmp_path / "latin.txt"), columns=["text"])
    fails("1 of 1 rows .*a role other than system, user, assistant .*'tool'", tool)


# ---- packing


def rows_of(dataset):
    return {key: torch.stack([item[key] for item in dataset]).tolist() for key in dataset[0]}


def test_packing_by_hand(tokenizer, tmp_path):
    """Documents of 5, 3 and 4 tokens fill rows of 4. The first spans two rows; the second shares a row with it."""
    documents = ["\1\2\3", "\4", "\5\6"]
    built = build_shards(source_of(documents), tokenizer, tmp_path)
    ids = [encode_document(tokenizer, document).tolist() for document in documents]
    assert [len(document) for document in ids] == [5, 3, 4]
    (bos, a, b, c, eos), (_, d, _), (_, e, f, _) = ids
    lengths = np.array([5, 3, 4])
    packed = rows_of(PackedDataset(built, np.array([0, 5, 8]), lengths, 6, 4))
    assert packed == {
        "input_ids": [[bos, a, b, c], [eos, bos, d, eos], [bos, e, f, eos]],
        "position_ids": [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 2, 3]],
        "labels": [[-100, a, b, c], [eos, -100, d, eos], [-100, e, f, eos]],
    }
    # Without the middle document and with rows of 5, the last row lacks one token.
    part = PackedDataset(built, np.array([0, 8]), lengths[[0, 2]], 5, 5)
    assert (part.n_documents, part.n_tokens, part.n_bytes, len(part)) == (2, 9, 5, 2)
    assert rows_of(part) == {
        "input_ids": [[bos, a, b, c, eos], [bos, e, f, eos, bos]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]],
        "labels": [[-100, a, b, c, eos], [-100, e, f, eos, -100]],
    }
    # A row longer than the text repeats it. Each repetition is a document of its own, and none has labels.
    short = PackedDataset(built, np.array([5]), lengths[[1]], 1, 8)
    assert rows_of(short) == {
        "input_ids": [[bos, d, eos, bos, d, eos, bos, d]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 0, 1]],
        "labels": [[-100, d, eos, -100, -100, -100, -100, -100]],
    }
    assert part[1]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        part[2]


def texts_in(dataset, tokenizer):
    """Recovers the split's documents from its rows alone."""
    stream = torch.cat([row["input_ids"] for row in dataset])[: dataset.n_tokens].tolist()
    return [text for text in tokenizer.decode(stream).replace("<|eos|>", "").split("<|bos|>") if text]


def test_split_is_by_document_complete_and_stable(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "HELD_OUT_SHARE", 0.3)
    documents = [*DOCUMENTS, DOCUMENTS[7]]
    train, held_out = pack_split(source_of(documents), tokenizer, 16, cache_dir=tmp_path)
    inside, aside = texts_in(train, tokenizer), texts_in(held_out, tokenizer)
    assert sorted(inside + aside) == sorted(documents)
    assert not set(inside) & set(aside) and inside and aside
    assert set(aside) == {text for text in documents if document_hash(text) < 0.3 * 2**64}
    assert (train.n_documents, held_out.n_documents) == (len(inside), len(aside))
    assert train.n_bytes == sum(len(text.encode()) for text in inside)
    # The side of a document depends neither on the order nor on the other documents.
    _, again = pack_split(source_of([*reversed(documents), "new"], "2"), tokenizer, 16, cache_dir=tmp_path)
    assert set(texts_in(again, tokenizer)) - {"new"} == set(aside)


def test_chosen_rows_are_spread_evenly():
    assert choose_rows(range(9), 3).indices == [0, 4, 8]
    assert len(choose_rows(range(9), None)) == len(choose_rows(range(9), 20)) == 9


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_get_a_document(tokenizer, tmp_path, fraction, monkeypatch):
    monkeypatch.setattr(packing, "HELD_OUT_SHARE", fraction)
    sides = pack_split(source_of(["whale", "moon", "sea"]), tokenizer, 16, cache_dir=tmp_path)
    assert [side.n_documents for side in sides] == ([2, 1] if fraction < 0.5 else [1, 2])
    assert document_hash(texts_in(sides[1], tokenizer)[0]) < document_hash(texts_in(sides[0], tokenizer)[0])


def test_a_single_document_is_split_by_position(tokenizer, tmp_path, caplog):
    text = " ".join(DOCUMENTS)
    train, held_out = pack_split(source_of([text]), tokenizer, 16, cache_dir=tmp_path)
    assert "only one distinct document" in caplog.text
    ids = encode_document(tokenizer, text)
    assert held_out.n_tokens == round(0.05 * len(ids)) and train.n_tokens == len(ids) - held_out.n_tokens
    stream = [torch.cat([row["input_ids"] for row in side])[: side.n_tokens] for side in (train, held_out)]
    assert torch.cat(stream).tolist() == ids.tolist()
    assert train.n_bytes + held_out.n_bytes == len(text.encode()) and held_out.n_bytes > 0
    assert train[1]["position_ids"].tolist() == list(range(16)), "restarts where a row does"
    with pytest.raises(UserError, match="too short: 3 tokens"):
        pack_split(source_of(["x"], "2"), tokenizer, 16, cache_dir=tmp_path)
    with pytest.raises(UserError, match="`context` 1"):
        pack_split(source_of([text]), tokenizer, 1, cache_dir=tmp_path)


def test_items_depend_on_the_index_alone(tokenizer, tmp_path):
    both = [pack_split(source_of(DOCUMENTS), tokenizer, 16, cache_dir=tmp_path / name)[0] for name in "ab"]
    assert rows_of(both[0]) == rows_of(both[1])
    order = torch.randperm(len(both[0]), generator=torch.Generator().manual_seed(3)).tolist()
    assert all(both[0][i]["input_ids"].equal(both[1][i]["input_ids"]) for i in order)
    small = pickle.dumps(both[0])
    assert len(small) < 5000, "a worker process must map the shards, not receive them"
    assert rows_of(pickle.loads(small)) == rows_of(both[0])


# ---- shards


def state(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_built_once_and_reused(tokenizer, corpus, tmp_path, monkeypatch):
    first = build_shards(load_source(str(corpus)), tokenizer, tmp_path)
    before = state(first.folder)
    monkeypatch.setattr(shards, "encode_documents", None)
    again = build_shards(load_source(str(corpus)), tokenizer, tmp_path, verify=True)
    assert again.folder == first.folder and state(first.folder) == before


def test_rebuilt_when_source_or_tokenizer_changes(tokenizer, corpus, tmp_path):
    def build(tokenizer=tokenizer, **options):
        built = build_shards(load_source(str(corpus), **options), tokenizer, tmp_path)
        return built.folder, tokenizer.decode(built[np.arange(int(built.documents["tokens"].sum()))])

    folder, text = build()
    (corpus / "00.txt").write_text("changed!")
    changed_folder, changed = build()
    assert changed_folder != folder and "changed!" in changed and "changed!" not in text
    (corpus / "99.txt").write_text("added!")
    assert "added!" in build()[1]
    other = train_tokenizer(DOCUMENTS, 270)
    assert build(other)[0] != build()[0] and "added!" in build(other)[1]


def test_many_shards_read_as_one_stream(tokenizer, tmp_path, monkeypatch):
    whole = pack_split(source_of(DOCUMENTS), tokenizer, 16, cache_dir=tmp_path / "whole")
    monkeypatch.setattr(shards, "SHARD_TOKENS", 13)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 50)
    cut = pack_split(source_of(DOCUMENTS), tokenizer, 16, cache_dir=tmp_path / "cut")
    sizes = [file["size"] for name, file in cut[0].shards.index["files"].items() if name.startswith("tokens")]
    assert len(sizes) > 20 and set(sizes[:-1]) == {26}
    assert [rows_of(side) for side in cut] == [rows_of(side) for side in whole]


def test_large_vocabularies_take_four_bytes(tokenizer, tmp_path):
    large = train_tokenizer(DOCUMENTS, 300)
    large.add_tokens([f"<extra {i}>" for i in range(1 << 16)])
    built = build_shards(source_of([f"<extra {65535}>"]), large, tmp_path)
    assert (
        built[np.array([1])].tolist() == [large.convert_tokens_to_ids("<extra 65535>")] and built[np.array([1])] > 65535
    )
    assert build_shards(source_of(["x"]), tokenizer, tmp_path).index["dtype"] == "<u2"


@pytest.mark.parametrize("hurt", ["flip", "truncate", "remove", "garble index", "truncate documents"])
def test_damaged_shards_are_detected_and_rebuilt(tokenizer, tmp_path, caplog, hurt):
    source = source_of(DOCUMENTS)
    good = build_shards(source, tokenizer, tmp_path)
    file = good.folder / {"garble index": "index.json", "truncate documents": "documents.npy"}.get(
        hurt, "tokens-00000.bin"
    )
    data = file.read_bytes()
    if hurt == "remove":
        file.unlink()
    else:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:] if hurt == "flip" else data[:-4])
    again = build_shards(source, tokenizer, tmp_path)
    assert "is damaged" in caplog.text and "building it again" in caplog.text
    assert file.read_bytes() == data and again.find_damage(thorough=True) is None


def test_large_shards_have_their_checksums_read_on_request(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "QUICK_CHECKSUM_BYTES", 0)
    built = build_shards(source_of(DOCUMENTS), tokenizer, tmp_path)
    file = built.folder / "tokens-00000.bin"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    assert TokenShards(built.folder).find_damage() is None
    assert "checksum" in TokenShards(built.folder).find_damage(thorough=True)


KILLED = """
import os, signal, sys
from moonwhale.data import shards
from moonwhale.data.source import Source
from moonwhale.data.tokenizer import load_tokenizer

shards.BATCH_CHARACTERS = 10
def read():
    yield from ["whale song"] * 50
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
print(shards.build_shards(Source("given", "print", read), load_tokenizer(sys.argv[1]), sys.argv[2]).folder)
"""


def test_a_killed_build_is_never_used(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "tokenizer"), str(tmp_path / "cache")]
    killed = subprocess.run([*command, "kill"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = list((tmp_path / "cache" / "shards").iterdir())
    assert any(path.is_dir() for path in left), "it was killed in the middle"
    assert all(path.name.startswith(".") for path in left)
    built = build_shards(source_of(["whale song"] * 50), tokenizer, tmp_path / "cache")
    assert len(built.documents) == 50 and built.find_damage(thorough=True) is None
    assert [path for path in built.folder.parent.iterdir() if path.is_dir()] == [built.folder]


def test_a_failing_source_leaves_no_files(tokenizer, tmp_path):
    def read():
        yield "whale"
        raise UserError("`data`: cannot read on")

    with pytest.raises(UserError, match="cannot read on"):
        build_shards(Source("given", "print", read), tokenizer, tmp_path)
    assert [path for path in (tmp_path / "shards").iterdir() if path.is_dir()] == []


def test_a_full_disk_and_a_folder_without_write_permission(tokenizer, tmp_path, monkeypatch):
    def append(folder, start, stream):
        (folder / "tokens-00000.bin").write_bytes(b"partial")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_append", append)
    with pytest.raises(UserError, match=f"cannot write in {tmp_path}/shards: the disk is full"):
        build_shards(source_of(DOCUMENTS), tokenizer, tmp_path)
    assert [path for path in (tmp_path / "shards").iterdir() if path.is_dir()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        build_shards(source_of(DOCUMENTS), tokenizer, tmp_path / "file")


def test_a_new_folder_replaces_the_old_one_completely(tmp_path):
    for name in "ab":
        with new_folder(tmp_path / "out") as building:
            (building / name).write_text(name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MOONWHALE_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "moonwhale"
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "env"))
    assert cache_folder() == tmp_path / "env" and cache_folder(tmp_path) == tmp_path


# ---- building data, and the commands


def test_build_data_trains_and_reuses_a_tokenizer(corpus, tmp_path, monkeypatch):
    first = build_data(load_source(str(corpus)), vocab_size=280, context=16, cache_dir=tmp_path)
    assert len(first.tokenizer) <= 280 and len(first.train) and len(first.held_out)
    folder = tmp_path / "mine"
    first.tokenizer.save_pretrained(folder)
    monkeypatch.setattr(shards, "encode_documents", None)
    monkeypatch.setattr("moonwhale.data.tokenizer.train_tokenizer", None)
    for tokenizer in (None, "train", str(folder)):
        again = build_data(
            load_source(str(corpus)), tokenizer=tokenizer, vocab_size=280, context=16, cache_dir=tmp_path
        )
        assert rows_of(again.train) == rows_of(first.train)
    packing.pack_split(load_source(str(corpus)), first.tokenizer, 32, cache_dir=tmp_path)  # one build for any context


def test_data_command(corpus, tmp_path, capsys):
    options = ["--data", str(corpus), "--vocab-size", "280", "--context", "16", "--cache", str(tmp_path)]
    main_data([*options, "--show", "2", "--verify"])
    out = capsys.readouterr().out
    train, held_out = pack_split(
        load_source(str(corpus)),
        build_data(load_source(str(corpus)), vocab_size=280, context=16, cache_dir=tmp_path).tokenizer,
        16,
        cache_dir=tmp_path,
    )
    for side in (train, held_out):
        assert f"{side.n_documents:,} documents, {side.n_tokens:,} tokens, {len(side)} rows of 16" in out
    assert f"{sum(len(text) for text in DOCUMENTS):,} bytes" in out and str(train.shards.folder) in out
    assert out.count("--- training row") == 2 and "<|bos|>" in out
    with pytest.raises(UserError, match="unknown option --vocab"):
        main_data(["--vocab", "300"])
    with pytest.raises(UserError, match="`context`: 'many' is not a whole number"):
        main_data(["--context", "many"])
    with pytest.raises(UserError, match="`vocab_size`: 280 is impossible: only a tokenizer that is trained here"):
        main_data([*options, "--tokenizer", "gpt2"])


def test_tokenizer_command(corpus, tmp_path, capsys):
    out = tmp_path / "tokenizer"
    main_tokenizer(
        ["train", "--data", str(corpus), "--vocab-size", "280", "--out", str(out), "--cache", str(tmp_path / "cache")]
    )
    main_tokenizer(["show", str(out), "whale é"])
    shown = capsys.readouterr().out
    assert "'<|bos|>'" in shown and "for 8 bytes" in shown
    with pytest.raises(UserError, match="not valid UTF-8"):
        main_tokenizer(["show", str(out), "caf\udce9"])
    with pytest.raises(UserError, match="`show`: -1"):
        main_data(["--data", str(corpus), "--show", "-1"])
    with pytest.raises(UserError, match="not an empty folder"):
        main_tokenizer(["train", "--data", str(corpus), "--out", str(out)])
    with pytest.raises(UserError, match="required: verb"):
        main_tokenizer([])


def test_help_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from moonwhale.data.commands import main_data\n"
        "try: main_data(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets', 'tokenizers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
