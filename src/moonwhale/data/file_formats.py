"""Reads text files and tables: one document for a text file, one for each row of a table.

To add a format of tables, add its suffix to TABLES. To add a compression, add its suffix to OPENERS. Any other format
needs a branch in `read_files`. Raise FORMAT in shards.py if files that were read before are now read differently, and
name the format in docs/data.md.
"""

import gzip
import logging
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

from moonwhale.data.row_formats import read_rows
from moonwhale.data.source import Document, SkippedRow
from moonwhale.errors import UserError, one_line

log = logging.getLogger(__name__)

TABLES = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # suffix -> loader of the `datasets` library
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


class NotTextError(UserError):
    """A file is not UTF-8 text."""


def read_files(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[Document | SkippedRow]:
    """Yields the documents of all files in order; `columns` are those of the tables among them.

    If there are several files, those that are not text are skipped with a warning. Raises UserError for a file that
    cannot be read, and for a single file that is not text.
    """
    skipped = []
    for path in paths:
        if loader := table_loader(path):
            yield from _read_table(path, loader, columns)
            continue
        try:
            yield _read_text(path)
        except NotTextError:
            if len(paths) == 1:
                raise
            skipped.append(path)  # a folder of text may well hold pictures too
    if skipped:
        log.warning("`data`: skipped %d files that are not UTF-8 text, such as %s", len(skipped), skipped[0])


def table_loader(path: Path) -> str | None:
    """Returns the name of the `datasets` loader for a table, compressed or not; None for a text file."""
    return TABLES.get(Path(path.stem).suffix if path.suffix in OPENERS else path.suffix)


def _read_text(path: Path) -> str:
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"`data`: cannot read {path}: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"`data`: {path} is not UTF-8 text (see byte {error.start}): convert it first") from error
    if "\0" in text:
        raise NotTextError(f"`data`: {path} is not text but binary data (it contains zero bytes)")
    return text


def _read_table(path: Path, loader: str, columns: Sequence[str]) -> Iterator[Document | SkippedRow]:
    import datasets

    if not path.stat().st_size:
        return
    try:
        # Without streaming, `datasets` would keep a second copy in its cache.
        rows = datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True)
        yield from read_rows(rows, str(path), columns)
    except UserError:
        raise
    except Exception as error:  # the parser of each format has its own exceptions
        raise UserError(f"`data`: cannot read {path} as {loader}: {one_line(error)}") from error
