"""`moonwhale compare` at toy size: all variants and seeds, reuse, kills, and both kinds of budget."""

import errno
import json
import math
import os
import shutil
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from moonwhale.cli import main
from moonwhale.lab import turn_trainer
from moonwhale.lab.config import CompareOptions, comparison
from moonwhale.lab.runs import Rows, Run
from moonwhale.lab.turn_trainer import TurnTrainer
from moonwhale.lab.variants import Variant
from moonwhale.manifest import write_manifest

STEPS = ("--steps", "4", "--turns", "2")
SECONDS = ("--seconds", "8", "--turns", "2", "--vary", "lr=1e-2", "--seeds", "1")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory):
    """The folder of a comparison of two variants with two seeds, and what it printed."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("lab") / "compare"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*arguments, *STEPS, "--vary", "lr=1e-2,6e-3", "--seeds", "2", "--out", str(out)]) == 0
    return out, printed.getvalue()


def result(out) -> dict:
    return json.loads((out / "comparison.json").read_text())


def bits(out) -> dict:
    return {(run["variant"], run["seed"]): run["bits_per_byte"] for v in result(out)["variants"] for run in v["runs"]}


def test_the_figures_belong_together(compared):
    out, _ = compared
    base, other = result(out)["variants"]
    assert (base["name"], base["changes"], other["changes"]) == ("base", {}, {"lr": [0.006, 0.01]})
    for variant in (base, other):
        runs = variant["runs"]
        assert [run["seed"] for run in runs] == [0, 1]
        assert variant["bits_per_byte"] == pytest.approx(sum(run["bits_per_byte"] for run in runs) / 2)
        for run in runs:
            assert (run["steps"], run["tokens"]) == (4, 512)
            assert run["tokens_per_second"] == pytest.approx(512 / run["seconds"])
            assert [point["tokens"] for point in run["curve"]] == [256, 512]
            assert run["curve"][-1]["bits_per_byte"] == run["bits_per_byte"]
    differences = [b["bits_per_byte"] - a["bits_per_byte"] for a, b in zip(base["runs"], other["runs"], strict=True)]
    assert other["difference"]["mean"] == pytest.approx(sum(differences) / 2)
    half_width = 12.7062 * abs(differences[0] - differences[1]) / 2  # t(0.975, 1) s / √2
    assert other["difference"]["half_width"] == pytest.approx(half_width, rel=1e-4)


def test_what_is_printed(compared):
    out, printed = compared
    lines = printed.splitlines()
    assert "runs       4 to train: 16 steps; evaluations and checkpoints come on top" in lines
    assert any(line.startswith("time       about ") for line in lines)
    assert any(line.startswith("lr=0.01, seed 1: ") and line.endswith(" tokens/s") for line in lines)
    assert lines[-1] == f"page       {out}/comparison.html; all figures: {out}/comparison.json"
    assert lines[-3].startswith("base ") and lines[-2].startswith("lr=0.01 ")


def test_each_run_leaves_a_model_that_opens(compared):
    from moonwhale.checkpoint import open_checkpoint

    folders = sorted((compared[0] / "runs").iterdir())
    assert len(folders) == 4
    for folder in folders:
        assert not list(folder.glob("checkpoint-*"))
        open_checkpoint(folder)


def test_a_run_is_the_one_that_train_makes(compared, arguments, text_folder, tmp_path):
    """Turns change nothing: the same weights as one run without a stop."""
    from safetensors.torch import load_file

    (folder,) = (compared[0] / "runs").glob("base-seed1-*")
    options = ["--steps", "4", "--seed", "1", "--report-to", "none", "--out", str(tmp_path / "run")]
    assert main(["train", *arguments[1:], *options]) == 0
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_repeated_comparison_trains_nothing_and_an_added_seed_only_itself(compared, arguments, capsys, monkeypatch):
    out, before = compared[0], bits(compared[0])
    trained = []
    train = Run._train
    monkeypatch.setattr(Run, "_train", lambda run, *rest: (trained.append(run.name), train(run, *rest)))
    again = [*arguments, *STEPS, "--vary", "lr=1e-2", "--out", str(out), "--seeds"]
    assert main([*again, "2"]) == 0
    assert not trained and "runs       all 4 are there already" in capsys.readouterr().out
    assert main([*again, "3"]) == 0
    assert set(trained) == {"base, seed 2", "lr=0.01, seed 2"}
    assert before.items() < bits(out).items()


def test_the_page_shows_the_table_and_loads_nothing(compared):
    page = (compared[0] / "comparison.html").read_text()
    for variant in result(compared[0])["variants"]:
        assert f"{variant['bits_per_byte']:.4f}" in page
    assert page.count("<svg") == 2
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_an_interrupted_and_killed_comparison_ends_with_the_same_figures(
    compared, arguments, tmp_path, capsys, monkeypatch
):
    """Ctrl-C in the middle of a turn; then an end without any clean-up, as by kill -9, in the middle of another."""
    count, begin, out = TurnTrainer._count_step, TurnTrainer.create_scheduler, tmp_path / "out"
    command = [*arguments, *STEPS, "--vary", "lr=1e-2", "--seeds", "1", "--out", str(out)]

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return begin(*args, **kwargs)

    def dying(trainer):
        if trainer.state.global_step == 4:
            raise Killed
        count(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(TurnTrainer, "create_scheduler", interrupted)
        assert main(command) == 130
    assert "stopped    all runs are saved; go on with the same command" in capsys.readouterr().out
    assert [path.name for path in out.glob("runs/*/checkpoint-*")] == ["checkpoint-1"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TurnTrainer, "_count_step", dying)
        main(command)
    assert [path.name for path in out.glob("runs/*/checkpoint-*")] == ["checkpoint-2"] * 2
    assert main(command) == 0
    assert bits(out).items() <= bits(compared[0]).items()


@pytest.fixture
def slow_start(monkeypatch):
    """A step takes 1 s by the trainer's clock, an evaluation 100 s, and a turn's first step 50 s."""
    clock = [0.0]
    evaluation, begin, step = (
        getattr(TurnTrainer, name) for name in ("evaluation_loop", "create_scheduler", "training_step")
    )

    def taking(seconds, method):
        def wrapped(*args, **kwargs):
            clock[0] += seconds
            return method(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(turn_trainer.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(TurnTrainer, "evaluation_loop", taking(100, evaluation))
    monkeypatch.setattr(TurnTrainer, "create_scheduler", taking(49, begin))
    monkeypatch.setattr(TurnTrainer, "training_step", taking(0.5, step))  # of two micro-batches


def test_a_budget_of_seconds_counts_training_alone(arguments, tmp_path, slow_start):
    assert main([*arguments, *SECONDS, "--out", str(tmp_path / "out")]) == 0
    for variant in result(tmp_path / "out")["variants"]:
        (run,) = variant["runs"]
        assert (run["steps"], run["seconds"], run["tokens_per_second"]) == (8, 8.0, 128.0)
        assert [point["seconds"] for point in run["curve"]] == [4.0, 8.0]


@pytest.mark.parametrize(
    ("interrupted", "steps"),
    [([1], 9), ([7, 8], 8)],
    ids=["the run's first step does not count", "the turn's first step counts as those before, and ends the run"],
)
def test_ctrl_c_in_a_turns_first_step_does_not_count_its_warm_up(
    interrupted, steps, arguments, tmp_path, slow_start, monkeypatch
):
    command = [*arguments, *SECONDS, "--out", str(tmp_path / "out")]
    step, left = TurnTrainer.training_step, list(interrupted)

    def interrupting(trainer, *args, **kwargs):
        if left and trainer.state.global_step == left[0] - 1 and trainer.args.learning_rate != 1e-2:
            del left[0]
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(TurnTrainer, "training_step", interrupting)
    for _ in interrupted:
        assert main(command) == 130
    assert main(command) == 0
    (run,) = result(tmp_path / "out")["variants"][0]["runs"]
    assert (run["steps"], run["seconds"]) == (steps, 8.0)
    assert [point["seconds"] for point in run["curve"]] == [4.0, 8.0]


def test_rate_and_mtp_weight_follow_the_seconds(arguments, tmp_path, slow_start, monkeypatch):
    """Of 8 s, the rate rises in the first 40 % and falls in the last 50 %. MTP starts after 30 %. As long as the time
    of a turn's first step is unknown, the second step takes the rate of the first.
    """
    step, seen = TurnTrainer.training_step, {}

    def looking(trainer, *args, **kwargs):
        group, weight = trainer.optimizer.param_groups[0], trainer._language_model.mtp_loss_weight
        run = seen.setdefault(trainer.args.learning_rate, {})
        run[trainer.state.global_step] = group["lr"] / group["initial_lr"], weight
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(TurnTrainer, "training_step", looking)
    schedule = ["--warmup-steps", "180", "--decay-fraction", "0.5"]  # of the preset's 450 steps
    schedule += ["--mtp-start", "0.3", "--model.mtp_loss_weight", "0.1", "--mtp-loss-weight-final", "0.2"]
    assert main([*arguments, *SECONDS, *schedule, "--out", str(tmp_path / "out")]) == 0
    assert len(seen) == 2
    for run in seen.values():
        rates, weights = zip(*run.values(), strict=True)
        assert rates == pytest.approx([0, 0, 0.625, 0.9375, 1, 1, 0.5, 0.25])  # after 0, 0, 2, 3, 4, 4, 6 and 7 s
        assert weights == (0, 0, 0, 0.1, 0.2, 0.2, 0.2, 0.2)


def test_the_peak_memory_is_that_of_the_largest_turn(arguments, tmp_path, monkeypatch):
    """The first turn is left out, since libraries allocate in it. The MTP modules may be trained in late turns only."""
    peaks = iter([9, 9, 3, 3, 4, 4, 6, 6])  # of two runs that take turns

    @contextmanager
    def peak_memory(device):
        yield SimpleNamespace(bytes=next(peaks))

    monkeypatch.setattr("moonwhale.lab.runs.PeakMemory", peak_memory)
    command = [*arguments, "--steps", "4", "--turns", "4", "--vary", "lr=1e-2", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert [variant["runs"][0]["peak_memory_bytes"] for variant in result(tmp_path / "out")["variants"]] == [6, 6]


def test_a_run_that_diverges_is_said_to(arguments, tmp_path, capsys):
    """A learning rate of 1e15 ends in NaN. The others' figures stay."""
    command = [*arguments, *STEPS, "--vary", "lr=1e15", "--grad-clip", "0", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    base, other = result(tmp_path / "out")["variants"]
    assert base["diverged"] == 0 and math.isfinite(base["bits_per_byte"])
    assert other["diverged"] == 1 and "bits_per_byte" not in other and "difference" not in other
    assert "lr=1e+15  1 of 1 diverged" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(compared, arguments, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear moon")
    vary = [*STEPS, "--vary", "lr=1e-2", "--out"]
    assert main([*arguments, *vary, str(tmp_path)]) == 2
    assert "holds files that are not a comparison's" in capsys.readouterr().err
    others = {
        ("--momentum", "0.9"): "base has momentum 0.95, not 0.9",
        ("--model.moba_topk", "1"): "base has model.moba_topk 2, not 1",
        ("--turns", "3"): "base has turns 2, not 3",
        ("--steps", "5"): "base has steps 4, not 5",
        ("--data-documents", "30"): "base has data_documents None, not 30",
    }
    for changed, line in others.items():
        assert main([*arguments, *vary, str(compared[0]), *changed]) == 2
        error = capsys.readouterr().err
        assert "holds another comparison" in error and line in error and error.count("\n") == 1


def refused(capsys) -> str:
    """The line of error of a comparison that was refused."""
    error = capsys.readouterr().err.removeprefix("compiling training steps for this machine, once\n")
    assert error.startswith("moonwhale: error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("content", [b"\xff", b"[", b"[]", b"[" * 100_000])
def test_a_base_that_cannot_be_read_is_one_line(content, arguments, tmp_path, capsys):
    (tmp_path / "base.json").write_bytes(content)
    assert main([*arguments, *STEPS, "--vary", "lr=1e-2,6e-3", "--out", str(tmp_path)]) == 2
    error = refused(capsys)
    assert f"--out: cannot read {tmp_path}/base.json: " in error and "name another folder" in error


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.clear(),
        lambda result: result.update(bits_per_byte="x"),
        lambda result: result.update(seconds=float("nan")),
        lambda result: result.update(tokens=10**400),
        lambda result: result.update(curve=[{}]),
        lambda result: result["curve"][0].update(tokens=0),
        lambda result: result.update(options=[]),
        lambda result: result.update(diverged=5),
        lambda result: result.update(variant=None),
        lambda result: result.update(peak_memory_bytes="x"),
    ],
)
def test_a_result_that_cannot_be_read_is_one_line(change, compared, arguments, tmp_path, capsys):
    out = shutil.copytree(compared[0], tmp_path / "out")
    path = min(out.glob("runs/*/result.json"))
    changed = json.loads(path.read_text())
    change(changed)
    path.write_text(json.dumps(changed))
    assert main([*arguments, *STEPS, "--vary", "lr=1e-2,6e-3", "--seeds", "2", "--out", str(out)]) == 2
    error = refused(capsys)
    assert f"cannot read {path}: " in error and f"delete {path.parent} to train this run again" in error


def test_a_log_that_cannot_be_read_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    command = [*arguments, *STEPS, "--vary", "lr=1e-2,2e-2", "--seeds", "1", "--out", str(tmp_path / "out")]

    def killed(run):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "_measured", killed)
        main(command)
    checkpoint = max((tmp_path / "out").glob("runs/*/checkpoint-*"))
    good = (checkpoint / "trainer_state.json").read_text()
    for change in (
        lambda state: state.update(log_history=[]),
        lambda state: [entry.pop("seconds") for entry in state["log_history"]],
        lambda state: [entry.update(step="x") for entry in state["log_history"]],
        lambda state: [entry.update(eval_bits_per_byte=None) for entry in state["log_history"]],
        lambda state: state.update(train_batch_size="x"),
        lambda state: state.update(x=1),
    ):
        state = json.loads(good)
        change(state)
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
        capsys.readouterr()
        assert main(command) == 2
        assert str(checkpoint) in refused(capsys)


def test_a_full_disk_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.Trainer._save_checkpoint", full)
    assert main([*arguments, *STEPS, "--vary", "lr=1e-2", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "no space left on the disk" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--vary", "model.num_experts_per_tok=9"], "variant num_experts_per_tok=9: --model.num_experts_per_tok=9"),
        (["--vary", "lr=1", "--device", "warp"], "--device: unknown device 'warp'"),
        (["--vary", "lr=1", "--data", "nowhere.txt"], "--data: no such file"),
        (
            ["--vary", "batch_size=64", "--tokens-per-step", "2048"],
            "variant batch_size=64: --batch-size: 64 rows are computed at once, but the text fills only ",
        ),
    ],
)
def test_what_only_the_machine_can_tell_is_one_line_too(argv, line, arguments, tmp_path, capsys):
    assert main([*arguments, *argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_a_run_is_known_by_what_decides_its_result(arguments, tmp_path):
    """Its folder depends on options, seed, budget and data, not on its name or on how often it logs."""

    shards = SimpleNamespace(index={})
    split = SimpleNamespace(shards=shards)
    rows = Rows(SimpleNamespace(train=split, held_out=split), None, None)

    def folder(name="x", seed=0, file="a", **given):
        shards.index = {"files": file}
        own = CompareOptions(out=str(tmp_path), tokens=40960)
        variant = Variant(name, {"lr": 1e-3})
        asked = comparison(own, {"device": "cpu", "warmup_steps": 1, **given}, [Variant("base", {}), variant])
        return Run(asked, variant, seed, rows).folder.name.rpartition("-")[2]

    assert folder() == folder("y")
    different = [folder(), folder(seed=1), folder(file="b"), folder(grad_clip=2.0), folder(eval_rows=3)]
    different += [folder(model={"moba_topk": 1}), folder(tokens_per_step=8192)]
    assert len(set(different)) == len(different)
