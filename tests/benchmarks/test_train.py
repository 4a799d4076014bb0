"""The training benchmark at toy size: all contenders compute the same, and the result has every named figure."""

import importlib
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import toy
from moonwhale.costs import flops_per_token, model_size
from moonwhale.model import MoonwhaleConfig
from moonwhale.presets import PRESETS

TOY = toy.TOY | {"vocab_size": 97, "num_nextn_predict_layers": 2}


@pytest.fixture
def train(monkeypatch):
    """Returns the benchmark module with the toy model's shapes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr(importlib.import_module("common"), "QUIET", float("inf"))
    preset = PRESETS["seed_190m"].model
    for name in list(preset):
        monkeypatch.delitem(preset, name)
    for name, value in TOY.items():
        monkeypatch.setitem(preset, name, value)
    return importlib.import_module("train")


def test_train(train, tmp_path, capsys, monkeypatch):
    alike = {"dense": None, "moonwhale": 300e6, "transformers autocast, eager": 600e6}
    monkeypatch.setattr(train, "fresh", lambda name, *_: alike.get(name, 500e6))
    monkeypatch.setattr(train, "measured_flops", SimpleNamespace(__wrapped__=lambda *_: 1e9))
    train.main(["--rounds", "1", "--rows", "2", "--context", "32", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "train.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])

    speeds = result["tokens_per_second"]
    assert set(speeds) == set(train.contenders(torch.float32))
    for mode in ("fp32", "autocast", "bf16"):
        fastest = max(speed for name, speed in speeds.items() if name.startswith(f"transformers {mode},"))
        assert result[f"vs_transformers_{mode}"] == pytest.approx(speeds["moonwhale"] / fastest, abs=1e-3)
    flops = flops_per_token(MoonwhaleConfig(**TOY), 32)
    assert result["ceiling_share"] == pytest.approx(speeds["moonwhale with MTP"] * flops / 1e9, abs=1e-3) != 0
    assert result["memory_vs_transformers"] == 0.6, "of 300 MB and the more frugal 500"
    assert speeds["dense"] is result["vs_dense"] is None, "memory was too little for it"


def test_contenders_share_their_weights_and_keep_no_gradients(train):
    who = train.contenders(torch.bfloat16)
    models, tokens = train.shared(who, TOY, 32), torch.arange(64).view(2, 32) % TOY["vocab_size"]
    for name, model in models.items():
        train.step(model, who[name])(tokens)
        assert all(p.grad is None for p in model.parameters())
    weights = {next(models[name].model.parameters()).data_ptr() for name in models if name != "dense"}
    assert len(weights) == 2, "in memory once as fp32, once as bf16"


def test_models_that_differ_are_refused(train):
    tokens = torch.arange(64).view(1, 64) % TOY["vocab_size"]
    train.check_same(train.build("transformers", TOY, 64).train(), TOY, tokens)
    other = train.build("transformers", TOY, 64).train()
    other.forward = lambda *_, **__: SimpleNamespace(loss=torch.tensor(4.0))
    with pytest.raises(AssertionError):
        train.check_same(other, TOY, tokens)


def test_the_dense_peer_has_as_many_parameters_as_a_token_uses(train):
    config = MoonwhaleConfig(**PRESETS["large"].model | {"num_nextn_predict_layers": 0})
    shapes = train.dense_shapes(config, 4096)
    size = model_size(config)
    assert size.embedding == size.head, "one of them counts, in both models"
    wanted = size.active_parameters - size.embedding
    assert train.dense_active(shapes) == pytest.approx(wanted, rel=0.01)
    assert shapes["layers"] == config.num_hidden_layers and shapes["width"] == config.hidden_size


def test_memory_is_measured_in_a_process_of_its_own(train):
    contender = train.contenders(torch.bfloat16)["moonwhale"]
    wide = TOY | {"vocab_size": 20_000, "hidden_size": 256}
    assert 2 * 4 * 20_000 * 256 < train.fresh("moonwhale", train.peak_memory, contender, wide, 1, 8) < 1e9


def test_too_little_memory_is_reported(train, capsys):
    limit, _ = train.fresh("itself", resource.getrlimit, resource.RLIMIT_DATA)
    assert limit == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    assert train.fresh("a giant", bytearray, 2 * limit) is None
    assert "a giant: left out" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        train.fresh("a mistake", divmod, 1, 0)
