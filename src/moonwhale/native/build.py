"""The compiled steps as two libraries, for decoding and for training: the files `step/NAME.cpp` are compiled once for
this machine and kept in the cache folder.

What is in that folder runs in this process, so nothing is loaded that another user could have written, or whose
checksum is wrong. docs/reliability.md lists what is checked.

Environment variables:
    CXX: the compiler, and options for it (`ccache g++`). The default is `c++`.
    MOONWHALE_CXXFLAGS: compiler options that follow ours, such as `-march=haswell` for AVX2 without AVX-512.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from moonwhale.errors import UserError, one_line
from moonwhale.files import cache_folder, checksum, locked, new_folder
from moonwhale.native.structures import DTYPE_CODES, INTEGER, POINTER, REAL, SOURCES

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wno-psabi"]
FLAGS += ["-mcpu=native" if platform.machine() == "aarch64" else "-march=native"]
TABLE = [INTEGER] * 4  # rows, columns, dtype, threads
ARGUMENTS = {  # of the functions in each library
    "step": {"run_block": [POINTER] * 5, "run_product": [POINTER, POINTER, POINTER, INTEGER, INTEGER]},
    "training": {
        "run_norm": [*[POINTER] * 3, INTEGER, POINTER, INTEGER, INTEGER, REAL, INTEGER, INTEGER],
        "run_norm_backward": [*[POINTER] * 3, INTEGER, POINTER, INTEGER, POINTER, POINTER, *TABLE],
        "run_score": [*[POINTER] * 5, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER],
        "run_gate": [*[POINTER] * 3, INTEGER, POINTER, *TABLE],
        "run_gate_backward": [POINTER, POINTER, INTEGER, *[POINTER] * 5, INTEGER, POINTER, *TABLE],
        "run_softmax": [*[POINTER] * 6, *[INTEGER] * 6],
        "run_score_gradient": [POINTER, POINTER, POINTER, REAL, *TABLE],
        "run_nesterov": [POINTER, POINTER, POINTER, REAL, INTEGER, INTEGER],
        "run_descend": [POINTER, POINTER, REAL, REAL, INTEGER, INTEGER, INTEGER],
        "run_routed": [*[POINTER] * 6, INTEGER],
        "run_routed_backward": [*[POINTER] * 10, INTEGER],
        "run_rotate": [*[POINTER] * 5, *[INTEGER] * 8],
        "run_route": [*[POINTER] * 4, INTEGER, *[POINTER] * 3, INTEGER, INTEGER],
        "run_route_backward": [*[POINTER] * 7, INTEGER, POINTER, POINTER, INTEGER, INTEGER],
        "run_balance": [*[POINTER] * 4, *[INTEGER] * 5],
        "run_balance_backward": [*[POINTER] * 4, *[INTEGER] * 4],
        "run_line_up": [POINTER, INTEGER, *[POINTER] * 3, *[INTEGER] * 4],
        "run_newton_schulz": [POINTER, POINTER, *[INTEGER] * 5],
        "has_units": [],
    },
}
PURPOSES = {"step": "decoding", "training": "training"}  # of each library, for people
COMPILER_SECONDS, QUESTION_SECONDS = 300, 30  # a compiler that takes longer is ended


def supports(weight: Tensor) -> bool:
    """Return whether compiled decoding steps are available here for such weights."""
    return weight.device.type == "cpu" and weight.dtype in DTYPE_CODES and available("step")


@functools.cache
def available(name: str) -> bool:
    """Return whether steps can be compiled here. On Linux, where they should be, the first call prints why not."""
    reason = unavailable_reason(name)
    if reason and sys.platform == "linux":
        print(f"note: {PURPOSES[name]} runs in PyTorch, which is slower: {reason}", file=sys.stderr)
    return not reason


@functools.cache
def unavailable_reason(name: str) -> str:
    """Say why steps cannot be compiled here, or return an empty string. The first call compiles them."""
    try:
        library(name)
        return ""
    except UserError as error:
        return str(error)


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Load the compiled steps of `name`.cpp from the cache folder, or compile them first, which takes some seconds.

    Raises:
        UserError: this system is not Linux, there is no compiler, it fails, its output cannot be stored or loaded, or
            another user could write to the folder.
    """
    if sys.platform != "linux":
        raise UserError("compiled steps are for Linux")
    command = compiler()
    # With -### the compiler prints its version and what `native` means on this machine.
    machine = _output_of([*command, "-E", "-###", "-x", "c++", os.devnull], QUESTION_SECONDS)[1]
    parts = [name, machine, shlex.join(command), *(path.read_text("utf-8") for path in sorted(SOURCES.iterdir()))]
    folder = cache_folder() / "native" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    with suppress(OSError):  # `locked` says what is wrong
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (loaded := load_intact(folder, name)) is None:
        with locked(folder):
            if (loaded := load_intact(folder, name)) is None:  # another process may have compiled meanwhile
                print(f"compiling {PURPOSES[name]} steps for this machine, once", file=sys.stderr)
                with new_folder(folder) as building:
                    compile_steps(command, SOURCES, building, name)
                loaded = load_intact(folder, name)
    if loaded is None:
        raise UserError(f"{folder} was replaced or damaged while steps were compiled: try again")
    return loaded


def compiler() -> list[str]:
    """Return the compiler and its options. Raises UserError if it is not there."""
    try:
        command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        more = shlex.split(os.environ.get("MOONWHALE_CXXFLAGS", ""))
    except ValueError as error:
        raise UserError(f"CXX or MOONWHALE_CXXFLAGS: {error}") from error
    if shutil.which(command[0]) is None:
        named = f" named {command[0]}, as CXX says" if os.environ.get("CXX") else ""
        raise UserError(f"no C++ compiler found{named} (install g++)")
    return [*command, *FLAGS, *more]


def compile_steps(command: list[str], sources: Path, folder: Path, name: str) -> None:
    """Compile `name`.cpp of `sources` into a library in `folder`, which becomes loadable.

    `command` is the compiler and its options.

    Raises:
        UserError: with the compiler's first error, or because its library cannot be loaded.
    """
    object_file, library_file = str(folder / f"{name}.o"), str(folder / f"{name}.so")
    # OpenMP's own library is not linked: torch has loaded one, whose idle threads the steps use.
    link = [*(option for option in command if option != "-fopenmp"), "-shared", object_file, "-o", library_file]
    for step in ([*command, "-c", str(sources / f"{name}.cpp"), "-o", object_file], link):
        status, output = _output_of(step, COMPILER_SECONDS)
        if status or not os.path.exists(step[-1]):
            message = next((line for line in output.splitlines() if "error" in line), "it printed no error")
            raise UserError(f"{command[0]} can't compile {PURPOSES[name]} steps: {message}")
    os.unlink(object_file)
    _opened(Path(library_file))
    (folder / f"{name}.so.sha256").write_text(f"{checksum(folder / f'{name}.so')}  {name}.so\n", encoding="utf-8")


def _output_of(command: list[str], seconds: float) -> tuple[int, str]:
    """Return a compiler's exit status and what it printed. Raises UserError if it hangs; its processes are killed."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    environment = os.environ | {"LC_ALL": "C"}  # errors in English
    try:
        process = subprocess.Popen(command, **options, env=environment, start_new_session=True)
    except OSError as error:
        raise UserError(f"{command[0]} can't be run: {error.strerror}") from error
    with process:
        try:
            output = process.communicate(timeout=seconds)[1]
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # it starts processes of its own
            if isinstance(error, subprocess.TimeoutExpired):
                raise UserError(f"{command[0]} has not ended after {seconds} seconds") from error
            raise
    return process.returncode, output.decode(errors="replace")


def load_intact(folder: Path, name: str) -> ctypes.CDLL | None:
    """Load the library in `folder` if it has the checksum that `compile_steps` wrote, otherwise return None.

    Raises:
        UserError: another user owns the folder above it or could have written to it, or the library cannot be loaded.
    """
    try:
        above = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused(folder.parent, f"cannot be opened as a folder ({error.strerror})") from error
    try:
        status = os.fstat(above)
        if status.st_uid != os.geteuid():
            raise _refused(folder.parent, "belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _refused(folder.parent, "could be written by other users")
        if status.st_mode & 0o077:
            with suppress(OSError):  # a read-only file system
                os.fchmod(above, 0o700)
        same = Path(f"/proc/self/fd/{above}", folder.name)  # still this folder if another user exchanges the path
        try:
            file = f"{name}.so"
            sums = (same / f"{file}.sha256").read_text("utf-8").split(), [checksum(same / file), file]
        except (OSError, ValueError):  # absent, unreadable, or not text
            return None
        return load(same, name) if sums[0] == sums[1] else None
    finally:
        os.close(above)


def _refused(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder} {reason}: delete it, or set MOONWHALE_CACHE to a folder of yours")


def load(folder: Path, name: str) -> ctypes.CDLL:
    """Load the library that `compile_steps` wrote into a folder. Raises UserError if that is not possible."""
    loaded = _opened(folder / f"{name}.so")
    for function, arguments in ARGUMENTS[name].items():
        getattr(loaded, function).argtypes = arguments
    if name == "step":
        loaded.sizes.restype = ctypes.POINTER(INTEGER)
    return loaded


def _opened(file: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        hint = "with PyTorch's OpenMP, which is g++'s, CXX must be g++"
        raise UserError(f"the compiled steps can't be loaded: {one_line(error)} ({hint})") from error
