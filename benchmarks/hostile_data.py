"""Writers of hostile tables, data sets and tasks. Each draws from a seeded generator."""

import gzip
import json
import os
import random
from pathlib import Path

from hostile_folders import ODD


def columnar(path: Path, draw: random.Random) -> None:
    """Write a Parquet or Arrow file that refers to one long text from many rows, or compresses long texts."""
    import pyarrow
    import pyarrow.parquet

    text = "a" * draw.choice([10, 1 << 20, 1 << 23, 1 << 26])
    references = pyarrow.array([0] * draw.choice([256, 1 << 16]), pyarrow.int32())
    repeated = pyarrow.DictionaryArray.from_arrays(references, pyarrow.array([text]))
    messages = pyarrow.StructArray.from_arrays([repeated, repeated], ["role", "content"])
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 128, 256], pyarrow.int32()), messages)
    columns = [
        {"text": repeated},
        {"text": [text] * 4},
        {"messages": lists},
        {"x" * 300: repeated},
        {"text": [None] * 99},
    ]
    table = pyarrow.table(draw.choice(columns))
    if path.suffix == ".arrow":
        options = pyarrow.ipc.IpcWriteOptions(compression=draw.choice(["zstd", "lz4", None]))
        with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
            writer.write_table(table)
    else:
        # Parquet writes the values of a nested dictionary one by one, which takes this process's own memory.
        pyarrow.parquet.write_table(
            table.slice(0, 1 if "messages" in table.column_names else None), path, compression="zstd"
        )
    if draw.random() < 0.3:
        content = bytearray(path.read_bytes())
        for _ in range(5):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)


def weightless(path: Path, draw: random.Random) -> None:
    """Write a row of an Arrow file that holds many elements without a byte, or with a bit each."""
    import pyarrow

    n = draw.choice([10**3, 3 * 10**8])
    bits = pyarrow.Array.from_buffers(pyarrow.bool_(), 10**8, [None, pyarrow.py_buffer(bytes(10**8 // 8))])
    nothings = pyarrow.StructArray.from_buffers(pyarrow.struct([]), n, [None])
    elements = draw.choice([pyarrow.nulls(n), nothings, bits])
    row = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(elements)], pyarrow.int32()), elements)
    fixed = pyarrow.FixedSizeListArray.from_arrays(elements, len(elements))
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 99, pyarrow.int32()), row)
    table = pyarrow.table({draw.choice(["messages", "text", "x"]): draw.choice([row, row, fixed, repeated])})
    with pyarrow.ipc.new_stream(
        path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=draw.choice(["zstd", None]))
    ) as writer:
        writer.write_table(table)


def globs(path: Path, draw: random.Random) -> None:
    """Write a folder of links to itself, or of folders inside one another, whose README.md names files by a glob."""
    here = path
    path.mkdir()
    for _ in range(draw.choice([0, 0, 150])):  # what is deeper, Python cannot remove
        here /= "a"
    here.mkdir(parents=True, exist_ok=True)
    (here / "t.txt").write_text("the whale sings to the moon " * 99)
    for name in "bcd"[: draw.choice([0, 3])]:
        (path / name).symlink_to(".")
    part, n = draw.choice(["**", "*", "[", "**/*"]), draw.choice([1, 12, 60, 900])
    pattern = "/".join([part] * n) + draw.choice(["/*.txt", "/**", ""])
    (path / "README.md").write_text(f'---\nconfigs:\n- data_files: "{pattern}"\n---\n')


def saved_set(path: Path, draw: random.Random) -> None:
    """Write a folder as of `save_to_disk`, whose metadata name something else than its files."""
    (path / "train").mkdir(parents=True)
    names = ["../../../etc/hostname", "/etc/hostname", "/dev/zero", "..", "", "x.arrow", *ODD[:-1]]
    name = draw.choice(names)
    (path / "train" / "x.arrow").write_bytes(draw.randbytes(99))
    (path / "train" / "dataset_info.json").write_text("{}")
    state = draw.choice(
        [{"_data_files": [{"filename": name}]}, {"_data_files": [name]}, {"_data_files": name}, {}, [name]]
    )
    (path / "train" / "state.json").write_text(json.dumps(state))
    splits = draw.choice(["train", "train", "train", "..", "../saved", "", 5, None])
    whole = json.dumps({"splits": draw.choice([[splits], [splits], [splits], splits])})
    (path / "dataset_dict.json").write_text(
        draw.choice([whole, whole, whole, "[" * 10**5, '{"splits": ' * 10**4, "{}"])
    )


def many_columns(path: Path, draw: random.Random) -> None:
    names = [f"c{i}" for i in range(draw.choice([10, 100_000]))]
    path.write_text(
        ",".join(draw.choice([names, [*names, "text"], [*names, "c0"]])) + "\n" + "," * (len(names) - 1) + "\n"
    )


def many_values(path: Path, draw: random.Random) -> None:
    """Write a row whose values take far more memory than their text."""
    unit = draw.choice(["[]", "{}", '{"":0}', "1", "[[[]]]"])
    text = '{"text": ["x"' + f",{unit}" * draw.choice([10**4, 10**7]) + "]}"
    path.write_text(draw.choice([text, f"[{text}]", text.replace('"text"', '"x"')]) + "\n")


def many_fields(path: Path, draw: random.Random) -> None:
    """Write a compressed table with a row of many fields, or with messages of many values in one field."""
    n = draw.choice([10**3, 6 * 10**7])
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(draw.choice([b"messages\n", b"text\n", b""]))
        file.write(draw.choice([b"," * n, b'"\n",' * (n // 4), b'"[{""a"":[1' + b",1" * (n // 2) + b']}]"']) + b"\n")


def nested_messages(path: Path, draw: random.Random) -> None:
    messages = '[{"a":' + "[" * draw.choice([9, 900, 5000]) + draw.choice(["", "]" * 5000 + "}]"])
    path.write_text((json.dumps({"messages": messages}) + "\n") * draw.choice([1, 40]))


def task(path: Path, draw: random.Random) -> None:
    """Make a pipe, a device, or a file of a question with many values, long texts or none, in place of a task."""
    kind = draw.choice(["pipe", "device", "values", "nested", "answer", "odd"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        texts = {"values": "[1" + ",1" * 10**7 + "]", "nested": "[" * 10**5, "answer": '"' + "''" * 10**7 + '"'}
        text = texts.get(kind) or json.dumps(draw.choice(ODD[:-1]))
        path.write_text(f'{{"question": "Who sang?", "answer": {text}}}\n')
