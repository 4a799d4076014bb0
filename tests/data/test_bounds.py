"""Data that would fill the memory is refused in one line: bombs, and rows of any length."""

import bz2
import gzip
import lzma

import pytest

from moonwhale.data import json_rows, opening
from moonwhale.data.loading import load_source
from moonwhale.errors import UserError

COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(opening, "MOST_AT_ONCE", 1 << 20)
    monkeypatch.setattr(json_rows, "MOST_AT_ONCE", 1 << 20)
    monkeypatch.setattr(opening, "ROOM", 1 << 20)
    monkeypatch.setattr(opening.read_whole, "__defaults__", (1 << 20,))


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        list(load_source(str(path)))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [*COMPRESS, "zst"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"a" * (1 << 23)),
        ("a.jsonl", (b'{"text": "' + b"a" * 500 + b'"}\n') * (1 << 14)),
        ("a.jsonl", b'{"text": "' + b"a" * (1 << 23) + b'"}\n'),
        ("a.csv", b"text\n" + (b"a" * 500 + b"\n") * (1 << 14)),
        ("a.json", b'{"text": "' + b"a" * (1 << 23) + b'"}'),
    ],
)
def test_a_bomb_is_refused(tmp_path, suffix, name, content):
    import pyarrow

    path = tmp_path / f"{name}.{suffix}"
    zstd = suffix == "zst"
    path.write_bytes(pyarrow.compress(content, "zstd", asbytes=True) if zstd else COMPRESS[suffix](content))
    refused(path, "expands to more than 100 times its size|more than 1,048,576")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.jsonl", '{"text": "', '"}\n'),
        ("a.json", '[{"text": "', '"}]'),
        ("a.json", '{"text": "', '"}'),
        ("a.csv", "text,n\n", ",1\n"),
    ],
)
def test_a_row_without_an_end_is_refused(tmp_path, name, before, after):
    (tmp_path / name).write_text(before + "a" * (1 << 22) + after)
    refused(tmp_path / name, "more than 1,048,576")


@pytest.mark.parametrize("row", ["[" * 100_000, '{"a":' * 100_000, '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_deep_nesting_is_no_row(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(row + "\n")
    refused(tmp_path / "a.jsonl", "cannot be read|is not JSON|no column")
