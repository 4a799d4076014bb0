"""The optimizer benchmark runs at toy size. Tuning and crossing are tested on runs with known losses."""

import importlib
import json
import math
from pathlib import Path

import pytest

import toy
from moonwhale.presets import PRESETS

ROOT = Path(__file__).parents[2]
TINY = toy.TOY


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(importlib.import_module("common"), "QUIET", float("inf"))


@pytest.fixture
def optimizer(monkeypatch):
    module = importlib.import_module("optimizer")
    for name, value in TINY.items():
        monkeypatch.setitem(PRESETS["seed_190m"].model, name, value)
    monkeypatch.setattr(module, "TOKENS", 128)
    monkeypatch.setattr(module, "CONTEXT", 32)
    return module


@pytest.fixture
def race(monkeypatch, tmp_path):
    module = importlib.import_module("optimizer_race")
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "MODEL", TINY)
    monkeypatch.setattr(module, "CONTEXT", 32)
    monkeypatch.setattr(module, "ROWS", 2)
    module.data.cache_clear()
    return module


def test_cost(optimizer, tmp_path, capsys):
    (tmp_path / "optimizer.json").write_text('{"tokens_vs_adamw": 0.5, "muonclip_share": 9, "runs": [1]}')
    optimizer.main(["--cost-only", "--rounds", "1", "--rows", "2", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "optimizer.json").read_text())
    seconds = result["cost"]["seconds"]
    step = seconds["forward and backward"] + seconds["optimizer"]
    assert result["muonclip_share"] == pytest.approx(seconds["optimizer"] / step, abs=1e-4)
    assert result["qkclip_share"] == pytest.approx(seconds["qk-clip"] / step, abs=1e-4)
    assert result["tokens_vs_adamw"] == 0.5 and result["runs"] == [1], "the race's half is kept"
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == {name: value for name, value in result.items() if name != "runs"}


def test_every_tile_of_a_forward_pass_is_measured(optimizer):
    import torch

    from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM

    model = MoonwhaleForCausalLM(MoonwhaleConfig(**TINY)).train()
    tiles = optimizer.score_tiles(model, torch.zeros(2, 32, dtype=torch.long))
    # 3 attentions have 2 x 2 x 32 queries. In 2 of them, MoBA's queries also read one earlier block.
    assert sum(tile.shape[:2].numel() for tile in tiles) >= 3 * 128 + 2 * 96


def test_too_little_memory_is_reported_and_nothing_is_measured(optimizer, monkeypatch, capsys):
    monkeypatch.setattr(optimizer, "BYTES_PER_TOKEN", 1e15)
    assert optimizer.cost(1, 1) == {}
    assert "GB" in capsys.readouterr().err


def test_race(optimizer, race, tmp_path, monkeypatch, text_folder):
    monkeypatch.setattr(race, "RATES", {"adamw": (1e-3, 1e-2), "muonclip": (1e-3, 1e-2)})
    monkeypatch.setattr(race, "FRACTIONS", (0.5, 1.0))
    monkeypatch.setattr(race, "tune", lambda *_: {"adamw": {1e-2: 4.0, 1e-3: 5.0}, "muonclip": {1e-2: 4.0}})
    picture = tmp_path / "optimizer.svg"
    arguments = ["--race-only", "--steps", "6", "--processes", "1", "--picture", str(picture)]
    optimizer.main([str(text_folder), *arguments, "--results", str(tmp_path)])
    result = json.loads((tmp_path / "optimizer.json").read_text())
    assert result["race"]["rates"] == {"adamw": 1e-2, "muonclip": 1e-2}
    assert [(run["optimizer"], run["steps"]) for run in result["runs"]] == [("adamw", 6)] * 3 + [
        ("muonclip", 3),
        ("muonclip", 6),
    ] * 3
    assert all(run["held_out"][-1][0] == run["steps"] * 64 for run in result["runs"])
    assert len({run["held_out"][-1][1] for run in result["runs"]}) == 9
    assert set(result["tokens_vs_adamw_by_seed"]) == {"1", "2", "3"}

    again = tmp_path / "again.svg"
    race.draw(result["runs"], again)
    assert again.read_bytes() == picture.read_bytes()


def test_runs_with_the_same_seed_share_weights_and_batches(race, text_folder, monkeypatch):
    """With a learning rate of 0, both optimizers end with the same loss. Another seed gives another loss."""
    losses = [race.train(str(text_folder), race.Run(name, 0.0, seed, 2))[1][-1][1] for name, seed in
              (("adamw", 1), ("muonclip", 1), ("adamw", 2))]  # fmt: skip
    assert losses[0] == losses[1] != losses[2]


def test_a_best_rate_at_the_edge_extends_the_range(race, monkeypatch, capsys):
    def play(text, runs, processes, what):
        best = {"adamw": 2e-3, "muonclip": 3.2e-2}
        return {run: [[1, abs(math.log(run.rate / best[run.optimizer]))]] for run in runs}

    monkeypatch.setattr(race, "RATES", {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "muonclip": (2e-3, 4e-3, 8e-3, 1.6e-2)})
    monkeypatch.setattr(race, "play", play)
    tried = race.tune("text", 10, 1)
    assert list(tried["adamw"]) == [1e-3, 2e-3, 4e-3, 8e-3]
    assert list(tried["muonclip"]) == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2]
    assert "MuonClip: the best rate, 0.016, is at the edge; trying 0.032" in capsys.readouterr().err

    monkeypatch.setattr(race, "MOST_RATES", 5)
    with pytest.raises(SystemExit, match=r"MuonClip: the best rate, 0\.032, is at the edge"):
        race.tune("text", 10, 1)


def test_crossing_is_where_a_curve_reaches_a_loss(race):
    assert race.crossing({0.8: 3.0, 0.4: 5.0, 0.6: 4.0}, 4.5) == pytest.approx(0.5)
    assert race.crossing({0.4: 5.0, 0.6: 4.0}, 6.0) == 0.4
    assert race.crossing({0.4: 5.0, 0.6: 4.0}, 3.0) == math.inf
    assert race.crossing({0.4: math.inf, 0.6: 4.0}, 4.0) == 0.6
