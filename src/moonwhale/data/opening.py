"""Opens files, compressed or not, and names what is wrong with those that cannot be read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moonwhale.errors import UserError, one_line


def _open_zstd(path: Path, mode: str) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstd}


def split_suffix(path: Path) -> tuple[str, str]:
    """Returns the suffix of the content and that of the compression, both in lower case: (".jsonl", ".gz")."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in OPENERS else (last, "")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to read its bytes, decompressed. Raises UserError if that fails, also while the file is read."""
    try:
        with OPENERS.get(split_suffix(path)[1], open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"`data`: cannot read {path}: {one_line(error)}") from error
