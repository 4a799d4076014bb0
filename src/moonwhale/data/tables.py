"""Reads the rows of tables as they are written: no format's reader guesses a type.

Each reader yields a dict for a row, a BadRow for a row that cannot be parsed, and None for a blank line, so that the
rows of a .jsonl file are numbered as its lines. To add a format, add its reader to TABLES.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self, TextIO

from moonwhale.data.columnar import arrow_rows, parquet_rows
from moonwhale.data.json_rows import json_lines, json_table
from moonwhale.data.opening import MOST_AT_ONCE, opened, read_lines, split_suffix
from moonwhale.data.row_formats import BadRow
from moonwhale.errors import UserError, one_line, shown

Rows = Iterator[dict | BadRow | None]
JSON = {".jsonl", ".ndjson", ".json"}
MAX_CSV_FIELD = MOST_AT_ONCE  # the csv module's own limit of 131,072 characters is shorter than many documents
MOST_FIELDS = 1 << 21  # of a row; a separator counts also in quotes. Names of as many columns take seconds


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
    except (pyarrow.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"`data`: cannot read {path} as {suffix[1:]}: {one_line(error)}") from error


class _LinesOfRow:
    """The lines of a .csv or .tsv file. A row, which may take several lines, has a bounded size."""

    def __init__(self, file: TextIO, path: Path, delimiter: str):
        self.lines, self.path, self.delimiter = read_lines(file, path), path, delimiter
        self.begin_row()

    def begin_row(self) -> None:
        self.characters = self.fields = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.characters += len(line)
        self.fields += line.count(self.delimiter)
        if self.characters > MOST_AT_ONCE or self.fields > MOST_FIELDS:
            limits = f"{MOST_AT_ONCE:,} characters or {MOST_FIELDS:,} fields"
            raise UserError(f"`data`: cannot read {self.path}: a row has more than {limits}: split it")
        return line


def _separated(path: Path, delimiter: str) -> Rows:
    """Reads .csv and .tsv. Every value is text; an empty field is None."""
    csv.field_size_limit(MAX_CSV_FIELD)
    with opened(path) as file:
        # A row with bytes that are not UTF-8 is a bad row: see `read_rows`.
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        lines = _LinesOfRow(text, path, delimiter)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if any("\0" in name for name in names):
            raise UserError(f"`data`: {path} is not UTF-8 text (its header contains zero bytes): convert it first")
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"`data`: {path} has two columns called {min(repeated)}: rename one")
        while True:
            first = reader.line_num + 1
            lines.begin_row()
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
                yield BadRow(
                    f"more or fewer fields than the {len(names)} of the header", f"line {first}: {shown(fields)}"
                )
            else:
                yield {name: field or None for name, field in zip(names, fields, strict=True)} if fields else None


TABLES: dict[str, Callable[[Path, Sequence[str]], Rows]] = {
    ".jsonl": lambda path, columns: json_lines(path),
    ".ndjson": lambda path, columns: json_lines(path),
    ".json": lambda path, columns: json_table(path),
    ".csv": lambda path, columns: _separated(path, ","),
    ".tsv": lambda path, columns: _separated(path, "\t"),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
