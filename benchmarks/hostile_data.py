"""Writers of hostile tables and data sets. Each draws from a seeded generator."""

import json
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
