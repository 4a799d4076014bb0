"""Which checkpoints a run keeps, which one it names as the best, and what it returns."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from transformers import TrainerState
from transformers.utils import logging as transformers_logging

from moonwhale.checkpoint import list_checkpoints
from moonwhale.train import pretrain
from moonwhale.train.config import parse
from moonwhale.train.milestones import best_checkpoint, best_step, describe_best, milestones
from moonwhale.train.mtp_trainer import MTPTrainer


def evaluated(figures: dict[int, float], name: str = "eval_loss_main") -> list[dict]:
    return [{"step": step, name: figure} for step, figure in figures.items()]


def save(out: Path, figures: dict[int, float], name: str = "eval_loss_main") -> None:
    """Writes the log of a checkpoint of the last of these steps."""
    step = max(figures)
    checkpoint = out / f"checkpoint-{step}"
    checkpoint.mkdir()
    state = {"global_step": step, "max_steps": step, "log_history": evaluated(figures, name)}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def test_the_best_step_is_one_that_was_saved():
    history = evaluated({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.5})
    assert best_step(history, [1, 3, 4, 5, 9]) == 3
    assert best_step(history, [7]) is None and best_step([], [1]) is None
    assert (
        best_step(
            [{"step": 1, "eval_reward": 0.2}, {"step": 2, "eval_reward": 0.5}, {"step": 3, "eval_reward": None}],
            [1, 2, 3],
        )
        == 2
    )


def test_the_best_and_the_last_before_the_decay_stay(tiny_run, monkeypatch, capsys):
    losses = {1: 5.0, 2: 4.0, 3: 4.1, 4: 4.2, 5: 4.3, 6: 4.4, 7: 4.5, 8: 4.6}
    evaluate = MTPTrainer._evaluate_share

    def as_told(self, dataloader, prefix):
        output = evaluate(self, dataloader, prefix)
        self._loss_sums.per_depth[0, 0] = losses[self.state.global_step] * self._loss_sums.per_depth[2, 0]
        return output

    monkeypatch.setattr(MTPTrainer, "_evaluate_share", as_told)
    config = tiny_run(steps=8, decay_fraction=0.5, save_every=1, eval_every=1, keep_checkpoints=2)
    result = pretrain.train(config)
    assert [path.name for path in list_checkpoints(config.out)] == [f"checkpoint-{n}" for n in (8, 7, 4, 2)]
    assert result.best == Path(config.out) / "checkpoint-2" and result.checkpoints == list_checkpoints(config.out)
    said = capsys.readouterr().out
    assert f"best       {result.best}, with 4.000 on held-out data; the last step has 4.600" in said
    # What the finished run says again
    again = pretrain.train(parse(["--out", config.out, "--resume"]))
    assert again.history == result.history[:-1] and again.best == result.best


def test_a_run_says_if_its_last_step_is_the_best(tmp_path):
    save(tmp_path, {1: 3.0})
    save(tmp_path, {1: 3.0, 2: 2.0})
    assert describe_best(evaluated({1: 3.0, 2: 2.0}), tmp_path) == (
        "best       the last step, of those that were evaluated and saved: 2.000"
    )
    assert describe_best(evaluated({2: 2.0}), tmp_path) is None
    assert describe_best(evaluated({3: 3.0, 4: 2.0}), tmp_path) is None


def test_a_negative_reward_keeps_its_sign(tmp_path):
    rewards = {1: -0.3, 2: -0.9}
    save(tmp_path, {1: -0.3}, "eval_reward")
    save(tmp_path, rewards, "eval_reward")
    assert describe_best(evaluated(rewards, "eval_reward"), tmp_path) == (
        f"best       {tmp_path}/checkpoint-1, with -0.300 on held-out data; the last step has -0.900"
    )


def test_a_checkpoint_of_a_run_with_other_steps_is_not_the_best(tmp_path):
    """The shorter run has decayed at step 4. The extended one evaluates after it, too, but saves no checkpoint."""
    save(tmp_path, {2: 3.0})
    save(tmp_path, {2: 3.0, 4: 2.5})
    (tmp_path / "checkpoint-5").mkdir()  # damaged
    history = evaluated({2: 3.0, 4: 2.7, 5: 2.8, 6: 2.9})
    assert best_checkpoint(history, tmp_path) == tmp_path / "checkpoint-2"
    state = TrainerState(global_step=6, log_history=history)
    assert milestones(state, SimpleNamespace(last_shared_step=0), tmp_path) == {"checkpoint-6"}


def test_a_run_returns_its_result_and_leaves_the_process_as_it_was(tiny_run):
    backend, verbosity = matplotlib.get_backend(), transformers_logging.get_verbosity()
    shown, filters = transformers_logging.is_progress_bar_enabled(), list(warnings.filters)
    config = tiny_run(steps=2)
    result = pretrain.train(config)
    assert (matplotlib.get_backend(), transformers_logging.get_verbosity()) == (backend, verbosity)
    assert transformers_logging.is_progress_bar_enabled() == shown and warnings.filters == filters
    assert result.out == Path(config.out) and result.plot.is_file() and result.plot.name == "loss.png"
    assert [entry["step"] for entry in result.history if "loss_main" in entry] == [1, 2]
    ids = torch.tensor([result.tokenizer("the whale")["input_ids"]])
    assert result.model(input_ids=ids).logits.shape == (1, ids.shape[1], result.model.config.vocab_size)
