"""Opens files, compressed or not, and names what is wrong with those that cannot be read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from moonwhale.errors import UserError, one_line
from moonwhale.files import require_plain


def _open_zstd(path: Path, mode: str) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstd}
MOST_AT_ONCE = 1 << 28  # bytes of a row, or of a text in a compressed file, that are held in memory
GROWTH, ROOM = 100, 1 << 26  # a compressed file has at most GROWTH times its size, plus ROOM bytes


def split_suffix(path: Path) -> tuple[str, str]:
    """Returns the suffix of the content and that of the compression, both in lower case: (".jsonl", ".gz")."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in OPENERS else (last, "")


class _Expanding(io.RawIOBase):
    """A decompressed file that may grow to GROWTH times its size: a bomb of zeros grows to a thousand times."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.left = file, path, ROOM + GROWTH * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self.file.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"`data`: {self.path} expands to more than {GROWTH} times its size: decompress it first")
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a plain file, decompressed, to read its bytes. Raises UserError if that fails, also while it is read."""
    compressed = split_suffix(path)[1]
    try:
        require_plain(path)
    except UserError as error:
        raise UserError(f"`data`: {error}") from error
    try:
        with OPENERS.get(compressed, open)(path, "rb") as file:
            yield io.BufferedReader(_Expanding(file, path), 1 << 18) if compressed else file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"`data`: cannot read {path}: {one_line(error)}") from error


def read_whole(file: BinaryIO | TextIO, path: Path, most: int = MOST_AT_ONCE) -> bytes | str:
    """Returns the rest of an opened file. Raises UserError if it is longer than `most`."""
    content = file.read(most + 1)
    return _bounded(content, path, "it holds one text of", most)


def read_lines(file: BinaryIO | TextIO, path: Path) -> Iterator[bytes | str]:
    """Yields the lines of an opened file, as iterating over it does. Raises UserError for one that is too long."""
    while line := file.readline(MOST_AT_ONCE + 1):
        yield _bounded(line, path, "a line has", MOST_AT_ONCE)


def _bounded(content: bytes | str, path: Path, what: str, most: int) -> bytes | str:
    if len(content) > most:
        raise UserError(f"`data`: cannot read {path}: {what} more than {most:,} bytes: split it")
    return content
