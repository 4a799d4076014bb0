"""Samples of text during a run leave the run as it is."""

import re

import pytest
import torch
from safetensors.torch import load_file

from moonwhale.checkpoint import log_history, newest_checkpoint
from moonwhale.errors import UserError
from moonwhale.train import pretrain, samples


def test_samples_change_nothing(tiny_run, tmp_path, capsys, monkeypatch):
    """Not a weight, and not a logged loss."""
    plain = tiny_run(steps=4, out=str(tmp_path / "plain"))
    pretrain.train(plain)
    capsys.readouterr()
    sampling = tiny_run(steps=4, sample_every=2, sample_prompt="the whale")
    pretrain.train(sampling)
    found = re.findall(r"^step      (\d)  sample: the whale(.+)$", capsys.readouterr().out, re.MULTILINE)
    assert [step for step, _ in found] == ["2", "4"]
    ours, theirs = (load_file(f"{config.out}/model.safetensors") for config in (sampling, plain))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    logs = [[e["loss"] for e in log_history(newest_checkpoint(c.out)) if "loss" in e] for c in (sampling, plain)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("prompt", "context"), [("", 96), ("whale " * 200, 96), ("moon", 8)])
def test_a_sample_fits_the_context(small_model, small_tokenizer, prompt, context, monkeypatch):
    monkeypatch.setattr(small_model.config, "max_position_embeddings", context)

    class Trainer:
        model, processing_class = small_model.train(), small_tokenizer

    lengths, forward = [], small_model.forward
    monkeypatch.setattr(
        small_model, "forward", lambda **given: (lengths.append(given["input_ids"].shape[1]), forward(**given))[1]
    )
    sampler, before = samples.SampleText(Trainer, 1, prompt), torch.get_rng_state()
    assert sampler.sample() == sampler.sample()
    assert max(lengths) < context and len(lengths) <= 2 * samples.SAMPLE_TOKENS
    assert torch.equal(torch.get_rng_state(), before) and small_model.training
    small_model.eval()


def test_a_split_model_writes_no_samples(tiny_run):
    with pytest.raises(UserError, match=r"^`sample_every`: no rank holds the whole model"):
        tiny_run(sample_every=1, parallel={"fsdp": True})
