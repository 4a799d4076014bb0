"""Tests GRPO at toy size: runs learn what is rewarded, resume exactly, and refuse impossible options."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from safetensors.torch import load_file

from moonwhale import cli
from moonwhale.checkpoint import log_history, newest_checkpoint, open_checkpoint
from moonwhale.errors import UserError
from moonwhale.posttrain.grpo import GRPOOptions, grpo
from moonwhale.train import muonclip_trainer
from moonwhale.train.run_options import parse_run


@pytest.fixture
def options(small_checkpoint, tmp_path, monkeypatch):
    """`options(**changes)` returns the options of a run of seconds. It rewards the letter e, which is easy to learn."""
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(120)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.py").write_text(
        "def e(completions, **_):\n    return [c[0]['content'].count('e') / 12 for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    given = {
        "checkpoint": str(small_checkpoint), "out": str(tmp_path / "run"), "task": "task.jsonl", "questions": 40,
        "rewards": ["letters:e", "format=0.5"], "group_size": 4, "questions_per_step": 4, "batch_size": 8, "steps": 4,
        "max_new_tokens": 12, "warmup_steps": 1, "lr": 3e-3, "eval_every": 0, "eval_questions": 4, "save_every": 0,
        "log_every": 1, "show_answers": 0, "report_to": ["none"], "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    return lambda **changes: GRPOOptions(**given | changes)


def history(out):
    return [entry for entry in log_history(newest_checkpoint(out)) if "reward" in entry]


@pytest.mark.slow
def test_answers_are_shown_without_control_sequences(options, capsys, monkeypatch):
    """rich would write them into a terminal, or if FORCE_COLOR asks for it."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    run_yaml = options(steps=1, show_answers=1)
    given = [
        f"--{name.replace('_', '-')}={getattr(run_yaml, name)}"
        for name in (
            "out",
            "task",
            "questions",
            "group_size",
            "questions_per_step",
            "batch_size",
            "steps",
            "max_new_tokens",
            "warmup_steps",
            "eval_questions",
            "show_answers",
        )
    ]
    assert cli.main(["grpo", run_yaml.checkpoint, *given, "--rewards", "letters:e", "--report-to", "none"]) == 0
    out = capsys.readouterr().out
    assert "Completion" in out and "\\x1b[" not in out


@pytest.mark.slow
def test_a_run_learns_what_is_rewarded(options, capsys):
    config = options(steps=30)
    grpo(config)
    said = capsys.readouterr().out
    assert "objective  r1: loss_type grpo, beta 0.001, epsilon 0.2" in said
    assert "held out: letters:e " in said
    log = history(config.out)
    first, last = (sum(e["rewards/letters:e/mean"] for e in part) / 5 for part in (log[:5], log[-5:]))
    assert last > 2 * first
    for name in ("rewards/format/mean", "frac_reward_zero_std", "completions/mean_length", "kl", "max_attention_logit"):
        assert name in log[-1]
    answers = pandas.read_parquet(max(Path(config.out, "completions").glob("*.parquet")))
    assert len(answers) == 16 and {"prompt", "completion", "letters:e", "format", "advantage"} <= set(answers)
    assert Path(config.out, "rewards.png").stat().st_size > 10_000
    open_checkpoint(config.out)


def assert_same_model(ours, theirs):
    a, b = (load_file(Path(config.out, "model.safetensors")) for config in (ours, theirs))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"save_every": 2}, {"questions": 12, "steps": 6, "save_every": 4}],
    ids=["first pass over the questions", "second pass over the questions"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(options, tmp_path, changes):
    whole, part = options(out=str(tmp_path / "whole"), **changes), options(**changes)
    grpo(whole)
    grpo(part)
    shutil.rmtree(Path(part.out, f"checkpoint-{part.steps}"))
    Path(part.out, "model.safetensors").unlink()
    grpo(parse_run(GRPOOptions, ["--out", part.out, "--resume"]))
    assert_same_model(part, whole)


def test_the_order_of_questions_depends_on_the_pass_alone():
    from trl.trainer.utils import RepeatSampler

    from moonwhale.posttrain.grpo_trainer import _OrderOfPass

    trainer = SimpleNamespace(state=SimpleNamespace(epoch=0))
    trls, ours = (RepeatSampler(range(20), mini_repeat_count=2, seed=3) for _ in range(2))
    order = _OrderOfPass(ours, trainer)
    first = list(order)
    assert first == list(trls) and len(order) == 40
    trainer.state.epoch = 1.25
    second = list(order)
    assert second != first and list(order) == second
    trainer.state.epoch = 0.5
    assert list(order) == first


@pytest.mark.slow
def test_more_steps(options, tmp_path, capsys):
    """A finished run is extended, and equals one that was to take so many steps from the start."""
    whole, part = options(out=str(tmp_path / "whole"), steps=6), options(save_every=2)
    grpo(whole)
    grpo(part)
    capsys.readouterr()
    grpo(parse_run(GRPOOptions, ["--out", part.out, "--resume", "--steps", "6"]))
    assert "schedule   4 steps become 6: the learning rate stays constant" in capsys.readouterr().out
    assert_same_model(part, whole)


def test_the_steps_that_runs_of_different_lengths_share(options):
    assert options(steps=12).shared_steps(7) == options(steps=7).shared_steps(12) == 7
    assert options(steps=12, iterations=2).shared_steps(7) == 6  # the answers of step 7 are in no checkpoint
    assert options(steps=12, warmup_steps=8).shared_steps(7) == 0


@pytest.mark.slow
def test_a_run_goes_on_where_new_answers_are_drawn(options, tmp_path, monkeypatch):
    """With several iterations, a checkpoint between them could not be resumed: it does not hold the answers."""
    from moonwhale.train.callbacks import StopAtStepEnd

    of_both = {"iterations": 2, "steps": 7, "save_every": 3, "eval_every": 3}
    whole, part = options(out=str(tmp_path / "whole"), **of_both), options(**of_both)
    grpo(whole)
    assert {path.name for path in Path(whole.out).glob("checkpoint-*")} >= {"checkpoint-6", "checkpoint-7"}

    def stop_in_step_3(self, args, state, control, **_):
        self.stop_requested |= state.global_step == 2

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StopAtStepEnd, "on_step_begin", stop_in_step_3)
        grpo(part)
    assert [path.name for path in Path(part.out).glob("checkpoint-*")] == ["checkpoint-4"]
    grpo(parse_run(GRPOOptions, ["--out", part.out, "--resume"]))
    assert_same_model(part, whole)


def test_a_step_of_several_micro_batches_and_iterations(options):
    config = options(batch_size=4, iterations=2, objective="trl")
    grpo(config)
    assert [entry["step"] for entry in history(config.out)] == [1, 3]  # the other steps learn from the same answers
    log = [entry for entry in log_history(newest_checkpoint(config.out)) if "entropy" in entry]
    assert len(log) == 4 and "kl" not in log[0]
    assert log[0]["clip_ratio/region_mean"] == 0 < log[3]["clip_ratio/region_mean"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch_size": 5}, "`batch_size`: 5 x 1 device(s) does not divide the 16 answers of a step (`group_size` 4 x "
                            "`questions_per_step` 4): give `batch_size` 4"),
        ({"group_size": 1}, "`group_size`: 1 is impossible: an answer is compared with at least one other"),
        ({"temperature": 0.0}, "`temperature`: 0.0 is impossible"),
        ({"warmup_steps": 99}, "`warmup_steps`: 99 is impossible: the run has 4 steps: give at most that"),
        ({"questions": 2}, "`questions`: 2 are fewer than `questions_per_step`"),
        ({"questions": 4000}, "has 109 training questions, not 4000"),
        ({"beta": -1.0}, "`beta`: -1.0 is impossible"),
        ({"task": "sums"}, "'sums' is no task of reasoning-gym"),
        ({"rewards": ["letters:a"]}, "cannot import letters:a"),
        ({"checkpoint": "nowhere"}, "nowhere is no folder"),
    ],
)  # fmt: skip
def test_impossible_options_are_one_line(options, changes, complaint):
    with pytest.raises(UserError) as error:
        grpo(options(**changes))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_the_ratio_is_clipped_only_after_a_first_step():
    with pytest.raises(UserError, match=r"^`epsilon`: it has no effect with `iterations` 1: leave it out"):
        parse_run(GRPOOptions, ["base", "--epsilon", "0.1"])
    assert parse_run(GRPOOptions, ["base", "--epsilon", "0.1", "--iterations", "2"]).epsilon == 0.1


def test_a_failing_reward_stops_the_run_with_one_line(options, tmp_path):
    (tmp_path / "broken.py").write_text("def f(completions, **_): return [1 / 0]\n")
    with pytest.raises(UserError, match=r"broken:f raised ZeroDivisionError \(division by zero\) on prompt '\d+\+"):
        grpo(options(rewards=["broken:f"]))


def test_non_finite_weights_draw_no_answers(options, monkeypatch):
    """A rollout checks the weights, because on a GPU the trainer does not check the loss in every step."""
    from moonwhale.posttrain.grpo_trainer import MTPGRPOTrainer

    def compute_loss(self, *args, **kwargs):
        return compute(self, *args, **kwargs) * (torch.nan if self.state.global_step == 1 else 1.0)

    compute = MTPGRPOTrainer.compute_loss
    monkeypatch.setattr(MTPGRPOTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(muonclip_trainer, "needs_static_shapes", lambda device: True)
    with pytest.raises(UserError, match=r"^step 2: the loss is nan; no checkpoint was written yet"):
        grpo(options(log_every=10))


def test_the_engine_and_generate_draw_from_the_same_policy(options, small_checkpoint):
    """The trainer's rollout and transformers' `generate` give the same greedy answers."""
    from moonwhale.infer.engine import Engine

    model, tokenizer = open_checkpoint(small_checkpoint)
    engine = Engine(model, tokenizer)
    ids = engine.encode([{"role": "user", "content": "4+4"}])
    ours = engine.generate([ids], temperature=0.0, max_new_tokens=12)[0].token_ids
    with torch.no_grad():
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :].tolist()
    assert ours == theirs[: len(ours)]


def test_changed_questions_are_noticed(options, tmp_path):
    config = options(steps=1)
    grpo(config)
    shutil.rmtree(Path(config.out, "checkpoint-1"))
    Path(config.out, "config.json").unlink()  # as if the run had been killed before its first checkpoint
    (tmp_path / "task.jsonl").write_text((tmp_path / "task.jsonl").read_text().replace("+", "-"))
    resumed = options(steps=1, resume=True)
    with pytest.raises(UserError, match=r"^`task`: task.jsonl has changed since the run in .* began"):
        grpo(resumed)
    Path(config.out, "data.txt").unlink()
    grpo(resumed)  # a run from before `data.txt` takes what it gets


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (["none:all", "format"], r"reward 0.000  format 0.000  no signal .*\n.*held out: format 0.000"),
        (["none:all"], r"no reward applies  KL .*\n.*held out: no reward applies"),
        (["none:but_one"], r"reward 1.000  none:but_one 1.000"),
    ],
)
def test_rewards_that_do_not_apply(options, tmp_path, rewards, said, capsys):
    """TRL's semantics: None leaves a reward out. A completion without any reward teaches nothing."""
    (tmp_path / "none.py").write_text(
        "def all(completions, **_): return [None] * len(completions)\n"
        "def but_one(completions, **_): return [None] * (len(completions) - 1) + [1]\n"
    )
    grpo(options(rewards=rewards, steps=1))
    assert re.search(said, capsys.readouterr().out)


def test_an_unknown_reporter_is_one_line_before_anything_is_written(options):
    config = options(report_to=["tensorbord"])
    with pytest.raises(UserError, match=r"^`report_to`: 'tensorbord' is no reporter .*did you mean tensorboard"):
        grpo(config)
    assert not Path(config.out).exists()
