"""The cache folder, folders that are built completely or not at all, and small files from elsewhere."""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from moonwhale.errors import UserError, one_line, shown

JSON_BYTES = 1 << 24  # parsed, JSON takes up to thirty times its size
JSON_VALUES = 1 << 22  # each takes up to 240 bytes


def cache_folder(override: str | Path | None = None) -> Path:
    """Returns `override` if given, else $MOONWHALE_CACHE, else ~/.cache/moonwhale. Raises UserError without a home."""
    try:
        return Path(override or os.environ.get("MOONWHALE_CACHE") or "~/.cache/moonwhale").expanduser()
    except RuntimeError as error:  # an account without a folder, as some containers run with
        raise UserError(f"there is no home folder for the cache ({error}): set MOONWHALE_CACHE") from error


def expanded(path: str | None) -> str | None:
    """Returns a path with its `~` expanded, which no shell does within `--out=~/runs` or a YAML file."""
    return path and os.path.expanduser(path)


def cache_key(*parts: object) -> str:
    """Returns the name in the cache for what is built from `parts`."""
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]


def checksum(path: Path) -> str:
    """Returns the SHA-256 sum of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_plain(path: Path) -> None:
    """Raises UserError for a path that is no plain file: opening a pipe would block."""
    if not path.is_file():
        reason = "it is no plain file" if os.path.lexists(path) else "No such file or directory"
        raise UserError(f"cannot read {path}: {reason}")


def read_text(path: Path, most: int) -> str:
    """Returns the text of a plain file of at most `most` bytes.

    Raises:
        UserError: it is a pipe, device or folder, is too large, cannot be read, or is not UTF-8.
    """
    try:
        require_plain(path)
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise UserError(f"cannot read {path}: it is larger than {most:,} bytes")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text (at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def parse_json(text: str, most_values: int | None = None, **options) -> object:
    """Parses JSON as `json.loads` does, unless it holds so many values that they might fill the memory.

    Raises:
        ValueError: it is no JSON, or `has_many_values`.
    """
    if has_many_values(text, most_values):
        raise ValueError(f"it has more than {most_values or JSON_VALUES:,} values")
    return json.loads(text, **options)


def has_many_values(text: str, most_values: int | None = None) -> bool:
    """Whether a text in JSON has more commas and opening brackets, one for each value, than `most_values`."""
    most = most_values or JSON_VALUES
    return len(text) > most and sum(map(text.count, ",[{")) > most


def read_json(path: Path, most: int = JSON_BYTES, most_values: int | None = None) -> dict:
    """Returns the JSON object in a file of at most `most` bytes and `most_values` values (JSON_VALUES).

    Raises:
        UserError: as `read_text` and `parse_json`; or the file holds no JSON object, or one with the same key twice.
    """
    hint = "save or copy it again"
    try:
        values = parse_json(read_text(path, most), most_values, object_pairs_hook=_unique)
    except UserError as error:
        raise UserError(f"{error}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; {hint}") from error
    if not isinstance(values, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object; {hint}")
    return values


def _unique(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(key)} occurs twice")
    return values


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which this process alone reads or builds `folder`. Others wait for it.

    The operating system releases the lock when the process ends, even after kill -9.

    Raises:
        UserError: the parent folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise _cannot_write(folder.parent, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Context that yields an empty folder. When the block succeeds, the folder replaces `final`, or becomes it.

    Hold `locked(final)` around it: the next entry removes what a killed build left behind, which is safe only while no
    other process builds.

    Raises:
        UserError: the disk is full, or the parent folder cannot be written.
    """
    building = final.with_name(f".{final.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        yield building
        if final.exists():
            shutil.rmtree(final)
        os.replace(building, final)
    except OSError as error:
        raise _cannot_write(final.parent, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def require_writable(folder: Path, option: str) -> None:
    """Raises UserError, naming `option`, if no file can be written in `folder`, which need not exist yet."""
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    if not os.path.isdir(existing):
        raise UserError(f"`{option}`: {existing} is a file: name a folder")
    if not os.access(existing, os.W_OK | os.X_OK | (os.R_OK if existing == absolute else 0)):
        raise UserError(f"`{option}`: {existing} is not yours to write in: give yourself the right, or name another")


def _cannot_write(folder: Path, error: OSError) -> UserError:
    full = error.errno == errno.ENOSPC
    reason = "the disk is full" if full else error.strerror or str(error)
    hints = ["free some space"] if full else []
    with suppress(UserError):  # without a home folder there may be no cache to move
        hints += ["MOONWHALE_CACHE moves the cache"] if folder.is_relative_to(cache_folder()) else []
    return UserError(f"cannot write in {folder}: {reason}" + (f" ({'; '.join(hints)})" if hints else ""))


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a file atomically: under another name first, then, when it is on the disk, renamed."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
