"""Variants read the same number of tokens, also where the text does not fill the last step of an epoch."""

import json

from moonwhale.cli import main
from moonwhale.lab.turn_trainer import TurnTrainer


def test_a_budget_of_tokens_is_what_the_trainer_reads(arguments, tmp_path, monkeypatch):
    """The text fills about twenty micro-batches, and steps of seven or of eight do not both divide them."""
    counted = {7: 0, 8: 0}  # tokens by micro-batches per step
    step, out = TurnTrainer.training_step, tmp_path / "out"

    def counting(trainer, model, inputs, *args):
        counted[trainer.args.gradient_accumulation_steps] += inputs["input_ids"].numel()
        return step(trainer, model, inputs, *args)

    monkeypatch.setattr(TurnTrainer, "training_step", counting)
    command = [*arguments, "--tokens-per-step", "448", "--vary", "tokens_per_step=512", "--tokens", "2600"]
    assert main([*command, "--turns", "2", "--seeds", "1", "--out", str(out)]) == 0
    runs = [variant["runs"][0] for variant in json.loads((out / "comparison.json").read_text())["variants"]]
    assert [run["tokens"] for run in runs] == [run["curve"][-1]["tokens"] for run in runs] == list(counted.values())
    assert all(2600 - 512 < run["tokens"] <= 2600 for run in runs)
    assert any(run["tokens"] < run["steps"] * run["options"]["tokens_per_step"] for run in runs)
