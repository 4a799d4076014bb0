"""Reads rows from JSON: one object per line, an array of objects, or an object that wraps such an array."""

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from moonwhale.data.opening import MOST_AT_ONCE, opened, read_lines, read_whole
from moonwhale.data.row_formats import BadRow, columns_of
from moonwhale.errors import UserError
from moonwhale.files import has_many_values, parse_json

WRAPPERS = ("data", "train", "rows", "examples", "instances")  # {"data": [...]}
CHUNK_CHARACTERS = 1 << 20  # an array is parsed in chunks, so that it need not fit into memory
NOT_AN_OBJECT = "a row that is no JSON object"


def json_lines(path: Path) -> Iterator[dict | BadRow | None]:
    """Yields an object for each line. A file that begins with a bracket is read as an array."""
    if _first_lines(path)[0].startswith(b"["):
        yield from _array(path)
        return
    with opened(path) as file:
        # Bytes end lines at \n only: str.splitlines would also cut at U+2028, which JSON allows inside a string.
        for number, line in enumerate(read_lines(file, path)):
            yield _parse(line.removeprefix(codecs.BOM_UTF8) if number == 0 else line)


def json_table(path: Path) -> Iterator[dict | BadRow | None] | None:
    """Returns the rows of a .json file, or None if it holds neither rows nor an object that is one."""
    first, second = _first_lines(path)
    if first.startswith(b"["):
        return _array(path)
    if second.startswith(b"{") and (isinstance(_parse(first), dict) or isinstance(_parse(second), dict)):
        return json_lines(path)
    with opened(path) as file:
        try:
            whole = parse_json(read_whole(file, path).decode("utf-8-sig"))
        except UserError:
            raise
        except (ValueError, RecursionError):
            return None
    if not isinstance(whole, dict):
        return None
    if columns_of(whole):
        return iter([whole])
    lists = [whole[name] for name in WRAPPERS if isinstance(whole.get(name), list)]
    return map(_as_row, lists[0]) if lists and all(isinstance(row, dict) for row in lists[0][:1]) else None


def _first_lines(path: Path) -> tuple[bytes, bytes]:
    """Returns the first two lines that are not blank, b"" for those that do not exist."""
    with opened(path) as file:
        beginning = file.read(2)
        if beginning in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"`data`: {path} is UTF-16, not UTF-8 text: convert it first")
        lines = (line.strip() for line in io.BytesIO(beginning + next(read_lines(file, path), b"")))
        found = [line.removeprefix(codecs.BOM_UTF8).strip() for line in lines if line]
        for line in read_lines(file, path):
            if len(found) >= 2:
                break
            found += [line.strip()] if line.strip() else []
    return tuple((*found, b"", b"")[:2])


def _parse(line: bytes) -> dict | BadRow | None:
    if not line.strip():
        return None
    try:
        # Bytes that are not UTF-8 become half surrogates, which `read_rows` finds in the columns that it reads.
        return _as_row(parse_json(line.strip().decode("utf-8", "surrogateescape")))
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"{getattr(error, 'msg', error)}{where}"
        return BadRow("a line that is not JSON", f"{reason}: {line[:40].decode('utf-8', 'replace')}")


def _as_row(value: object) -> dict | BadRow:
    return value if isinstance(value, dict) else BadRow(NOT_AN_OBJECT, value)


def _array(path: Path) -> Iterator[dict | BadRow]:
    """Yields the elements of an array. Raises UserError where it is not JSON, or if more follows its end."""
    decoder, n_rows = json.JSONDecoder(), 0
    with opened(path) as file:
        stream = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
        text = stream.read(CHUNK_CHARACTERS)
        at = text.find("[") + 1
        expect = "first"  # then "comma", "value"
        while True:
            while at < len(text) and text[at].isspace():
                at += 1
            character = text[at : at + 1]
            if character == "]" and expect != "value":
                _check_end(itertools.chain([text[at + 1 :]], iter(lambda: stream.read(CHUNK_CHARACTERS), "")), path)
                return
            if character == "," and expect == "comma":
                at, expect = at + 1, "value"
                continue
            try:
                if not character or expect == "comma":
                    raise ValueError("a comma or ] is missing" if character else "the array is not closed")
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                # The element may continue in the next chunk. Doubling the chunk keeps long elements linear.
                chunk = "" if character and expect == "comma" else stream.read(max(CHUNK_CHARACTERS, len(text) - at))
                if not chunk:
                    reason = getattr(error, "msg", error)
                    raise UserError(
                        f"`data`: {path} is not JSON after row {n_rows:,} of its array: {reason}"
                    ) from error
                text, at = text[at:] + chunk, 0
                _check_element(text, n_rows + 1, path)
                continue
            n_rows, expect = n_rows + 1, "comma"
            yield _as_row(value)


def _check_end(rest: Iterable[str], path: Path) -> None:
    """Raises UserError if anything but blanks follows the end of an array."""
    if any(part.strip() for part in rest):
        raise UserError(f"`data`: {path} has more after the end of its array: write one object per line, or one array")


def _check_element(text: str, row: int, path: Path) -> None:
    """Raises UserError if `text`, the beginning of an array's element, is longer than an element may be."""
    if len(text) > MOST_AT_ONCE:
        raise UserError(f"`data`: cannot read {path}: row {row:,} has more than {MOST_AT_ONCE:,} characters")
    if has_many_values(text):
        raise UserError(f"`data`: cannot read {path}: row {row:,} has too many values")
