"""The compiled steps as a library: `step/` is compiled once for this machine and kept in the cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from torch import Tensor

from moonwhale.errors import UserError
from moonwhale.files import cache_folder, locked, new_folder
from moonwhale.native.structures import DTYPE_CODES, INTEGER, POINTER, SOURCES

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-Wno-psabi"]
FLAGS += ["-mcpu=native" if platform.machine() == "aarch64" else "-march=native"]


def supports(weight: Tensor) -> bool:
    """Return whether compiled steps are available here for such weights."""
    return weight.device.type == "cpu" and weight.dtype in DTYPE_CODES and not unavailable_reason()


@functools.cache
def unavailable_reason() -> str:
    """Say why steps cannot be compiled here, or return an empty string. The first call compiles them."""
    try:
        library()
        return ""
    except (UserError, OSError) as error:
        return str(error)


@functools.cache
def library() -> ctypes.CDLL:
    """Load the compiled steps from the cache folder, or compile them first, which takes some seconds.

    Raises:
        UserError: this system is not Linux, there is no compiler, it fails, or its output cannot be stored.
        OSError: the compiled library cannot be loaded.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if sys.platform != "linux":
        raise UserError("compiled steps are for Linux")
    if compiler is None:
        raise UserError("no C++ compiler found (install g++)")
    # With -### the compiler prints its version and what `native` means on this machine.
    machine = subprocess.run([compiler, *FLAGS, "-E", "-###", "-x", "c++", os.devnull], capture_output=True).stderr
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    folder = cache_folder() / "native" / hashlib.sha256(machine + sources).hexdigest()[:16]
    with locked(folder):
        if not folder.exists():
            print("compiling decoding steps for this machine, once", file=sys.stderr)
            with new_folder(folder) as building:
                compile_steps(compiler, SOURCES, building)
    return load(folder)


def compile_steps(compiler: str, sources: Path, folder: Path) -> None:
    """Compile `sources` into a library in `folder`. Raises UserError with the compiler's first error."""
    object_file, library_file = str(folder / "step.o"), str(folder / "step.so")
    compile = [compiler, *FLAGS, "-fopenmp", "-c", str(sources / "step.cpp"), "-o", object_file]
    # OpenMP's own library is not linked: torch has loaded one, whose idle threads the steps use.
    link = [compiler, "-shared", object_file, "-o", library_file]
    for command in (compile, link):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            message = next((line for line in done.stderr.splitlines() if "error" in line), "it printed no error")
            raise UserError(f"{compiler} can't compile decoding steps: {message}")


def load(folder: Path) -> ctypes.CDLL:
    """Load the library that `compile_steps` wrote into a folder."""
    loaded = ctypes.CDLL(str(folder / "step.so"))
    loaded.run_block.argtypes = [POINTER] * 4
    loaded.run_product.argtypes = [POINTER, POINTER, POINTER, INTEGER, INTEGER]
    loaded.sizes.restype = ctypes.POINTER(INTEGER)
    return loaded
