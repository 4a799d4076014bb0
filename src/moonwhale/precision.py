"""Which device and which dtype, and why; how fast that device can go; and an allocator that keeps its memory."""

import ctypes
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from moonwhale.errors import UserError

# What a precision is: the dtype of matrix products; what torch.set_float32_matmul_precision is told of those of fp32
# numbers ("high" is TF32, "medium" bf16); and the recipe by which modules are converted to FP8.
PRECISIONS = {
    "fp32": (torch.float32, "highest", None),
    "tf32": (torch.float32, "high", None),
    "bf32": (torch.float32, "medium", None),
    "bf16": (torch.bfloat16, "highest", None),
    "fp8-tensorwise": (torch.bfloat16, "highest", "tensorwise"),
    "fp8-rowwise": (torch.bfloat16, "highest", "rowwise"),
    "fp8-blockwise": (torch.bfloat16, "highest", "blockwise"),
}
NEAREST = {"tf32": ("bf32", "bf16", "fp32"), "bf32": ("tf32", "bf16", "fp32"), "bf16": ("fp32",)}  # FP8: bf16, fp32


@dataclass(frozen=True)
class Choice:
    """Weights stay fp32. Matrix products run in `dtype`, under autocast where that is not fp32 itself; those of fp32
    numbers run as `apply` sets it; `fp8` is the recipe for `moonwhale.fp8.convert`, None for no FP8.
    """

    device: torch.device
    dtype: torch.dtype
    autocast: bool
    reason: str
    fp32_products: str = "highest"
    fp8: str | None = None

    def apply(self) -> None:
        """Sets, for the whole process, what matrix products of fp32 numbers are computed in."""
        torch.set_float32_matmul_precision(self.fp32_products)


def choose(device: str = "auto", precision: str = "auto") -> Choice:
    """The device (`auto`, `cpu`, `cuda`, `cuda:N`, `mps`) and the precision (`auto` or one of `PRECISIONS`) to compute
    with.

    Raises UserError for a device or precision that is unknown, or that this machine does not have.
    """
    chosen, why_device = _choose_device(device)
    slow = why_not_bf16(chosen)
    if precision == "auto":
        precision = "fp32" if slow else "bf16"
        why = f"fp32, since {slow}" if slow else f"bf16, since {_bf16_unit(chosen)}"
    elif precision == "fp16":
        nearest = _nearest(chosen, ("bf16", "fp32"))
        raise UserError(f"`precision`: no fp16, whose small range needs a loss scale (give `precision` {nearest})")
    elif precision not in PRECISIONS:
        raise UserError(f"`precision`: unknown precision {precision!r} (give auto, {', '.join(PRECISIONS)})")
    elif why_not := why_not_precision(chosen, precision):
        nearest = _nearest(chosen, NEAREST.get(precision, ("bf16", "fp32")))
        raise UserError(f"`precision`: no {precision} on {chosen}, {why_not} (give `precision` {nearest})")
    else:
        why = f"{precision} as asked" + (f", though {slow}" if precision == "bf16" and slow else "")
    dtype, fp32_products, fp8 = PRECISIONS[precision]
    return Choice(chosen, dtype, dtype is torch.bfloat16, f"{why_device}; {why}", fp32_products, fp8)


def why_not_precision(device: torch.device, precision: str) -> str:
    """Why a device can't compute in one of `PRECISIONS`, or nothing if it can."""
    if precision == "tf32":
        if device.type != "cuda":
            return "TF32 is a mode of NVIDIA's tensor cores"
        return "" if torch.cuda.get_device_capability(device) >= (8, 0) else "the GPU is older than Ampere"
    if precision == "bf32":
        if device.type != "cpu":
            return "BF32 is oneDNN's mode on a CPU"
        return "" if _onednn_has_bf32() else "oneDNN multiplies fp32 as bf16 only where it has AMX or the like"
    if precision == "bf16":
        return why_not_bf16(device) if device.type == "cuda" else ""
    return _why_not_fp8(device, precision) if precision.startswith("fp8-") else ""


def _why_not_fp8(device: torch.device, precision: str) -> str:
    if device.type != "cuda":
        return "FP8 needs NVIDIA's tensor cores of compute capability 8.9 or more"
    capability, has = torch.cuda.get_device_capability(device), "the GPU has compute capability {}.{}".format
    if precision == "fp8-blockwise" and capability[0] != 9:
        return f"{has(*capability)} and torchao's kernels for tiles need Hopper's 9.0"
    if capability < (first := (8, 9) if precision == "fp8-tensorwise" else (9, 0)):
        return f"{has(*capability)} and it needs {first[0]}.{first[1]}"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install 'moonwhale[fp8]'"
    if precision == "fp8-blockwise" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def _nearest(device: torch.device, precisions: tuple[str, ...]) -> str:
    return next(precision for precision in precisions if not why_not_precision(device, precision))


@cache
def _onednn_has_bf32() -> bool:
    """Whether fp32 matrices really are multiplied as bf16 when that is allowed: without a kernel for it, oneDNN
    quietly takes its fp32 one. bf16 has no number between 1 and 1 + 2^-7.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        matrix = torch.full((256, 256), 1 + 2**-12)
        return (matrix @ matrix)[0, 0].item() == 256
    finally:
        torch.set_float32_matmul_precision(before)


def _choose_device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        found = next((kind for kind in ("cuda", "mps") if not why_no_device(kind)), "cpu")
        return torch.device(found), f"{found}, the {'only' if found == 'cpu' else 'fastest'} device here"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"`device`: unknown device {name!r} (give auto, cpu, cuda, cuda:N or mps)")
    device = torch.device(name)
    if why := why_no_device(device.type):
        raise UserError(f"`device`: no {device.type} here, {why} (give `device` auto or cpu)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"`device`: no {name} here, the last one is cuda:{last} (give `device` auto or cuda:{last})")
    return device, f"{name} as asked"


def why_no_device(kind: str) -> str:
    """Why `cpu`, `cuda` or `mps` can't be used here, or nothing if it can."""
    if kind == "cuda" and not torch.cuda.is_available():
        return "no NVIDIA driver or GPU is found" if torch.version.cuda else "this torch is built without CUDA"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "Metal is not available" if torch.backends.mps.is_built() else "this torch is built without Metal"
    return ""


def why_not_bf16(device: torch.device) -> str:
    """Why bf16 does not pay on a device, or nothing if it does."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "" if fast else "the GPU is older than Ampere"
    if device.type == "mps":
        return "a gain from bf16 is not certain on every Apple chip"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "" if fast else "the CPU has neither AMX nor AVX512-BF16"


def why_not_compile(device: torch.device) -> str:
    """Why torch.compile can't build its kernels for a device, or nothing if what it needs is there."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++", "cl") if c and shutil.which(c)), None)
    if compiler is None:
        return "no C++ compiler is found (install g++ or clang, or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python.h is missing beside {compiler} (install Python's development files)"
    return ""


def _bf16_unit(device: torch.device) -> str:
    if device.type == "cuda":
        return "the GPU has bf16 tensor cores"
    return f"the CPU has {'AMX' if torch.cpu._is_amx_tile_supported() else 'AVX512-BF16'}"


def tune_allocator() -> bool:
    """Make glibc's malloc keep freed memory; False where it is another allocator, and nothing was done.

    By default every large tensor is mapped afresh and each of its pages faults in again: about a fifth of a CPU step.
    The price is that the process holds on to its peak memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    mmap_threshold, trim_threshold, never = -3, -1, -1
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, never))


# Dense tensor-core bf16 and plain fp32 in TFLOP/s, from NVIDIA's data sheets; laptop parts and slices of a GPU differ.
GPU_TFLOPS = {
    r"A100\b": (312, 19.5),
    r"H100 PCIe$": (756, 51),
    r"H100 80GB HBM3$": (989, 67),
    r"H200$": (989, 67),
    r"L4$": (121, 30.3),
    r"L40S$": (362, 91.6),
    r"RTX 3090$": (71, 35.6),
    r"RTX 4090$": (165, 82.6),
}


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a device can reach in `dtype`: the data sheet's figure for a known GPU, else a measured product's.

    Measures for about a fifth of a second, once a process.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float32):
        name = torch.cuda.get_device_name(device)
        for pattern, tflops in GPU_TFLOPS.items():
            if re.search(rf"\b{pattern}", name) and "MIG" not in name:
                return 1e12 * tflops[dtype is torch.float32]
    return measured_flops(device, dtype)


@cache
def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the best of several square matrix products."""
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, best, deadline = a @ b, float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
