"""The choice of device and dtype with its reason, the speed ceiling, the allocator, and `moonwhale doctor`."""

import json
import platform
import subprocess
import sys

import pytest
import torch

from moonwhale import doctor, precision
from moonwhale.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Pretend another machine: `machine(amx=…, avx=…, gpus=…, ampere=…, mps=…)`."""

    def pretend(amx=False, avx=False, gpus=0, ampere=True, mps=False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: ampere)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("here", "device", "dtype", "reason"),
    [
        ({}, "cpu", torch.float32, "neither AMX nor AVX512-BF16"),
        ({"amx": True}, "cpu", torch.bfloat16, "the CPU has AMX"),
        ({"avx": True}, "cpu", torch.bfloat16, "the CPU has AVX512-BF16"),
        ({"gpus": 1, "amx": True}, "cuda", torch.bfloat16, "tensor cores"),
        ({"gpus": 1, "ampere": False}, "cuda", torch.float32, "older than Ampere"),
        ({"mps": True}, "mps", torch.float32, "not certain"),
    ],
)
def test_auto_takes_the_fastest_device_and_bf16_where_it_pays(machine, here, device, dtype, reason):
    machine(**here)
    choice = precision.choose()
    assert (choice.device.type, choice.dtype) == (device, dtype)
    assert choice.autocast is (dtype is torch.bfloat16)
    assert reason in choice.reason


def test_what_is_asked_for_is_taken(machine):
    machine(gpus=2)
    assert precision.choose("cpu", "bf16").dtype is torch.bfloat16
    assert "though the CPU has neither" in precision.choose("cpu", "bf16").reason
    assert precision.choose("cuda:1", "fp32").device == torch.device("cuda:1")
    assert precision.choose("cuda", "fp32").dtype is torch.float32


@pytest.mark.parametrize(
    ("here", "device", "dtype", "message"),
    [
        ({}, "cuda", "auto", "--device: no cuda here"),
        ({}, "mps", "auto", "--device: no mps here"),
        ({"gpus": 1}, "cuda:1", "auto", "--device: no cuda:1 here"),
        ({}, "gpu", "auto", "--device: unknown device 'gpu'"),
        ({}, "cpu", "fp16", "--precision: unknown precision 'fp16'"),
        ({"gpus": 1, "ampere": False}, "auto", "bf16", "--precision: no bf16 on cuda"),
    ],
)
def test_what_this_machine_cannot_do_is_one_clear_line(machine, here, device, dtype, message):
    machine(**here)
    with pytest.raises(UserError) as error:
        precision.choose(device, dtype)
    assert str(error.value).startswith(message) and "(give " in str(error.value) and "\n" not in str(error.value)


def test_the_ceiling_of_a_cpu_is_measured_once():
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
def test_the_ceiling_of_a_known_gpu_is_its_data_sheets(monkeypatch, name, bf16, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(precision, "measured_flops", lambda device, dtype: 1e12)
    uncached = precision.peak_flops.__wrapped__
    assert uncached(torch.device("cuda"), torch.bfloat16) == pytest.approx(1e12 * bf16)
    assert uncached(torch.device("cuda"), torch.float32) == pytest.approx(1e12 * fp32)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's malloc")
def test_a_tuned_allocator_takes_no_page_fault_for_memory_it_had_before():
    import resource

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(2**26)  # writes 16,384 pages, and frees them
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert precision.tune_allocator()
    assert min(faults() for _ in range(4)) < 1000


def test_tuning_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert precision.tune_allocator() is False


def test_doctor_reports_in_json_and_as_a_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "not" / "yet"))
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["software"]["torch"]["note"] == torch.__version__
    assert report["devices"]["cpu"]["ok"] and report["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert report["devices"]["cuda"]["ok"] is torch.cuda.is_available() and report["devices"]["cuda"]["note"]
    assert report["matrix products"]["cpu fp32"]["gflops"] > 0.1
    kernels = next(findings for section, findings in report.items() if section.startswith("kernels"))
    assert {"F.grouped_mm bf16", "F.linear_cross_entropy", "flash attention", "flex_attention", "torch.compile"} <= set(
        kernels
    )
    assert report["storage"]["cache"]["free_gib"] > 0

    assert doctor.main([]) == 0
    table = capsys.readouterr().out
    for findings in report.values():
        assert all(name in table for name in findings)
    assert str(tmp_path) in table


def test_doctor_says_why_not(monkeypatch):
    with monkeypatch.context() as without_compiler:
        without_compiler.setattr("shutil.which", lambda name: None)
        assert "install g++" in precision.why_not_compile(torch.device("cpu"))
    assert doctor._package("no-such-package", "tests", "it")["note"] == (
        "not installed, for tests only (pip install 'it')"
    )

    def fail():
        import warnings

        warnings.warn("because of this (Triggered internally at x.cpp)", stacklevel=1)
        raise RuntimeError("no kernel\nand a long trace")

    assert doctor._why_not(fail) == "no kernel because of this"
    assert doctor._why_not(lambda: None) == ""


def test_doctor_refuses_an_unknown_option():
    with pytest.raises(UserError, match="--jsn"):
        doctor.main(["--jsn"])


def test_doctors_help_imports_neither_torch_nor_transformers():
    code = """
import sys
from moonwhale.doctor import main
try:
    main(["--help"])
finally:
    assert not {"torch", "transformers"} & set(sys.modules), "heavy import"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "moonwhale doctor" in done.stdout, done.stderr
