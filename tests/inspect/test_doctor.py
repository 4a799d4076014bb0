"""`moonwhale doctor` reports as JSON and as a table."""

import json
import subprocess
import sys

import pytest
import torch

from moonwhale import precision
from moonwhale.errors import UserError
from moonwhale.inspect import doctor
from moonwhale.inspect.commands import main_doctor


def test_doctor_reports_in_json_and_as_a_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "not" / "yet"))
    main_doctor(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["software"]["torch"]["note"] == torch.__version__
    assert report["devices"]["cpu"]["ok"] and report["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert report["devices"]["cuda"]["ok"] is torch.cuda.is_available() and report["devices"]["cuda"]["note"]
    assert report["matrix products"]["cpu fp32"]["gflops"] > 0.1
    precisions = report["precisions on cpu"]
    assert set(precisions) == set(precision.PRECISIONS)
    for name, finding in precisions.items():
        assert (
            finding["ok"] is not bool(precision.precision_unsupported_reason(torch.device("cpu"), name))
            and finding["note"]
        )
    assert precisions["fp32"]["ok"] and not precisions["tf32"]["ok"] and "NVIDIA" in precisions["tf32"]["note"]
    kernels = next(findings for section, findings in report.items() if section.startswith("kernels"))
    assert {"F.grouped_mm fp32", "torch.compile", "decoding in C++", "training in C++"} <= set(kernels)
    assert report["software"]["platform"]["ok"] and report["packages"]["trl"]["ok"]
    assert report["storage"]["cache"]["free_gib"] > 0

    main_doctor([])
    table = capsys.readouterr().out
    for findings in report.values():
        assert all(name in table for name in findings)
    assert str(tmp_path) in table


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_a_system_that_was_never_tried_is_named(system, monkeypatch):
    monkeypatch.setattr(doctor.platform, "system", lambda: system)
    finding = doctor._software()["platform"]
    assert not finding["ok"] and finding["note"].endswith("moonwhale was tried on Linux only")


def test_doctor_gives_the_reason_of_a_failure():
    assert doctor._package("no-such-package", "tests", "it")["note"] == (
        "not installed, for tests only (pip install 'it')"
    )

    def fail():
        raise RuntimeError("no kernel\nand a long trace")

    assert doctor._failure(fail) == "no kernel"
    assert doctor._failure(lambda: None) == ""


def test_doctor_refuses_an_unknown_option():
    with pytest.raises(UserError, match="--jsn"):
        main_doctor(["--jsn"])


def test_doctors_help_imports_neither_torch_nor_transformers():
    code = """
import sys
from moonwhale.inspect.commands import main_doctor
try:
    main_doctor(["--help"])
finally:
    assert not {"torch", "transformers"} & set(sys.modules), "heavy import"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "moonwhale doctor" in done.stdout, done.stderr
