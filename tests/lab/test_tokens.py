"""Variants read the same number of tokens, also where the text does not fill the last step of an epoch."""

import dataclasses
import json

import pytest

from moonwhale.cli import main
from moonwhale.errors import UserError
from moonwhale.lab.config import CompareOptions, comparison
from moonwhale.lab.turn_trainer import TurnTrainer
from moonwhale.lab.variants import Variant


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


def budgeted(tokens: int, **given):
    """A comparison whose steps have 16 rows of 512 tokens, in micro-batches of 8 rows."""
    given |= {"preset": "demo", "tokens_per_step": 8192}
    return comparison(CompareOptions(tokens=tokens), given, [Variant("base", {}), Variant("other", {"lr": 1e-3})])


def steps(asked, n_rows: int) -> int:
    return dataclasses.replace(asked, n_rows=n_rows).config(asked.variants[0]).steps


def test_a_short_texts_steps_may_fit_a_budget_below_tokens_per_step():
    asked = budgeted(6000)  # the text is not read yet
    assert steps(asked, 8) == 1  # its only micro-batch is a whole epoch
    with pytest.raises(UserError, match=r"^variant base: `tokens`: 6,000 are less than the 8,192 of a step: give more"):
        steps(asked, 100)
    with pytest.raises(UserError, match=r"`tokens`: 4,000 are less than the 4,096 of a step"):
        budgeted(4000)  # whatever the text is


def test_a_short_texts_steps_may_leave_room_for_a_warm_up():
    asked = budgeted(81_920, warmup_steps=5)
    assert steps(asked, 8) == 20
    with pytest.raises(UserError, match=r"`warmup_steps`: 5 is impossible: `steps` 10 less 7 of decay leave 3 for"):
        steps(asked, 1000)
