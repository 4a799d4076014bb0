"""Reads the rows of tables as they are written: no format's reader guesses a type.

Each reader yields a dict for a row, a BadRow for a row that cannot be parsed, and None for a blank line, so that the
rows of a .jsonl file are numbered as its lines. To add a format, add its reader to TABLES.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from moonwhale.data.json_rows import json_lines, json_table
from moonwhale.data.opening import MOST_AT_ONCE, opened, read_lines, read_whole, split_suffix
from moonwhale.data.row_formats import KNOWN_COLUMNS, BadRow
from moonwhale.errors import UserError, one_line

Rows = Iterator[dict | BadRow | None]
JSON = {".jsonl", ".ndjson", ".json"}
ROWS_PER_BATCH = 256  # rows of a columnar file that are decoded at once
MOST_OF_TABLE = 1 << 30  # bytes of a compressed Parquet or Arrow file
MAX_CSV_FIELD = MOST_AT_ONCE  # the csv module's own limit of 131,072 characters is shorter than many documents


def table_suffix(path: Path) -> str | None:
    """Returns the suffix of a table, compressed or not; None for a text file."""
    suffix = split_suffix(path)[0]
    return suffix if suffix in TABLES else None


def table_rows(path: Path, columns: Sequence[str]) -> Rows | None:
    """Returns the rows of a table, or None for a .json file that is no table.

    Columnar files read only `columns`, or by default KNOWN_COLUMNS. Raises UserError, on iteration too, if the file
    cannot be read.
    """
    suffix = table_suffix(path)
    return _complete(path, suffix, TABLES[suffix](path, columns)) if suffix != ".json" else json_table(path)


def _complete(path: Path, suffix: str, rows: Rows) -> Rows:
    """Names the file in the errors of the parsers."""
    import pyarrow

    try:
        yield from rows
    except (pyarrow.ArrowException, csv.Error) as error:
        raise UserError(f"`data`: cannot read {path} as {suffix[1:]}: {one_line(error)}") from error


def _separated(path: Path, delimiter: str) -> Rows:
    """Reads .csv and .tsv. Every value is text; an empty field is None."""
    csv.field_size_limit(MAX_CSV_FIELD)
    with opened(path) as file:
        # A row with bytes that are not UTF-8 is a bad row: see `read_rows`.
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(read_lines(text, path), delimiter=delimiter, strict=True)
        names = next(reader, [])
        if any("\0" in name for name in names):
            raise UserError(f"`data`: {path} is not UTF-8 text (its header contains zero bytes): convert it first")
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(f"`data`: {path} has two columns called {min(repeated)}: rename one")
        while True:
            first = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise UserError(f"`data`: {path}: the quote in the row of line {first} is never closed") from error
                yield BadRow("a quote in the wrong place", f"line {first}: {error}")
                continue
            if fields is None:
                return
            if fields and len(fields) != len(names):
                yield BadRow(f"more or fewer fields than the {len(names)} of the header", f"line {first}: {fields}")
            else:
                yield {name: field or None for name, field in zip(names, fields, strict=True)} if fields else None


def _parquet(path: Path, columns: Sequence[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    with opened(path) as file:
        table = pyarrow.parquet.ParquetFile(_in_parts(file, path))
        names = _chosen(table.schema_arrow.names, columns)
        for batch in table.iter_batches(ROWS_PER_BATCH, columns=names):
            yield from batch.to_pylist()


def _in_parts(file: BinaryIO, path: Path):
    """Returns an opened file as one to read in parts, at any place. A compressed file has to be read whole."""
    import pyarrow

    if split_suffix(path)[1]:
        return pyarrow.BufferReader(read_whole(file, path, MOST_OF_TABLE))
    return pyarrow.memory_map(str(path))


def _arrow(path: Path, columns: Sequence[str]) -> Rows:
    """Reads Arrow's stream format, which `datasets` writes, and its file format."""
    import pyarrow

    with opened(path) as file:
        source = _in_parts(file, path)
        if bytes(source.read(6)) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = reader = pyarrow.ipc.open_stream(source)
        names = _chosen(reader.schema.names, columns)
        for batch in batches:
            chosen = batch.select(names)
            for start in range(0, len(chosen), ROWS_PER_BATCH):
                yield from chosen.slice(start, ROWS_PER_BATCH).to_pylist()


def _chosen(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Returns the columns to decode, or all if none is known, so that the error can list them."""
    wanted = set(columns or KNOWN_COLUMNS)
    return [name for name in names if name in wanted] if wanted & set(names) else list(names)


TABLES: dict[str, Callable[[Path, Sequence[str]], Rows]] = {
    ".jsonl": lambda path, columns: json_lines(path),
    ".ndjson": lambda path, columns: json_lines(path),
    ".json": lambda path, columns: json_table(path),
    ".csv": lambda path, columns: _separated(path, ","),
    ".tsv": lambda path, columns: _separated(path, "\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
