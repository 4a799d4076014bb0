"""Compiled steps for the vectors of this machine and of lesser ones, with mutants in them."""

import contextlib
import ctypes
import functools
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moonwhale.errors import UserError
from moonwhale.native import build, training

LEVELS = {"this machine": "", "AVX2": "-march=haswell", "no AVX": "-march=x86-64"}  # MOONWHALE_CXXFLAGS
WITHOUT_AMX = {"no AMX": "-mno-amx-bf16 -mno-amx-tile"}


def library(name: str, mutants: dict[str, tuple[str, str, str]], level: str, folder: Path) -> ctypes.CDLL:
    """Return the library `name` with every mutant in it, of which its integer `mutant` chooses one. 0 is none.

    `mutants` are expressions: file, right, wrong. The test is skipped if the library cannot be compiled or run here.
    """
    if reason := build.unavailable_reason(name):
        pytest.skip(reason)
    if level in WITHOUT_AMX and "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AMX")
    if level != "this machine" and platform.machine() != "x86_64":
        pytest.skip("these are x86-64's vectors")
    if level == "AVX2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AVX2")
    try:
        return _compiled(name, tuple(mutants.values()), level, folder / "levels")
    except UserError:
        if level in WITHOUT_AMX:
            pytest.skip("this compiler does not know AMX")
        raise


def training_library(mutants: dict, level: str, folder: Path, monkeypatch) -> ctypes.CDLL:
    """Return `library("training", …)`, and let this process train with it, or at this machine's level as users do."""
    compiled = library("training", mutants, level, folder)
    assert training.use_kernels(torch.device("cpu"))
    if level != "this machine":
        monkeypatch.setattr(build, "library", lambda name: compiled)
    return compiled


@contextlib.contextmanager
def mutated(library: ctypes.CDLL, number: int) -> Iterator[None]:
    """Chooses a mutant of a library from `library`, for as long as the context lasts."""
    chosen = ctypes.c_int.in_dll(library, "mutant")
    chosen.value = number
    try:
        yield
    finally:
        chosen.value = 0


@functools.cache
def _compiled(name: str, mutants: tuple[tuple[str, str, str], ...], level: str, folder: Path) -> ctypes.CDLL:
    sources = folder / name / level
    shutil.copytree(build.SOURCES, sources)
    for number, (file, right, wrong) in enumerate(mutants, 1):
        source = (sources / file).read_text()
        assert source.count(right) == 1, right
        (sources / file).write_text(source.replace(right, f"(mutant == {number} ? {wrong} : {right})"))
    main = sources / f"{name}.cpp"
    main.write_text("int mutant;\n" + main.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONWHALE_CXXFLAGS", f"-O1 {(LEVELS | WITHOUT_AMX)[level]}")
        build.compile_steps(build.compiler(), sources, sources, name)
    return build.load(sources, name)
