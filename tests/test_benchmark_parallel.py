"""The benchmark of idle time counts right, and runs."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def parallel(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("parallel")


def test_idle_time_by_hand(parallel, tmp_path):
    """Two ranks of 1F1B and one micro-batch: stage 0 waits for the other's two passes, F + B = 2 + 4."""
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
def test_it_runs(parallel, tmp_path, capsys):
    picture = tmp_path / "schedules.svg"
    toy = ["--ranks", "2", "--micro-batches", "4", "--unit", "0.002", "--results", str(tmp_path)]
    parallel.main([*toy, "--picture", str(picture)])
    result = json.loads((tmp_path / "parallel.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["schedules"]) == {"dualpipev", "dualpipe", "zerobubble", "1f1b"} and picture.exists()
    assert all(0 < found["share"] < 1 for found in result["schedules"].values())
