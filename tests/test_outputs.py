"""A folder or file that is written has one owner, which the operating system knows."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from moonwhale.errors import UserError
from moonwhale.files import new_folder
from moonwhale.outputs import new_file, new_named_folder, owned, sync


def attempt(lock: Path) -> str:
    try:
        with owned(lock, lock.parent, "out"):
            return "owned"
    except UserError as error:
        return str(error)


def elsewhere(function, *args):
    """Calls a function in a forked process."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def test_one_owner(tmp_path):
    lock = tmp_path / "run" / ".lock"
    with owned(lock, lock.parent, "out"):
        host = os.uname().nodename
        said = elsewhere(attempt, lock)
        assert said.startswith(f"`out`: {lock.parent} is in use by process {os.getpid()} on {host} since 20")
        assert said.endswith(": wait until it has ended, or name another") and "\n" not in said
    assert elsewhere(attempt, lock) == "owned"
    assert not lock.parent.exists()  # nothing was put into the folder


def without_posix(folder: Path) -> str:
    """Uses moonwhale, in a process of its own, where the system lacks what Windows lacks."""
    for name in [name for name in sys.modules if name.startswith("moonwhale")]:
        del sys.modules[name]
    sys.modules["fcntl"] = None
    for name in ("SIGHUP", "SIGALRM"):
        delattr(signal, name)
    for name in ("register_at_fork", "O_NOFOLLOW"):
        delattr(os, name)
    from moonwhale import outputs
    from moonwhale.data.worker_process import WorkerProcess

    for _ in range(2):  # the file that is left behind is taken over
        with outputs.owned(folder / ".lock", folder, "out"):
            outputs.sync(folder)
    with outputs.new_named_folder(str(folder / "new"), "out") as new:
        (new / "file").touch()
    try:
        WorkerProcess("moonwhale.data.answers", 1).ask("2")
    except Exception as error:
        return str(error)


def test_a_system_without_locks_forks_and_alarms(tmp_path):
    said = elsewhere(without_posix, tmp_path)
    assert (tmp_path / "new" / "file").exists()
    assert said.endswith("cannot bound the time of templates, tokenizers and answers: use Linux or macOS")


def hold_for_good(lock: Path, child: bool, started):
    with owned(lock, lock.parent, "out"):
        pid = os.fork() if child else 0  # such as a DataLoader's worker
        if child and not pid:
            signal.pause()
        started.send(pid)
        signal.pause()


@pytest.mark.parametrize("child", [False, True])
def test_a_killed_owner_leaves_a_file_that_holds_nothing(tmp_path, child):
    lock, fork = tmp_path / ".lock", multiprocessing.get_context("fork")
    started, there = fork.Pipe()
    owner = fork.Process(target=hold_for_good, args=(lock, child, there))
    owner.start()
    pid = started.recv()
    try:
        assert f"process {owner.pid} on " in attempt(lock)
        owner.kill()
        owner.join()
        assert lock.exists() and attempt(lock) == "owned"
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (b"process 1 on elsewhere since 2001-01-01 00:00:00 UTC\n", "is taken over from process 1 on elsewhere since"),
        (b"\xff\x00\x1b[31m" + b"x" * 10_000, "is taken over from "),
        (b"", None),
        (f"process 1 on {os.uname().nodename} since 2001-01-01".encode(), None),
    ],
)
def test_whatever_a_lock_file_says_it_is_taken_over(tmp_path, caplog, left, said):
    (tmp_path / ".lock").write_bytes(left)
    assert attempt(tmp_path / ".lock") == "owned"
    assert [record.getMessage() for record in caplog.records if said is None or said not in record.getMessage()] == []
    assert len(caplog.records) == (said is not None)
    assert all(record.getMessage().isprintable() and len(record.getMessage()) < 500 for record in caplog.records)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("make", [Path.mkdir, lambda lock: lock.symlink_to("/etc/passwd"), os.mkfifo, bind])
def test_a_lock_that_is_no_file_is_one_line(tmp_path, make):
    make(tmp_path / ".lock")
    said = attempt(tmp_path / ".lock")
    assert said.startswith(f"`out`: cannot lock {tmp_path} by {tmp_path}/.lock: ") and said.endswith("or name another")


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert attempt(tmp_path / ".lock") == "owned"
    assert "has no locks: let no other process write there" in caplog.text


def test_folders_that_cannot_be_synced_are_written_all_the_same(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)


def test_a_new_file_and_a_new_folder_have_one_writer(tmp_path):
    def write_file(path):
        with new_file(path, "json"):
            path.write_text("x")

    def write_folder(path):
        with new_named_folder(str(path), "out") as folder:
            (folder / "x").write_text("x")

    for write, option in ((write_file, "json"), (write_folder, "out")):
        path = tmp_path / option
        with owned(path.with_name(f".{option}.lock"), path, option):
            pass
        write(path)
        with pytest.raises(UserError, match=rf"^`{option}`: .*(already exists|is not an empty folder): name a new"):
            write(path)
    assert sorted(os.listdir(tmp_path)) == ["json", "out"]


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="cannot write in"), new_named_folder(str(tmp_path / "out"), "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("dear")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_a_full_disk_is_named_without_a_home_folder(tmp_path, monkeypatch):
    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MOONWHALE_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", expanduser)
    said = r"^cannot write in .*: the disk is full \(free some space\)$"
    with pytest.raises(UserError, match=said), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
