"""Data that would fill the memory is refused in one line: bombs, and rows of any length."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from moonwhale import files
from moonwhale.data import columnar, json_rows, opening, row_formats, tables
from moonwhale.data.loading import load_source
from moonwhale.errors import UserError

COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(opening, "MOST_AT_ONCE", 1 << 20)
    monkeypatch.setattr(json_rows, "MOST_AT_ONCE", 1 << 20)
    monkeypatch.setattr(opening, "ROOM", 1 << 20)
    monkeypatch.setattr(columnar, "ROOM", 1 << 22)
    monkeypatch.setattr(columnar, "MOST_AT_ONCE", 1 << 20)
    monkeypatch.setattr(files, "JSON_VALUES", 1 << 12)
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


LONG = "a" * (1 << 18)
REPEATED = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256, pyarrow.int32()), pyarrow.array([LONG]))
MESSAGES = pyarrow.StructArray.from_arrays([REPEATED, REPEATED], ["role", "content"])
TABLES = {
    "dictionary": {"text": REPEATED},
    "plain": {"text": [LONG] * 64},
    "messages": {"messages": pyarrow.ListArray.from_arrays(pyarrow.array([0, 128, 256], pyarrow.int32()), MESSAGES)},
    "one message": {"messages": [[{"role": "user", "content": LONG}] * 64]},
}
BOMB = "a.(parquet|arrow) expands to more than 100 times its size"


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("encoding", ["dictionary", "plain", "prefixes"])
def test_a_parquet_file_that_repeats_a_value_is_refused(tmp_path, kind, encoding):
    if encoding == "prefixes" and kind != "plain":
        pytest.skip("pyarrow writes prefixes of a column of texts only")
    options = {"prefixes": {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}}}.get(encoding, {})
    path, table = tmp_path / "a.parquet", pyarrow.table(TABLES[kind])
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=encoding == "dictionary", **options)
    refused(path, BOMB)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("compression", ["zstd", None])
def test_an_arrow_file_that_repeats_a_value_is_refused(tmp_path, kind, compression):
    path, table = tmp_path / "a.arrow", pyarrow.table(TABLES[kind])
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table)
    if kind == "plain" and not compression:
        assert len(list(load_source(str(path)))) == 64
    elif kind == "one message" and not compression:
        refused(path, "a row has more than 1,048,576 bytes")
    else:
        refused(path, BOMB)


@pytest.mark.parametrize(
    "array",
    [
        REPEATED.slice(9, 5),
        MESSAGES.slice(9, 5),
        pyarrow.ListArray.from_arrays(pyarrow.array([0, 128, 131], pyarrow.int32()), MESSAGES).slice(1),
        pyarrow.array(["a" * 9, None, LONG, "é"]).slice(1, 2),
        pyarrow.array([LONG] * 3).cast(pyarrow.string_view()),
        pyarrow.array([[1], [], [2, 3]], pyarrow.list_(pyarrow.int64())),
        pyarrow.array([{"x": "a", "y": [LONG]}]),
        pyarrow.RunEndEncodedArray.from_arrays([9], [LONG]),
    ],
)
def test_the_decoded_size_is_not_underestimated(array):
    texts = json.dumps(array.to_pylist(), ensure_ascii=False).count("a")
    assert columnar._decoded_size(array) >= texts


@pytest.mark.parametrize("values", [[b"whale", b"\xad\xde"], [b"\xff"] * 9])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_whose_texts_are_not_utf8_is_refused(tmp_path, suffix, values):
    texts = pyarrow.array(values).view(pyarrow.string())
    path, table = tmp_path / f"a.{suffix}", pyarrow.table({"text": texts})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    refused(path, f"cannot read .* as {suffix}: .*(utf-8|UTF8)")


def test_an_arrow_file_with_offsets_outside_of_it_is_refused(tmp_path):
    path, table = tmp_path / "a.arrow", pyarrow.table({"text": ["w" * 77]})
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    good, bad = ((0).to_bytes(4, "little") + end.to_bytes(4, "little") for end in (77, 1 << 30))
    before, _, after = path.read_bytes().rpartition(good)
    path.write_bytes(before + bad + after)
    refused(path, "cannot read .* as arrow: ")


def test_large_rows_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "BYTES_PER_BATCH", 1000)
    rows = [f"{i} " * 100 for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", row_group_size=70)
    assert list(load_source(str(tmp_path / "a.parquet"))) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": ["x"' + ",[]" * 5000 + "]}\n", "it has more than 4,096 values|no text"),
        ("a.json", '[{"text": ["x"' + ",[]" * 5000 + "]}]", "row 1 has too many values"),
        ("a.json", '{"x": ["x"' + ",{}" * 5000 + '],\n"text": "x"}', ""),
    ],
)
def test_a_row_of_many_values_is_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(json_rows, "CHUNK_CHARACTERS", 1000)
    (tmp_path / name).write_text(content)
    if message:
        refused(tmp_path / name, message)
    else:  # no table: it is read as text
        assert list(load_source(str(tmp_path / name))) == [content]


def test_a_header_of_many_columns_takes_linear_time(tmp_path):
    (tmp_path / "a.csv").write_text(",".join(f"c{i}" for i in range(100_000)) + "\n" + "," * 99_999 + "\n")
    refused(tmp_path / "a.csv", "no column of messages or text")


@pytest.fixture
def saved(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["whale"]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "outside.arrow").write_bytes(next((tmp_path / "saved" / "train").glob("*.arrow")).read_bytes())
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "name", ["../../outside.arrow", "/etc/hostname", "/dev/zero", "missing.arrow", "..", "", 5, None]
)
def test_a_saved_set_reads_no_file_outside_its_folder(saved, name):
    for entries in ([{"filename": name}], [name], {"filename": name}, name):
        (saved / "train" / "state.json").write_text(json.dumps({"_data_files": entries}))
        refused(saved, "which is no file of its folder|has no list _data_files")


@pytest.mark.parametrize("splits", [[5], 5, None, ["../saved"], [".."], [""], ["a/b"], [["train"]], {"train": 1}])
def test_a_saved_dictionary_names_its_own_splits(saved, splits):
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    refused(saved, "which is no split|has no list splits")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"splits": ' * 10_000, "[]", "{", '{"splits": 1, "splits": 2}'])
def test_damaged_metadata_of_a_saved_set_is_one_line(saved, text):
    for path in (saved / "train" / "state.json", saved / "dataset_dict.json"):
        path.write_text(text)
        refused(saved, "cannot read .*json: ")


MANY_FIELDS = {
    "commas": "text\n" + "," * 5000 + "\n",
    "lines": "text\n" + '"\n",' * 5000 + "\n",
    "header": "," * 5000 + "\n",
    "text of many lines": 'text\n"' + "a\n" * (1 << 19) + '"',
}


@pytest.mark.parametrize("kind", MANY_FIELDS)
def test_a_row_of_many_fields_is_refused_before_it_is_parsed(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tables, "MOST_FIELDS", 1 << 12)
    monkeypatch.setattr(tables, "MOST_AT_ONCE", 1 << 19)
    (tmp_path / "a.csv").write_text(MANY_FIELDS[kind])
    refused(tmp_path / "a.csv", "a row has more than 524,288 characters or 4,096 fields: split it")


def test_the_fields_of_a_file_are_not_those_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_FIELDS", 10)
    (tmp_path / "a.csv").write_text("text,n\n" + "a,1\n" * 99)
    assert list(load_source(str(tmp_path / "a.csv"))) == ["a"] * 99


NULLS = pyarrow.nulls(1 << 21)
NOTHINGS = pyarrow.StructArray.from_buffers(pyarrow.struct([]), 1 << 21, [None])
TRUE = pyarrow.array([True] * (1 << 21))


def lists(array, offsets=None):
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets or [0, len(array)], pyarrow.int32()), array)


WEIGHTLESS = {
    "nulls": lists(NULLS),
    "a fixed number of nulls": pyarrow.FixedSizeListArray.from_arrays(NULLS, len(NULLS)),
    "structs of nothing": lists(NOTHINGS),
    "bools": lists(TRUE),
    "structs of nulls": lists(pyarrow.StructArray.from_arrays([NULLS], ["role"])),
    "a view": pyarrow.ListViewArray.from_arrays([0] * 9, [len(NULLS)] * 9, NULLS),
    "a dictionary": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 9, pyarrow.int32()), lists(NULLS)),
    "a map": pyarrow.MapArray.from_arrays([0, 1 << 20], pyarrow.array([""] * (1 << 20)), NULLS[: 1 << 20]),
    "a run": pyarrow.RunEndEncodedArray.from_arrays([9], lists(NULLS)),
    "opaque": pyarrow.ExtensionArray.from_storage(
        pyarrow.opaque(pyarrow.list_(pyarrow.null()), "a", "b"), lists(NULLS)
    ),
}


@pytest.mark.parametrize("kind", WEIGHTLESS)
def test_elements_that_take_no_bytes_are_counted(tmp_path, kind):
    table = pyarrow.table({"messages": WEIGHTLESS[kind]})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    refused(tmp_path / "a.arrow", BOMB)


@pytest.mark.parametrize("kind", ["nulls", "bools", "structs of nulls"])
def test_elements_of_parquet_that_take_no_bytes_are_counted(tmp_path, monkeypatch, kind):
    pyarrow.parquet.write_table(pyarrow.table({"messages": WEIGHTLESS[kind]}), tmp_path / "a.parquet")
    monkeypatch.setattr(columnar, "_to_rows", lambda batches, path: [next(batches)])  # nothing may be decoded
    refused(tmp_path / "a.parquet", BOMB)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_of_bools_and_of_nulls_are_read(tmp_path, suffix):
    """As many columns of nulls as schemas of tools have, and a list of bits that takes eight to a byte."""
    call = pyarrow.struct([pyarrow.field(f"argument{i}", pyarrow.string()) for i in range(50)])
    fields = {
        "role": pyarrow.string(),
        "content": pyarrow.string(),
        "seen": pyarrow.list_(pyarrow.bool_()),
        "call": call,
    }
    answer = {"role": "assistant", "content": "The whale."}
    rows = [[{"role": "user", "content": f"Who sang {i}?", "seen": [True] * 99}, answer] for i in range(999)]
    kind = pyarrow.list_(pyarrow.struct(fields))
    table = pyarrow.table({"messages": pyarrow.array(rows, kind), "system": pyarrow.nulls(999, pyarrow.string())})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert len(list(load_source(str(path)))) == 999


MANY = {"deep": '[{"a":' + "[" * 5000 + "]" * 5000 + "}]", "long": '[{"a": [1' + ",1" * 5000 + "]}]"}


@pytest.mark.parametrize("kind", MANY)
def test_messages_in_a_text_are_bounded_too(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [MANY[kind]]}), path)
    refused(path, "mostly those with messages that cannot be read")


CULPRITS = {
    "text": "a" * (1 << 22),
    "list": [0] * (1 << 22),
    "deep": [[[[[]]]]] * 9,
    "bytes": b"\0" * (1 << 22),
    "int": 10**5000,
}


@pytest.mark.parametrize("kind", CULPRITS)
def test_what_cannot_be_read_is_not_printed_whole(monkeypatch, kind):
    printed = []
    monkeypatch.setattr(row_formats, "one_line", lambda text: printed.append(text) or text)
    assert len(row_formats.BadRow("a reason", CULPRITS[kind]).culprit) <= 80 and len(printed[0]) <= 1000
