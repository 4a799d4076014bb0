"""Files and folders that the user names for a result: they have one owner, and are on the disk when they are named."""

import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from moonwhale.errors import UserError, one_line, printable
from moonwhale.files import new_folder, require_writable

try:
    import fcntl
except ImportError:  # Windows, where moonwhale was never tried: nothing is locked, and folders cannot be synced
    fcntl = None

log = logging.getLogger(__name__)


@contextmanager
def owned(lock: Path, what: str | os.PathLike, option: str) -> Iterator[None]:
    """Context in which no other process owns `what`, the folder or file that the user named with `option`.

    The file `lock`, whose folder is made if it is missing, names the owner and is locked by the operating system. The
    lock ends with the process, even after kill -9, so a file that was left behind is taken over. It belongs to this
    process alone: processes that it forks do not keep it alive, as they would with flock.

    Raises:
        UserError: another process owns it. The message names that process and its host.
    """
    folder_is_new = not lock.parent.exists()
    file = _lock(lock, what, option)
    try:
        yield
    finally:
        if fcntl:  # elsewhere an open file cannot be removed; one that is left behind is taken over
            lock.unlink(missing_ok=True)
        file.close()
        if folder_is_new:
            with suppress(OSError):  # the folder is in use
                lock.parent.rmdir()


def _lock(lock: Path, what: str | os.PathLike, option: str) -> TextIO:
    """Opens `lock` and locks it. Writes this process into it."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _opened(lock, what, option)
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "no locks")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                owner = _owner_in(file) or "another process"
                file.close()
                raise UserError(
                    f"`{option}`: {what} is in use by {owner}: wait until it has ended, or name another"
                ) from None
            log.warning("`%s`: the file system of %s has no locks: let no other process write there", option, what)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        file.close()  # its owner removed it after it was opened here
    host = socket.gethostname()
    before = _owner_in(file)
    if before and f" on {host} since " not in before:
        log.warning("`%s`: %s is taken over from %s, which no longer locks it", option, what, before)
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {host} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
    file.flush()
    return file


def _opened(lock: Path, what: str | os.PathLike, option: str) -> TextIO:
    """Opens the file `lock`, which is made if it is missing. Anything may be in its place, such as a pipe."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(lock, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO):
            raise
        reason = error.strerror
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
        os.close(descriptor)
        reason = "it is no plain file"
    raise UserError(f"`{option}`: cannot lock {what} by {lock}: {reason}: remove it, or name another")


def _owner_in(file: TextIO) -> str:
    """What a lock file says about its owner. Anything may be in it."""
    return one_line(printable(file.read(1000)))


@contextmanager
def new_file(path: Path, option: str) -> Iterator[None]:
    """Context in which this process alone may write the new file `path`, which the user named with `option`.

    Raises:
        UserError: it exists already, its folder cannot be written, or another process is going to write it.
    """
    require_writable(path.parent, option)
    with owned(path.with_name(f".{path.name}.lock"), path, option):
        if os.path.lexists(path):
            raise UserError(f"`{option}`: {path} already exists: name a new file")
        yield


@contextmanager
def new_named_folder(name: str, option: str) -> Iterator[Path]:
    """Context that yields an empty folder, which becomes the folder that the user named with `option` at the end.

    That folder must be absent or empty. No other process can write it meanwhile. A process that is killed leaves it as
    it was.

    Raises:
        UserError: it cannot be written, it holds something, or another process is going to write it.
    """
    final = Path(name).expanduser().absolute()
    require_writable(final, option)
    require_writable(final.parent, option)
    with owned(final.with_name(f".{final.name}.lock"), name, option):
        if final.exists() and any(final.iterdir()):
            raise UserError(f"`{option}`: {name} is not an empty folder: name a new one; nothing is overwritten")
        with new_folder(final) as building:
            yield building
            sync(building)
            if final.exists():
                final.rmdir()  # fails if it has been filled meanwhile
        sync_names(final.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        sync(inner)
    sync_names(path)


def sync_names(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    if fcntl is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(descriptor)
