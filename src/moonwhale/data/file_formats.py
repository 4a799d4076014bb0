"""Reads text files and tables: one document for a text file, one for each row of a table.

tables.py lists the formats of tables, opening.py the compressions. Raise READER if tables that were read before are now
read differently, and FORMAT in shards.py if text files are; name a new format in docs/data.md.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from moonwhale.data.opening import opened, read_whole, split_suffix
from moonwhale.data.row_formats import columns_of, read_rows
from moonwhale.data.source import Document, SkippedRow, warn_once
from moonwhale.data.tables import JSON, table_rows, table_suffix
from moonwhale.errors import UserError

READER = 2  # part of the fingerprint of everything but plain text
PLAIN_COMPRESSIONS = {"", ".gz", ".xz"}


class NotTextError(UserError):
    """A file is not UTF-8 text."""


def read_files(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[Document | SkippedRow]:
    """Yields the documents of all files in order; `columns` are those of the tables among them.

    If there are several files, those that are not text are skipped with a warning. Raises UserError for a file that
    cannot be read, and for a single file that is not text.
    """
    skipped = []
    for path in paths:
        rows = table_rows(path, columns) if table_suffix(path) and path.stat().st_size else None
        if rows is not None and table_suffix(path) == ".json" and len(paths) > 1:
            rows = _rows_or_none(rows, columns)
        if rows is not None:
            yield from read_rows(rows, str(path), columns, sparse=table_suffix(path) in JSON)
            continue
        try:
            yield _read_text(path)
        except NotTextError:
            if len(paths) == 1:
                raise
            skipped.append(path)  # a folder of text may well hold pictures too
    if skipped:
        warn_once(f"`data`: skipped {len(skipped)} files that are not UTF-8 text, such as {skipped[0]}")


def is_plain(path: Path) -> bool:
    """Whether a file is read as it was before READER: as text, so that tokens made then are still valid."""
    compression = split_suffix(path)[1]
    return not table_suffix(path) and compression in PLAIN_COMPRESSIONS and path.suffix.lower() == path.suffix


def _rows_or_none(rows: Iterator, columns: Sequence[str]) -> Iterator | None:
    """Returns `rows`, or None if the first has none of the columns: a .json file in a folder may be settings."""
    first = next(rows, None)
    readable = isinstance(first, dict) and (any(column in first for column in columns) or columns_of(first))
    return itertools.chain([first], rows) if readable else None


def _read_text(path: Path) -> str:
    with opened(path) as file:
        data = read_whole(file, path) if split_suffix(path)[1] else file.read()  # a plain file's size is no surprise
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"`data`: {path} is not UTF-8 text (see byte {error.start}): convert it first") from error
    if "\0" in text:
        raise NotTextError(f"`data`: {path} is not text but binary data (it contains zero bytes)")
    return text
