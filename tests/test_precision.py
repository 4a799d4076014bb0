"""`precision` chooses a device and dtype with a reason, knows a device's peak FLOP/s, and tunes the allocator."""

import platform
import sys

import pytest
import torch

from moonwhale import precision
from moonwhale.errors import UserError
from moonwhale.train import run_options

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """`machine(amx=…, avx=…, gpus=…, capability=…, mps=…, packages=…)` makes torch report another machine."""

    def pretend(amx=False, avx=False, gpus=0, capability=(9, 0), mps=False, packages=("torchao", "triton")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capability >= (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(precision, "_onednn_has_bf32", lambda: amx)
        monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: name if name in packages else None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("here", "device", "dtype", "reason"),
    [
        ({}, "cpu", torch.float32, "neither AMX nor AVX512-BF16"),
        ({"amx": True}, "cpu", torch.bfloat16, "the CPU has AMX"),
        ({"avx": True}, "cpu", torch.bfloat16, "the CPU has AVX512-BF16"),
        ({"gpus": 1, "amx": True}, "cuda", torch.bfloat16, "tensor cores"),
        ({"gpus": 1, "capability": (7, 5)}, "cuda", torch.float32, "older than Ampere"),
        ({"mps": True}, "mps", torch.float32, "not certain"),
    ],
)
def test_auto_takes_the_fastest_device_and_bf16_where_it_pays(machine, here, device, dtype, reason):
    machine(**here)
    choice = precision.choose()
    assert (choice.device.type, choice.dtype) == (device, dtype)
    assert choice.autocast is (dtype is torch.bfloat16)
    assert reason in choice.reason


def test_training_offers_every_precision():
    assert ("auto", *precision.PRECISIONS) == run_options.PRECISIONS


def test_an_explicit_device_and_precision_are_used(machine):
    machine(gpus=2)
    assert precision.choose("cpu", "bf16").dtype is torch.bfloat16
    assert "though the CPU has neither" in precision.choose("cpu", "bf16").reason
    assert precision.choose("cuda:1", "fp32").device == torch.device("cuda:1")
    assert precision.choose("cuda", "fp32").dtype is torch.float32


@pytest.mark.parametrize(
    ("here", "name", "dtype", "fp32_matmul", "fp8"),
    [
        ({"gpus": 1}, "fp32", torch.float32, "highest", None),
        ({"gpus": 1, "capability": (8, 0)}, "tf32", torch.float32, "high", None),
        ({"amx": True}, "bf32", torch.float32, "medium", None),
        ({"gpus": 1, "capability": (8, 0)}, "bf16", torch.bfloat16, "highest", None),
        ({"gpus": 1, "capability": (8, 9)}, "fp8-tensorwise", torch.bfloat16, "highest", "tensorwise"),
        ({"gpus": 1, "capability": (10, 0)}, "fp8-rowwise", torch.bfloat16, "highest", "rowwise"),
        ({"gpus": 1}, "fp8-blockwise", torch.bfloat16, "highest", "blockwise"),
    ],
)
def test_each_precision_sets_dtype_matmul_and_fp8_recipe(machine, here, name, dtype, fp32_matmul, fp8):
    machine(**here)
    choice = precision.choose(precision=name)
    assert (choice.dtype, choice.fp32_matmul, choice.fp8) == (dtype, fp32_matmul, fp8)
    assert choice.autocast is (dtype is torch.bfloat16) and choice.reason.endswith(f"{name} as asked")
    before = torch.get_float32_matmul_precision()
    try:
        choice.apply()
        assert torch.get_float32_matmul_precision() == fp32_matmul
        assert torch.backends.cuda.matmul.allow_tf32 is (fp32_matmul != "highest")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("here", "name", "why", "instead"),
    [
        ({"amx": True}, "tf32", "NVIDIA", "bf32"),
        ({"avx": True}, "tf32", "NVIDIA", "bf16"),
        ({"mps": True}, "tf32", "NVIDIA", "bf16"),
        ({"gpus": 1, "capability": (7, 5)}, "tf32", "older than Ampere", "fp32"),
        ({"avx": True}, "bf32", "oneDNN", "bf16"),
        ({"gpus": 1}, "bf32", "oneDNN", "tf32"),
        ({"gpus": 1, "capability": (7, 5)}, "bf16", "older than Ampere", "fp32"),
        ({"amx": True}, "fp16", "loss scale", "bf16"),
        ({"gpus": 1, "capability": (7, 5)}, "fp16", "loss scale", "fp32"),
        ({"amx": True}, "fp8-blockwise", "tensor cores", "bf16"),
        ({"mps": True}, "fp8-rowwise", "tensor cores", "bf16"),
        ({"gpus": 1, "capability": (8, 6)}, "fp8-tensorwise", "capability 8.6 and it needs 8.9", "bf16"),
        ({"gpus": 1, "capability": (8, 9)}, "fp8-rowwise", "capability 8.9 and it needs 9.0", "bf16"),
        ({"gpus": 1, "capability": (8, 9)}, "fp8-blockwise", "Hopper", "bf16"),
        ({"gpus": 1, "capability": (10, 0)}, "fp8-blockwise", "Hopper", "bf16"),
        ({"gpus": 1, "packages": ("triton",)}, "fp8-tensorwise", "pip install 'moonwhale[fp8]'", "bf16"),
        ({"gpus": 1, "packages": ("torchao",)}, "fp8-blockwise", "triton is not installed", "bf16"),
        ({"gpus": 1, "capability": (7, 5)}, "fp8-blockwise", "7.5", "fp32"),
    ],
)
def test_an_unavailable_precision_is_refused_and_an_available_one_suggested(machine, here, name, why, instead):
    machine(**here)
    with pytest.raises(UserError) as error:
        precision.choose(precision=name)
    message = str(error.value)
    assert message.startswith(f"`precision`: no {name}") and why in message and "\n" not in message
    assert message.endswith(f"(give `precision` {instead})")
    assert precision.choose(precision=instead).reason.endswith(f"{instead} as asked") or instead == "bf16"


def test_bf32_is_available_if_fp32_products_have_bf16_rounding(monkeypatch):
    """BF32 is available only if a product of fp32 tensors really has bf16's rounding.

    Without a BF32 kernel, oneDNN silently multiplies in fp32.
    """
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    full = torch.full
    assert precision._onednn_has_bf32.__wrapped__() is False, "the products of the pretended setting are fp32's"
    monkeypatch.setattr(torch, "full", lambda size, value: full(size, value).bfloat16())
    assert precision._onednn_has_bf32.__wrapped__() is True
    assert asked == ["medium", "highest"] * 2


@pytest.mark.skipif(not precision._onednn_has_bf32(), reason="oneDNN has no BF32 on this CPU")
def test_bf32_multiplies_as_bf16_and_returns_fp32():
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    before = torch.get_float32_matmul_precision()
    try:
        precision.choose("cpu", "bf32").apply()
        product = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    assert product.dtype is torch.float32
    torch.testing.assert_close(product, a.bfloat16().float() @ b.bfloat16().float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("here", "device", "dtype", "message"),
    [
        ({}, "cuda", "auto", "`device`: no cuda here"),
        ({}, "mps", "auto", "`device`: no mps here"),
        ({"gpus": 1}, "cuda:1", "auto", "`device`: no cuda:1 here"),
        ({}, "gpu", "auto", "`device`: unknown device 'gpu'"),
        ({}, "cpu", "fp64", "`precision`: unknown precision 'fp64'"),
    ],
)
def test_an_unavailable_device_or_unknown_precision_is_one_clear_line(machine, here, device, dtype, message):
    machine(**here)
    with pytest.raises(UserError) as error:
        precision.choose(device, dtype)
    assert str(error.value).startswith(message) and "(give " in str(error.value) and "\n" not in str(error.value)


def test_the_peak_flops_of_a_cpu_are_measured_once():
    flops = precision.peak_flops(CPU, torch.float32)
    assert 1e8 < flops < 1e15
    assert precision.peak_flops(CPU, torch.float32) == flops


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 1, 1),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 1, 1),
    ],
)
def test_the_peak_flops_of_a_known_gpu_come_from_its_data_sheet(monkeypatch, name, bf16, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(precision, "measured_flops", lambda device, dtype: 1e12)
    uncached = precision.peak_flops.__wrapped__
    assert uncached(torch.device("cuda"), torch.bfloat16) == pytest.approx(1e12 * bf16)
    assert uncached(torch.device("cuda"), torch.float32) == pytest.approx(1e12 * fp32)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's malloc")
def test_a_tuned_allocator_reuses_memory_without_page_faults():
    import resource

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(2**26)  # writes 16,384 pages and frees them
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert precision.tune_allocator()
    assert min(faults() for _ in range(4)) < 1000


def test_the_allocator_is_tuned_only_on_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert precision.tune_allocator() is False
