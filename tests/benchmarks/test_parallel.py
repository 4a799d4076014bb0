"""The pipeline benchmark counts correctly and runs at toy size."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parallel(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("parallel")


@pytest.fixture
def parallel_runs(parallel):
    return importlib.import_module("parallel_runs")


def test_idle_time_by_hand(parallel, tmp_path):
    """With two ranks of 1F1B and one micro-batch, stage 0 waits for stage 1's two passes: F + B = 2 + 4."""
    ranks = [
        [("F", 0, 0, 0.0, 2.0), ("B", 0, 0, 8.0, 12.0)],
        [("F", 1, 0, 2.0, 4.0), ("B", 1, 0, 4.0, 8.0)],
    ]
    found = parallel.bubble(ranks, "1f1b")
    assert found == {"step": 12.0, "bubble": 6.0, "share": 0.5, "formula": 6.0, "formula_share": 0.5}
    late = [[*ranks[0][:1], ("B", 0, 0, 9.0, 13.0)], ranks[1]]
    assert parallel.bubble(late, "1f1b") == found | {"step": 13.0, "bubble": 7.0, "share": round(7 / 13, 4)}
    parallel.draw({"1f1b": ranks, "dualpipev": ranks}, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().count("<path") > 8


@pytest.mark.slow
def test_the_bubble_benchmark_runs(parallel, tmp_path, capsys):
    picture = tmp_path / "schedules.svg"
    toy = ["--ranks", "2", "--micro-batches", "4", "--unit", "0.002", "--results", str(tmp_path)]
    (tmp_path / "parallel.json").write_text('{"kills_survived": 1}')
    parallel.main(["bubble", *toy, "--picture", str(picture)])
    result = json.loads((tmp_path / "parallel.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kills_survived"] == 1, "what other parts found stays"
    assert set(result["schedules"]) == {"dualpipev", "dualpipe", "zerobubble", "1f1b"} and picture.exists()
    assert all(0 < found["share"] < 1 for found in result["schedules"].values())


def test_a_wrong_gradient_is_detected(parallel_runs):
    a, b = torch.arange(8.0).view(4, 2), torch.ones(3)
    expected = {"experts": a, "norm": b}
    ranks = [{"experts": a[:2], "norm": b}, {"experts": a[2:]}]  # the two ranks share the experts out
    assert parallel_runs.gradient_error(ranks, expected) == 0
    assert parallel_runs.gradient_error(ranks[::-1], expected) > 0.5
    assert parallel_runs.gradient_error([expected, {"norm": 1.01 * b}], expected) == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(RuntimeError, match="no rank has a gradient of norm"):
        parallel_runs.gradient_error([{"experts": a}], expected)
    with pytest.raises(RuntimeError, match="one process has no gradient of head"):
        parallel_runs.gradient_error([expected, {"head": b}], expected)
    with pytest.raises(RuntimeError, match="nothing to compare: the gradient of norm is zero"):
        parallel_runs.gradient_error([expected], expected | {"norm": 0 * b})


def test_a_wrong_loss_is_detected(parallel_runs):
    logs = [{"loss": 2.0, "loss_main": 1.5, "step": 1}, {"eval_loss": 3.0, "step": 1}]
    assert parallel_runs.loss_error(logs, logs) == 0
    assert parallel_runs.loss_error([logs[0] | {"loss_main": 1.503}, logs[1]], logs) == pytest.approx(0.002)


@pytest.mark.slow
def test_several_processes_and_one(parallel, tmp_path):
    parallel.main(["equality", "--layouts", "pp 2, dualpipev", "--steps", "2", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "parallel.json").read_text())
    assert set(result["equality"]["layouts"]) == {"pp 2, dualpipev", "pp 2, dualpipev, tied"}
    assert 0 < result["max_gradient_error"] < 1e-5 and result["max_loss_error"] < 1e-5


@pytest.mark.slow
def test_measured_memory_is_close_to_the_plan(parallel, tmp_path):
    parallel.main(["memory", "--layouts", "pp 2, dualpipev", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "parallel.json").read_text())
    (layout,) = result["memory"]["layouts"].values()
    for measured, planned in zip(layout["measured"], layout["planned"], strict=True):
        assert measured["weights"] == planned["weights"]
        assert measured["pipeline"] == pytest.approx(planned["pipeline"], rel=1e-3)
    assert result["max_memory_error"] < 0.1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_memory_while_saving(parallel, tmp_path):
    parallel.main(["saving", "--saved-layouts", "fsdp 4", "--width", "128", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "parallel.json").read_text())
    (ranks,) = result["saving"]["layouts"].values()
    assert len(ranks) == 4 and all(rank["share"] > 1e6 for rank in ranks)
    assert result["peak_rank0_over_share"] == pytest.approx(1 + ranks[0]["extra"] / ranks[0]["share"], abs=1e-3)


@pytest.mark.slow
def test_a_kill_is_survived(parallel, tmp_path):
    parallel.main(["kills", "--runs", "1", "--kills", "1", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "parallel.json").read_text())
    assert result["kills_survived"] == 1 == len(result["kills"]["runs"][0]["killed"])
