"""The choice of device and precision with its reason; a device's peak FLOP/s; the allocator of a CPU process."""

import ctypes
import importlib.util
import re
import sys
import time
from dataclasses import dataclass
from functools import cache

import torch

from moonwhale.errors import UserError

# For each precision: the dtype of matrix products, the setting of torch.set_float32_matmul_precision ("high" is TF32,
# "medium" is bf16), and the recipe of `moonwhale.fp8.convert`.
PRECISIONS = {
    "fp32": (torch.float32, "highest", None),
    "tf32": (torch.float32, "high", None),
    "bf32": (torch.float32, "medium", None),
    "bf16": (torch.bfloat16, "highest", None),
    "fp8-tensorwise": (torch.bfloat16, "highest", "tensorwise"),
    "fp8-rowwise": (torch.bfloat16, "highest", "rowwise"),
    "fp8-blockwise": (torch.bfloat16, "highest", "blockwise"),
}


@dataclass(frozen=True)
class ComputeSettings:
    """The device and the precision of a run. Weights stay fp32.

    Matrix products run in `dtype`, under autocast unless that is fp32. `apply` sets how products of fp32 matrices run.
    """

    device: torch.device
    dtype: torch.dtype
    autocast: bool
    reason: str  # why this device and this precision, for people
    fp32_matmul: str = "highest"
    fp8: str | None = None  # recipe for `moonwhale.fp8.convert`; None for no FP8

    def apply(self) -> None:
        """Set the precision of fp32 matrix products for the whole process."""
        torch.set_float32_matmul_precision(self.fp32_matmul)


def choose(device: str = "auto", precision: str = "auto") -> ComputeSettings:
    """Choose the device and the precision to compute with.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `auto` or one of `PRECISIONS`.

    Raises:
        UserError: the device or the precision is unknown, or this machine does not support it.
    """
    chosen, device_reason = _choose_device(device)
    name, precision_reason = _choose_precision(chosen, precision)
    dtype, fp32_matmul, fp8 = PRECISIONS[name]
    reason = f"{device_reason}; {precision_reason}"
    return ComputeSettings(chosen, dtype, dtype is torch.bfloat16, reason, fp32_matmul, fp8)


def _choose_device(name: str) -> tuple[torch.device, str]:
    """Return the device and the reason for it."""
    if name == "auto":
        kind = next((kind for kind in ("cuda", "mps") if not device_unavailable_reason(kind)), "cpu")
        return torch.device(kind), f"{kind}, the {'only' if kind == 'cpu' else 'fastest'} device here"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"`device`: unknown device {name!r} (give auto, cpu, cuda, cuda:N or mps)")
    device = torch.device(name)
    if reason := device_unavailable_reason(device.type):
        raise UserError(f"`device`: no {device.type} here, {reason} (give `device` auto or cpu)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"`device`: no {name} here, the last one is cuda:{last} (give `device` auto or cuda:{last})")
    return device, f"{name} as asked"


def _choose_precision(device: torch.device, name: str) -> tuple[str, str]:
    """Return the name of the precision and the reason for it."""
    slow_reason = bf16_slow_reason(device)
    if name == "auto":
        return ("fp32", f"fp32, since {slow_reason}") if slow_reason else ("bf16", f"bf16, since {_bf16_unit(device)}")
    if name not in (*PRECISIONS, "fp16"):
        raise UserError(f"`precision`: unknown precision {name!r} (give auto, {', '.join(PRECISIONS)})")
    if reason := precision_unsupported_reason(device, name):
        candidates = ("tf32", "bf32", "bf16", "fp32") if name in ("tf32", "bf32") else ("bf16", "fp32")
        nearest = next(other for other in candidates if not precision_unsupported_reason(device, other))
        raise UserError(f"`precision`: no {name} on {device}, {reason} (give `precision` {nearest})")
    return name, f"{name} as asked" + (f", though {slow_reason}" if name == "bf16" and slow_reason else "")


def device_unavailable_reason(kind: str) -> str:
    """Return why `cpu`, `cuda` or `mps` cannot be used here, or "" if it can."""
    if kind == "cuda" and not torch.cuda.is_available():
        return "no NVIDIA driver or GPU is found" if torch.version.cuda else "this torch is built without CUDA"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "Metal is not available" if torch.backends.mps.is_built() else "this torch is built without Metal"
    return ""


def precision_unsupported_reason(device: torch.device, name: str) -> str:
    """Return why a device cannot compute in fp16 or in one of `PRECISIONS`, or "" if it can."""
    if name == "fp16":
        return "its small range needs a loss scale"
    if name == "tf32":
        if device.type != "cuda":
            return "TF32 is a mode of NVIDIA's tensor cores"
        return "" if torch.cuda.get_device_capability(device) >= (8, 0) else "the GPU is older than Ampere"
    if name == "bf32":
        if device.type != "cpu":
            return "BF32 is oneDNN's mode on a CPU"
        return "" if _onednn_has_bf32() else "oneDNN multiplies fp32 as bf16 only on CPUs with AMX or the like"
    if name == "bf16":
        return bf16_slow_reason(device) if device.type == "cuda" else ""
    return _fp8_unsupported_reason(device, name) if name.startswith("fp8-") else ""


def _fp8_unsupported_reason(device: torch.device, name: str) -> str:
    if device.type != "cuda":
        return "FP8 needs NVIDIA's tensor cores of compute capability 8.9 or more"
    capability = torch.cuda.get_device_capability(device)
    has = f"the GPU has compute capability {capability[0]}.{capability[1]}"
    if name == "fp8-blockwise" and capability[0] != 9:
        return f"{has} and torchao's blockwise kernels need Hopper's 9.0"
    needed = (8, 9) if name == "fp8-tensorwise" else (9, 0)
    if capability < needed:
        return f"{has} and it needs {needed[0]}.{needed[1]}"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install 'moonwhale[fp8]'"
    if name == "fp8-blockwise" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


@cache
def _onednn_has_bf32() -> bool:
    """Test whether fp32 matrices are really multiplied as bf16 when that is allowed.

    oneDNN silently uses its fp32 kernel if it has none for BF32. bf16 has no number between 1 and 1 + 2^-7, so a bf16
    product rounds 1 + 2^-12 to 1.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        matrix = torch.full((256, 256), 1 + 2**-12)
        return (matrix @ matrix)[0, 0].item() == 256
    finally:
        torch.set_float32_matmul_precision(before)


def bf16_slow_reason(device: torch.device) -> str:
    """Return why bf16 is not faster than fp32 on a device, or "" if it is."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "" if fast else "the GPU is older than Ampere"
    if device.type == "mps":
        return "a gain from bf16 is not certain on every Apple chip"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "" if fast else "the CPU has neither AMX nor AVX512-BF16"


def _bf16_unit(device: torch.device) -> str:
    if device.type == "cuda":
        return "the GPU has bf16 tensor cores"
    return f"the CPU has {'AMX' if torch.cpu._is_amx_tile_supported() else 'AVX512-BF16'}"


def multiplies_in_fp32(device: torch.device) -> bool:
    """Return whether products of fp32 matrices stay in fp32, and are not computed in TF32 or BF16."""
    if device.type == "cuda":  # the older setting raises after transformers' `tf32` or `torch_compile` has set this one
        return torch.backends.cuda.matmul.fp32_precision != "tf32"
    return torch.get_float32_matmul_precision() == "highest"


def tune_allocator() -> bool:
    """Make glibc's malloc keep freed memory. Returns False if the allocator is another one, which stays as it is.

    By default malloc maps every large tensor afresh, and each of its pages faults in again: about a fifth of a CPU
    step. The price is that the process keeps its peak memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    mmap_threshold, trim_threshold, never = -3, -1, -1
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, never))


# Peak TFLOP/s of bf16 (dense tensor cores) and of fp32, from NVIDIA's data sheets. A pattern matches the end of a name
# where laptop parts and other variants are slower.
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
    """Return a device's peak FLOP/s in `dtype`: the data sheet's for a known GPU, else the measured one.

    A slice of a GPU (MIG) is measured. Measuring takes about a fifth of a second, once per process.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float32):
        name = torch.cuda.get_device_name(device)
        for pattern, (bf16, fp32) in GPU_TFLOPS.items():
            if re.search(rf"\b{pattern}", name) and "MIG" not in name:
                return 1e12 * (fp32 if dtype is torch.float32 else bf16)
    return measured_flops(device, dtype)


@cache
def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Measure square matrix products for some seconds, and return the FLOP/s of the fastest."""
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, best, deadline = a @ b, float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
