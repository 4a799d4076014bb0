"""`moonwhale train` over a pipeline of processes is the run that one process makes, and its folder is the same."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ddp import assert_close, torchrun

from moonwhale.train import arguments, checkpoints, pretrain

OPTIONS = {
    "steps": 6,  # an epoch of 39 rows has 4 steps of 5 micro-batches, the last of them of 4
    "tokens_per_step": 320,
    "save_every": 3,
    "eval_every": 3,
    "lr": 1e-3,
    "qk_clip_tau": 2e-3,
    "mtp_loss_weight_final": 0.1,
    "decay_fraction": 0.4,
    "model": {"num_hidden_layers": 4, "bias_update_speed": 0.01, "aux_loss_alpha": 0.01},
}


@pytest.fixture
def one(tiny_run, tmp_path, monkeypatch):
    """`one(**options)`: a run of one process, finished, with its options in tmp_path/run.yaml."""
    from moonwhale.optim import muonclip

    monkeypatch.setattr(muonclip, "_fast_dtype", lambda device: torch.float32)

    def one(**options):
        config = tiny_run(**OPTIONS, **options, out=str(tmp_path / "one"))
        pretrain.train(config)
        arguments.write(config, tmp_path / "run.yaml")
        return config

    return one


@pytest.mark.slow
def test_a_pipeline_is_one_process(one, tmp_path):
    config = one()
    out = tmp_path / "two"
    pipeline = ("--config", str(tmp_path / "run.yaml"), "--out", str(out), "--parallel.pp", "2")
    said = torchrun(*pipeline, "--parallel.schedule", "dualpipev")
    assert said.count("step      2  loss") == 1 and "dualpipev over 2 processes" in said
    assert_close(out, config.out)
    for folder in ("checkpoint-3", "checkpoint-6", "."):
        assert set(os.listdir(out / folder)) == set(os.listdir(Path(config.out) / folder))
    log = checkpoints.history(checkpoints.newest(out))
    assert any(entry.get("clipped_heads", 0) > 0 for entry in log)

    # back on one process from the middle, and from there on two again
    for path in (*out.glob("checkpoint-6"), *out.glob("config.json"), *out.glob("model.safetensors")):
        path.rename(tmp_path / f"aside-{path.name}")
    pretrain.train(arguments.parse(["--out", str(out), "--resume", "--parallel.pp", "1"]))
    assert_close(out, config.out)
    other = Path(config.out)
    for path in (*other.glob("checkpoint-6"), *other.glob("config.json"), *other.glob("model.safetensors")):
        path.rename(tmp_path / f"one-{path.name}")
    torchrun("--out", str(other), "--resume", "--parallel.pp", "2", "--parallel.schedule", "1f1b")
    a, b = load_file(other / "model.safetensors"), load_file(tmp_path / "one-model.safetensors")
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
