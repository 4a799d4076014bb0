"""A compiled library is loaded only if it is whole and no other user could have written it. Here it has one line."""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moonwhale.errors import UserError
from moonwhale.native import build

SOURCE = 'extern "C" { int run_block() { return 7; } int run_product() { return 0; } long *sizes() { return 0; } }'

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="compiled steps are for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the folder of compiled libraries, which is not there yet."""
    sources = tmp_path / "step"
    sources.mkdir()
    (sources / "step.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "g++")
    return tmp_path / "cache" / "native"


def works() -> bool:
    """Open the library as a new process does, and return whether its function returns 7."""
    return build.library.__wrapped__("step").run_block(*[None] * 5) == 7


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_library_is_compiled_once_into_a_private_folder(cache, capsys):
    before = os.umask(0)
    try:
        assert works() and works()
    finally:
        os.umask(before)
    assert capsys.readouterr().err.count("compiling") == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    [folder] = cache.glob("[!.]*")
    assert sorted(path.name for path in folder.iterdir()) == ["step.so", "step.so.sha256"]
    subprocess.run(["sha256sum", "--check", "--status", "step.so.sha256"], cwd=folder, check=True)


def test_a_folder_of_an_earlier_version_becomes_private(cache):
    cache.mkdir(parents=True, mode=0o755)
    assert works()
    assert cache.stat().st_mode & 0o777 == 0o700


DAMAGE = {
    "empty": lambda so: b"",
    "truncated": lambda so: so[: len(so) // 2],
    "a bit": lambda so: so[:50] + bytes([so[50] ^ 1]) + so[51:],
    "other": lambda so: b"#!/bin/sh",
    "absent": None,
}


@pytest.mark.parametrize("file", ["step.so", "step.so.sha256"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_library_is_compiled_again(cache, capsys, file, damage):
    assert works()
    [path] = cache.glob(f"*/{file}")
    content = path.read_bytes()
    path.unlink()  # the old file is mapped
    if damage:
        path.write_bytes(damage(content))
    assert works() and works()
    assert capsys.readouterr().err.count("compiling") == 2


def test_an_empty_folder_or_a_killed_build_is_no_library(cache):
    assert works()
    [folder] = cache.glob("[!.]*")
    shutil.rmtree(folder)
    folder.mkdir()
    (cache / f".{folder.name}.building").mkdir()
    assert works()


def plant(cache: Path, tmp_path: Path) -> Path:
    """Replace the library by one with the right checksum that writes a file when it is loaded. Return its path."""
    assert works()
    [folder] = cache.glob("[!.]*")
    trace = tmp_path / "executed"
    code = f'#include <cstdio>\nstatic FILE *at_load = std::fopen("{trace}", "w");\n'
    (build.SOURCES / "step.cpp").write_text(code + SOURCE)
    shutil.rmtree(folder)
    folder.mkdir()
    build.compile_steps(build.compiler(), build.SOURCES, folder, "step")
    (build.SOURCES / "step.cpp").write_text(SOURCE)
    trace.unlink()
    return trace


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_that_others_can_write_is_refused(cache, tmp_path, mode):
    trace = plant(cache, tmp_path)
    cache.chmod(mode)
    with pytest.raises(UserError, match=r"native could be written by other users: delete it, or set MOONWHALE_CACHE"):
        works()
    assert not trace.exists()
    shutil.rmtree(cache)
    assert works()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(cache, tmp_path):
    trace = plant(cache, tmp_path)
    os.chown(cache, 12345, -1)
    with pytest.raises(UserError, match=r"native belongs to another user: delete it, or set MOONWHALE_CACHE"):
        works()
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_no_folder_is_refused(cache, tmp_path, kind):
    trace = plant(cache, tmp_path)
    cache.rename(tmp_path / "elsewhere")
    if kind == "file":
        cache.touch()
    else:
        cache.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    with pytest.raises(UserError, match=r"native cannot be opened as a folder .*: delete it"):
        works()
    assert not trace.exists() and not (tmp_path / "nowhere").exists()


def test_a_library_is_loaded_from_a_folder_that_cannot_be_written(cache, monkeypatch):
    assert works()
    monkeypatch.setattr(build, "locked", None)  # no lock is taken
    assert works()


def test_a_cache_that_cannot_be_written_is_said_once_and_steps_run_in_pytorch(cache, monkeypatch, capsys):
    cache.parent.touch()
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(build, "unavailable_reason", build.unavailable_reason.__wrapped__)
    build.available.cache_clear()
    try:
        assert not build.supports(torch.zeros(1)) and not build.supports(torch.zeros(1))
    finally:
        build.available.cache_clear()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: decoding runs in PyTorch, which is slower: {cache}") and "MOONWHALE_CACHE" in line


def test_two_processes_compile_once(cache, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", f'echo "$@" >> {log}\nsleep 0.2\nexec g++ "$@"'))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=lambda: sys.exit(not works())) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sum("step.cpp" in line for line in log.read_text().splitlines()) == 1


@pytest.mark.parametrize("command", ["g++ -O1", "  g++ ", "", "ccache g++", "clang++"])
def test_compilers(cache, monkeypatch, command):
    if command and shutil.which(command.split()[0]) is None:
        pytest.skip(f"there is no {command.split()[0]}")
    monkeypatch.setenv("CXX", command)
    assert works()


def test_other_options_or_another_compiler_have_their_own_library(cache, tmp_path, monkeypatch):
    for options, compiler in (("", "g++"), ("-O1", "g++"), ("", "g++ -O1"), ("", script(tmp_path / "cxx", 'g++ "$@"'))):
        monkeypatch.setenv("MOONWHALE_CXXFLAGS", options)
        monkeypatch.setenv("CXX", compiler)
        assert works()
    assert len(list(cache.glob("[!.]*"))) == 4


REFUSED = {
    "is not there": ("none-such", r"^no C\+\+ compiler found named none-such, as CXX says \(install g\+\+\)$"),
    "a quote": ("g++ '", "^CXX or MOONWHALE_CXXFLAGS: No closing quotation$"),
    "fails": ("false", "^false can't compile decoding steps: it printed no error$"),
    "writes nothing": ("true", "^true can't compile decoding steps: it printed no error$"),
    "unknown option": ("g++ -none", r"^g\+\+ can't compile decoding steps: .*error.*-none"),
}


@pytest.mark.parametrize(("command", "message"), REFUSED.values(), ids=REFUSED)
def test_a_compiler_that_does_not_work_says_why(cache, monkeypatch, command, message):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(UserError, match=message):
        works()
    assert not list(cache.glob("[!.]*"))


def test_an_error_in_the_code_is_said(cache):
    (build.SOURCES / "step.cpp").write_text("int broken(")
    with pytest.raises(UserError, match=r"can't compile decoding steps: .*step\.cpp:1"):
        works()


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    assert build.unavailable_reason.__wrapped__("step") == "no C++ compiler found (install g++)"


def test_an_account_without_a_home_is_a_reason(monkeypatch):
    def nowhere(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MOONWHALE_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    assert "set MOONWHALE_CACHE" in build.unavailable_reason.__wrapped__("step")


@pytest.mark.parametrize("asked", ["-###", "step.cpp"])
def test_a_compiler_that_hangs_is_ended_with_all_its_processes(cache, tmp_path, monkeypatch, asked):
    pids = tmp_path / "pids"
    hang = f'case "$*" in *{asked}*) sleep 100 & echo $! > {pids}; wait;; esac\nexec g++ "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", hang))
    monkeypatch.setattr(build, "COMPILER_SECONDS", 1)
    monkeypatch.setattr(build, "QUESTION_SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(UserError, match="cxx has not ended after 1 seconds"):
        works()
    assert time.monotonic() - start < 10
    time.sleep(0.1)
    state = Path(f"/proc/{pids.read_text().strip()}/stat")
    assert not state.exists() or " Z " in state.read_text()


def test_a_library_that_cannot_be_loaded_is_not_kept(cache):
    (build.SOURCES / "step.cpp").write_text(SOURCE + "extern int other_openmp; int *use() { return &other_openmp; }")
    with pytest.raises(UserError, match=r"compiled steps can't be loaded: .*other_openmp"):
        works()
    assert not list(cache.glob("[!.]*"))


def test_a_new_library_does_not_change_one_in_use(cache):
    first = build.library.__wrapped__("step")
    [path] = cache.glob("*/step.so")
    path.write_bytes(path.read_bytes())
    (path.parent / "step.so.sha256").unlink()
    assert works() and first.run_block(*[None] * 5) == 7
    assert isinstance(first, ctypes.CDLL)
