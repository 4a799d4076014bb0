"""One command runs all parts of the GPU's benchmark. The rehearsal runs it at toy size on a CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu_all(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_all")


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def python(name, code, seconds=60.0):
    import gpu_all

    return gpu_all.Part(name, seconds, [sys.executable, "-c", code])


@pytest.mark.slow
def test_the_rehearsal_runs_all_parts_with_a_failure_and_a_timeout_between(gpu_all, results, capsys):
    """Parts that fail or run out of time do not stop those after them."""
    found = gpu_all.parts(True, results, [])
    broken = python("broken", "raise ValueError('no such kernel')"), python("slow", "import time; time.sleep(60)", 1.0)
    assert gpu_all.run([*found[:1], *broken, *found[1:]], 10, results, None, True) == 2
    result = json.loads((results / "gpu.json").read_text())
    assert result["failed"] == {"broken": "ValueError: no such kernel", "slow": "out of time after 1 s"}
    positive = "mfu", "vs_dense", "vs_transformers", "moba_8k", "moba_error", "decode_1", "decode_64", "fp8_vs_bf16"
    assert all(result[name] > 0 for name in (*positive, "seed_bits_per_byte")) and "max_logit_share" in result
    assert result["thresholds"].keys() >= {"LONG_CONTEXT", "CAPTURE_AFTER", "MAX_TOKENS_FOR_ALL_EXPERTS"}
    assert result["seed_curve"] and "passed" in (results / "tests.log").read_text()
    lines = capsys.readouterr().out.splitlines()
    names = ["tests", "broken", "slow", "speed", "moba", "decode", "fp8", "thresholds", "seed"]
    assert [line.partition(":")[0] for line in lines] == names


def test_the_last_parts_get_the_time_that_is_left(gpu_all, results):
    chosen = [python("long", "import time; time.sleep(60)"), python("late", "pass")]
    assert gpu_all.run(chosen, 1 / 60, results, None, True) == 2
    assert json.loads((results / "gpu.json").read_text())["failed"]["late"] == "no time was left"


def test_an_error_is_taken_out_when_the_part_succeeds(gpu_all, results):
    gpu_all.run([python("part", "1 / 0")], 1, results, None, True)
    assert "division" in json.loads((results / "gpu.json").read_text())["failed"]["part"]
    assert gpu_all.run([python("part", "pass")], 1, results, None, True) == 0
    assert json.loads((results / "gpu.json").read_text())["failed"] == {}


def test_only_what_is_missing_is_collected(gpu_all):
    needs = {
        "a": {"version": "5.23.0", "specifiers": [">=5.23,<5.24"]},
        "b": {"version": "2.0", "specifiers": []},
        "c": {"version": "1.0", "specifiers": []},
    }
    assert gpu_all.missing(needs, {"a": "5.17.0", "b": "1.0"}) == ["a==5.23.0", "c==1.0"]
    assert gpu_all.missing(needs, {"a": "5.23.9", "b": "1.0", "c": "3"}) == []


def test_torch_is_never_replaced(gpu_all):
    needs = gpu_all.requirements()
    assert "transformers" in needs and not {"torch", "triton"} & set(needs)


def test_all_parts_fit_into_twelve_minutes(gpu_all, results):
    *fixed, last = gpu_all.parts(False, results, [])
    assert sum(part.seconds for part in fixed) <= 660 and last.name == "seed"
