"""Counts how the tests marked `contract(area, outsider)` end, if `--contracts-json FILE` asks for it.

docs/update_compatibility.py writes the table of docs/compatibility.md from that file.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--contracts-json", metavar="FILE", help="write how each contract's tests ended into this file")


# Markers of transformers' own tests (see transformers_suite.py)
TRANSFORMERS_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
    "generate",
    "torch_export_test",
    "onnx_export_test",
    "executorch_export_test",
    "timeout",
)


def pytest_configure(config):
    for name in TRANSFORMERS_MARKERS:
        config.addinivalue_line("markers", f"{name}: set by transformers' own tests")
    if path := config.getoption("--contracts-json", default=None):
        config.pluginmanager.register(ContractCounts(Path(path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Tells the report which contract the test belongs to, so that it reaches xdist's main process."""
    report = yield
    if (mark := item.get_closest_marker("contract")) is not None:
        report.user_properties.append(("contract", mark.args))
    return report


class ContractCounts:
    """Counts passed, failed and skipped tests of each contract, the latter two by reason."""

    def __init__(self, path: Path):
        self.path, self.counts = path, defaultdict(lambda: {"passed": 0, "failed": Counter(), "skipped": Counter()})

    def pytest_runtest_logreport(self, report):
        contract = dict(report.user_properties).get("contract")
        decisive = report.when == "call" or (report.when == "setup" and not report.passed)
        decisive &= not isinstance(report, pytest.SubtestReport)  # the test itself fails if one of these does
        if contract is None or not decisive:
            return
        counts = self.counts[tuple(contract)]
        if report.passed:
            counts["passed"] += 1
        elif report.skipped and hasattr(report, "wasxfail"):
            counts["failed"][report.wasxfail.removeprefix("reason: ")] += 1
        elif report.skipped:
            counts["skipped"][report.longrepr[2].removeprefix("Skipped: ")] += 1
        else:
            counts["failed"]["unexpected"] += 1

    def pytest_sessionfinish(self):
        rows = [{"area": area, "outsider": outsider} | counts for (area, outsider), counts in self.counts.items()]
        self.path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
