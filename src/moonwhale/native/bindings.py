"""Steps in compiled C++: `step/` built once for this machine by its compiler, and the structures that it reads.

A structure holds addresses of tensors, which whoever makes it keeps alive beside it.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from moonwhale.errors import UserError
from moonwhale.files import cache_folder, locked, new_folder

SOURCES = Path(__file__).parent / "step"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-Wno-psabi"]
FLAGS += ["-mcpu=native" if platform.machine() == "aarch64" else "-march=native"]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
PANEL = 64  # outputs whose weights lie side by side
POINTER, WHOLE, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Matrix(ctypes.Structure):
    _fields_ = [*_fields(POINTER, "data scale bias"), *_fields(WHOLE, "out in kind")]

    @classmethod
    def of(cls, panels: Tensor, out: int, scale: Tensor | None = None, bias: Tensor | None = None) -> "Matrix":
        """Of what `panels` makes of a weight (out, in); scale and bias (out) are fp32."""
        return cls(address(panels), address(scale), address(bias), out, panels.shape[1], KINDS[panels.dtype])


class Network(ctypes.Structure):
    _fields_ = _fields(Matrix, "up down")


class Norm(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("eps", REAL)]


class Block(ctypes.Structure):
    _fields_ = [
        *_fields(WHOLE, "hidden heads nope rope rank v interleaved taps size topk"),
        *_fields(WHOLE, "experts chosen groups chosen_groups sigmoid normalise shared"),
        *_fields(REAL, "scale factor"),
        *_fields(Norm, "before q_norm kv_norm after"),
        *_fields(Matrix, "down q_up up out router"),
        *_fields(POINTER, "conv bias networks"),
    ]


class Cache(ctypes.Structure):
    _fields_ = [*_fields(POINTER, "keys values means"), *_fields(WHOLE, "length kind")]


class Span(ctypes.Structure):
    _fields_ = [*_fields(WHOLE, "rows length first threads"), *_fields(POINTER, "start cos sin")]


@functools.cache
def why_not() -> str:
    """What keeps steps from being compiled here, or nothing. Compiles them if nobody has yet."""
    try:
        library()
        return ""
    except (UserError, OSError) as error:
        return str(error)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled steps, from the cache folder or built now, which takes some seconds.

    Raises:
        UserError: this is no Linux, there is no compiler, it fails, or what it builds can't be stored.
        OSError: what it built can't be loaded.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if sys.platform != "linux":
        raise UserError("compiled steps are for Linux")
    if compiler is None:
        raise UserError("no C++ compiler found (install g++)")
    machine = subprocess.run([compiler, *FLAGS, "-E", "-###", "-x", "c++", os.devnull], capture_output=True).stderr
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    folder = cache_folder() / "native" / hashlib.sha256(machine + sources).hexdigest()[:16]
    with locked(folder):
        if not folder.exists():
            print("compiling decoding steps for this machine, once", file=sys.stderr)
            with new_folder(folder) as building:
                build(compiler, SOURCES, building)
    return load(folder)


def build(compiler: str, sources: Path, folder: Path) -> None:
    """Compiles into a folder. Raises UserError with the compiler's first complaint."""
    object, target = str(folder / "step.o"), str(folder / "step.so")
    compile = [compiler, *FLAGS, "-fopenmp", "-c", str(sources / "step.cpp"), "-o", object]
    # Linked without OpenMP's library: torch has loaded one already, whose threads are there and idle.
    for command in (compile, [compiler, "-shared", object, "-o", target]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), "it said nothing")
            raise UserError(f"{compiler} can't compile decoding steps: {complaint}")


def load(folder: Path) -> ctypes.CDLL:
    """What `build` left in a folder."""
    found = ctypes.CDLL(str(folder / "step.so"))
    found.run_block.argtypes = [POINTER] * 4
    found.run_product.argtypes = [POINTER, POINTER, POINTER, WHOLE, WHOLE]
    found.sizes.restype = ctypes.POINTER(WHOLE)
    return found


def serves(weight: Tensor) -> bool:
    """Whether steps on such weights are compiled here."""
    return weight.device.type == "cpu" and weight.dtype in KINDS and not why_not()


def panels(weight: Tensor) -> Tensor:
    """A weight (out, in) as (ceil(out / 64), in, 64), filled up with zeros: weights of 64 outputs for an input lie side
    by side, so that a product reads one stream and adds whole vectors.
    """
    filled = torch.cat([weight, weight.new_zeros(-len(weight) % PANEL, weight.shape[1])])
    return filled.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def product(matrix: Matrix, x: Tensor) -> Tensor:
    """x (N, in) @ matrix.T in fp32."""
    x, out = x.float().contiguous(), torch.empty(len(x), matrix.out)
    library().run_product(ctypes.byref(matrix), out.data_ptr(), x.data_ptr(), len(x), torch.get_num_threads())
    return out


def networks(pairs: Iterable[tuple[Matrix, Matrix]]) -> ctypes.Array:
    """An array of gated networks, of the matrices of each."""
    pairs = list(pairs)
    return (Network * len(pairs))(*(Network(*pair) for pair in pairs))


def run_block(block: Block, keys: Tensor, values: Tensor, means: Tensor | None, span: Span, x: Tensor) -> None:
    """Runs a block on x (tokens, hidden) fp32 in place, with its tensors of a `LatentCache`."""
    cache = Cache(address(keys), address(values), address(means), keys.shape[1], KINDS[keys.dtype])
    library().run_block(ctypes.byref(block), ctypes.byref(cache), ctypes.byref(span), x.data_ptr())


def address(thing: Tensor | ctypes.Array | None) -> int | None:
    """Where its numbers begin; whoever asks keeps the thing."""
    if thing is None:
        return None
    return thing.data_ptr() if isinstance(thing, Tensor) else ctypes.addressof(thing)
