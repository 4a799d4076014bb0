"""Where built things live, and how a folder appears there all at once or not at all."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from moonwhale.errors import UserError


def cache_folder(override: str | Path | None = None) -> Path:
    """`override`, else $MOONWHALE_CACHE, else ~/.cache/moonwhale."""
    return Path(override or os.environ.get("MOONWHALE_CACHE") or "~/.cache/moonwhale").expanduser()


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time looks at or builds `folder`; the lock dies with its owner, even under kill -9.

    Raises UserError when the place cannot be written.
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
    """Yields an empty folder that takes the name `final` (replacing an old one) only if the block succeeds.

    Hold `locked(final)` around it: what a killed build left behind is cleared away on the next entry, which is safe
    only while nobody else builds. Raises UserError when the disk is full or the place cannot be written.
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


def _cannot_write(folder: Path, error: OSError) -> UserError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
    return UserError(f"cannot write in {folder}: {reason} (free some space; `cache` moves what is built from data)")
