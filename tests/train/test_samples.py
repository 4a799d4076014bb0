"""Samples of text during a run leave the run as it is."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from moonwhale import cli
from moonwhale.checkpoint import log_history, newest_checkpoint
from moonwhale.errors import UserError
from moonwhale.train import pretrain, samples
from moonwhale.train.config import parse
from moonwhale.yaml_files import write_yaml


def test_samples_change_nothing(tiny_run, tmp_path, capsys):
    """Not a weight, not a logged loss, and not how a resumed run goes on."""
    plain = tiny_run(steps=4, out=str(tmp_path / "plain"))
    pretrain.train(plain)
    capsys.readouterr()
    sampling = tiny_run(steps=4, sample_every=2, sample_prompt="the whale", save_every=2)
    pretrain.train(sampling)
    found = re.findall(r"^step      (\d)  sample: the whale(.+)$", capsys.readouterr().out, re.MULTILINE)
    assert [step for step, _ in found] == ["2", "4"]
    shutil.rmtree(newest_checkpoint(sampling.out))
    pretrain.train(dataclasses.replace(sampling, resume=True))
    assert re.findall(r"^step      (\d)  sample: ", capsys.readouterr().out, re.MULTILINE) == ["4"]
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


def test_presets_that_people_watch_write_samples():
    assert {name: parse(["--preset", name]).sample_every for name in ("demo", "evening", "small")} == {
        "demo": 100,
        "evening": 500,
        "small": 200,
    }
    assert parse(["--sample-every", "0"]).sample_every == 0


def test_a_run_of_an_earlier_version_had_none(tmp_path):
    recorded = dataclasses.asdict(parse(["--out", str(tmp_path)]))
    del recorded["sample_every"], recorded["embedding_lr"]
    write_yaml(tmp_path / "run.yaml", recorded, "an earlier version")
    config = parse(["--config", str(tmp_path / "run.yaml")])
    assert (config.sample_every, config.embedding_lr) == (0, 1.0), "the defaults, not the preset's"


def test_a_split_model_writes_no_samples(tiny_run, tmp_path):
    with pytest.raises(UserError, match=r"^`sample_every`: no rank holds the whole model"):
        tiny_run(sample_every=1, parallel={"fsdp": True})
    with pytest.raises(UserError, match=r"^`sample_every`: no rank holds the whole model"):
        parse(["--parallel.fsdp", "true", "--sample-every", "150"])
    assert parse(["--parallel.fsdp", "true"]).sample_every == 0, "which only the preset asks for"
    write_yaml(tmp_path / "run.yaml", dataclasses.asdict(parse([])), "a run of one process")
    assert parse(["--config", str(tmp_path / "run.yaml"), "--parallel.fsdp", "true"]).sample_every == 0


def test_samples_stay_out_of_json(tiny_run, capsys):
    """Standard output holds one object, standard error the samples."""
    path = tiny_run(steps=2, sample_every=1).out + ".yaml"
    write_yaml(path, dataclasses.asdict(tiny_run(steps=2, sample_every=1)), "the test's")
    assert cli.main(["train", "--config", path, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 2 and err.count("  sample: ") == 2
