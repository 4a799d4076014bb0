"""A run that breaks is reported as diverged, and no run is trained for ever."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from moonwhale.cli import main
from moonwhale.lab.config import Budget
from moonwhale.lab.runs import Run
from moonwhale.lab.training import Training
from moonwhale.lab.turn_trainer import TurnTrainer


class Killed(BaseException):
    pass


@pytest.mark.parametrize("evaluated", [True, False], ids=["the evaluation shows it", "only the weights show it"])
def test_an_update_that_breaks_the_model_is_a_divergence(evaluated, arguments, tmp_path, monkeypatch):
    """Also if the comparison was killed before it had written so."""
    evaluate, end, out = TurnTrainer.evaluation_loop, Run._end, tmp_path / "out"
    command = [*arguments, "--steps", "2", "--turns", "1", "--vary", "lr=1e-2", "--seeds", "1", "--out", str(out)]

    def breaking(trainer, *args, **kwargs):
        weight = trainer.model.lm_head.weight.detach()
        broken = trainer.args.learning_rate == 1e-2
        if broken and evaluated:
            weight.fill_(math.nan)
        output = evaluate(trainer, *args, **kwargs)
        if broken:
            weight.fill_(math.nan)
        return output

    def killed(run, figures):
        if "diverged" in figures:
            raise Killed
        end(run, figures)

    monkeypatch.setattr(TurnTrainer, "evaluation_loop", breaking)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "_end", killed)
        main(command)
    assert main(command) == 0
    base, other = json.loads((out / "comparison.json").read_text())["variants"]
    assert (base["diverged"], other["diverged"]) == (0, 1)
    assert ("step 2: the held-out text takes nan" if evaluated else "step 2: a weight is not finite") in other["runs"][
        0
    ]["diverged"]


def test_a_huge_loss_is_no_divergence(arguments, tmp_path, monkeypatch):
    """It is beyond the range of exp: the perplexity is infinite."""
    evaluate, out = TurnTrainer.evaluation_loop, tmp_path / "out"

    def loud(trainer, *args, **kwargs):
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1e6)
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(TurnTrainer, "evaluation_loop", loud)
    command = [*arguments, "--steps", "2", "--turns", "1", "--vary", "lr=1e-2", "--seeds", "1", "--out", str(out)]
    assert main(command) == 0
    assert all(v["bits_per_byte"] > 1000 for v in json.loads((out / "comparison.json").read_text())["variants"])


def test_a_turn_without_a_step_is_an_error():
    """Otherwise the run would come next for ever."""
    turns, budget = iter([None]), Budget("steps", 4)
    run = SimpleNamespace(name="x", config=SimpleNamespace(seed=0), budget=budget, result=None, position=0, share=0.0)
    run.take_turn = lambda *_: next(turns)
    with pytest.raises(RuntimeError, match="x: a turn trained no step"):
        Training(SimpleNamespace(budget=budget)).finish([run])
