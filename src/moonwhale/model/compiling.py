"""What torch.compile needs of a machine: flex.py asks it before it trains on a GPU, a run before it compiles blocks."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.utils._triton import has_triton_package


def triton_unsupported_reason(gpu: torch.device) -> str:
    """Return why triton, which builds torch's kernels for a GPU, cannot do so for this one, or "" if it can."""
    if torch.cuda.get_device_capability(gpu) < (7, 0):
        return "triton needs a GPU of compute capability 7.0 or later"
    return "" if has_triton_package() else "triton is not installed"


def compile_unsupported_reason(device: torch.device) -> str:
    """Return why torch.compile cannot build its kernels for a device, or "" if what it needs is installed."""
    if device.type == "cuda":
        if reason := triton_unsupported_reason(device):
            return reason
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # as triton chooses
        has_compiler = any(map(shutil.which, compilers))
        return "" if has_compiler else "triton finds no C compiler (install gcc or clang, or set CC)"
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    compiler = next((name for name in candidates if name and shutil.which(name)), None)
    if compiler is None:
        return "no C++ compiler is found (install g++ or clang, or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python.h is missing, which {compiler} needs (install Python's development files)"
    return ""
