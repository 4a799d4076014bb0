"""`--tune lr`: the grid is extended until the best rate lies inside, and each variant gets its own rate."""

import math
from types import SimpleNamespace

import pytest

from moonwhale.lab import tuning
from moonwhale.lab.config import CompareOptions, comparison
from moonwhale.lab.variants import Variant


class FakeRun:
    """A run whose score is known, once it has been trained."""

    def __init__(self, name, score: float):
        self.name, self.score, self.tuning_score = name, score, None

    def train(self):
        self.tuning_score = self.score
        return self.name


@pytest.mark.parametrize(
    ("found", "factor"),
    [
        ({0.5: 2.0, 1.0: 1.9, 2.0: 2.1}, None),
        ({0.5: 2.0, 1.0: 1.9, 2.0: 1.8}, 4.0),
        ({0.5: 1.7, 1.0: 1.9, 2.0: 1.8}, 0.25),
        ({0.5: 1.7, 1.0: math.inf, 2.0: math.inf}, 0.25),  # diverged
        ({0.5: math.inf, 1.0: math.inf, 2.0: math.inf, 0.25: math.inf}, 0.125),
    ],
)
def test_the_grid_grows_where_the_best_lies(found, factor):
    assert tuning.next_factor(found) == factor


def test_each_variant_gets_the_rate_of_its_best_run(monkeypatch, capsys):
    """The base is best at 3e-3, an end of its grid, and the variant at 4.8e-2, three doublings of the preset's 6e-3."""
    best = {"base": 3e-3, "momentum": 4.8e-2}
    trained = []

    def run(asked, variant, factor, rows):
        rate = asked.config(variant).lr * factor
        return FakeRun((variant.name, factor), abs(math.log2(rate / best[variant.name])))

    monkeypatch.setattr(tuning, "_run", run)
    variants = [Variant("base", {}), Variant("momentum", {"momentum": 0.9, "lr": 6e-3})]
    asked = comparison(CompareOptions(seconds=1.0, tune="lr"), {}, variants)
    tuned = tuning.tune(asked, None, SimpleNamespace(finish=lambda runs: trained.extend(map(FakeRun.train, runs))))
    assert [variant.changes["lr"] for variant in tuned.variants] == pytest.approx([3e-3, 4.8e-2])
    assert tuned.variants[1].changes["momentum"] == 0.9
    assert sorted(trained[:6]) == [(name, factor) for name in ("base", "momentum") for factor in (0.5, 1, 2)]
    assert trained[6:] == [("base", 0.25), ("momentum", 4), ("momentum", 8), ("momentum", 16)]
    assert "rate       momentum: 0.048 (bits per byte by rate 0.003: 4.0000" in capsys.readouterr().out


@pytest.mark.parametrize("score", [lambda factor: factor, lambda factor: math.inf], ids=["better", "diverged"])
def test_a_grid_that_never_ends_is_said_to(score, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "_run", lambda asked, variant, factor, rows: FakeRun(variant.name, score(factor)))
    asked = comparison(CompareOptions(tune="lr"), {}, [Variant("base", {}), Variant("other", {"momentum": 0.9})])
    training = SimpleNamespace(finish=lambda runs: [run.train() for run in runs])
    tuned = tuning.tune(asked, None, training)
    assert tuned.variants[0].changes["lr"] == pytest.approx(6e-3 / 2**5)
    assert "at the grid's end" in capsys.readouterr().out
