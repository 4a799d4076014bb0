"""However a run is stopped, resuming it gives the same model, bit for bit, as an uninterrupted run."""

import errno
import hashlib
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from forked import ForkedProcess
from moonwhale import cli, manifest
from moonwhale.checkpoint import (
    clear_unfinished,
    find_damage,
    list_checkpoints,
    log_history,
    newest_checkpoint,
    publish_checkpoint,
    step_of,
    unfinished_folder,
)
from moonwhale.errors import UserError
from moonwhale.train import callbacks, muonclip_trainer, pretrain
from moonwhale.train.config import parse
from moonwhale.train.mtp_trainer import MTPTrainer
from moonwhale.train.run_folder import check_data_unchanged, write_run_file

# 39 rows in micro-batches of 2, two of them a step: an epoch is 10 steps, the last of one micro-batch.
LONG = {"steps": 14, "decay_fraction": 0.3, "mtp_loss_weight_final": 0.1}


def resume(out, *argv: str) -> None:
    pretrain.train(parse(["--out", str(out), "--resume", *argv]))


def at_step(monkeypatch, step: int, act) -> None:
    """Calls `act()` while step number `step` is computed."""
    original = MTPTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MTPTrainer, "training_step", training_step)


def interrupt(monkeypatch, config, step: int, number=signal.SIGINT) -> None:
    """Starts a run and presses Ctrl-C, or raises another signal, while it computes step number `step`."""
    pressed = []

    def press():
        if not pressed:  # once, though a step has several micro-batches
            pressed.append(True)
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        at_step(patch, step, press)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train(config)


def crash(monkeypatch, config, step: int) -> None:
    """Starts a run that raises in the middle of step number `step`."""

    def die():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        at_step(patch, step, die)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain.train(config)


def losses(out) -> list[dict]:
    """The log history without the values that depend on the clock."""
    keys = re.compile(r"(eval_)?(step$|loss|accuracy|grad_norm|learning_rate|max_attention|clipped|expert)")
    entries = log_history(newest_checkpoint(out))
    return [{key: value for key, value in entry.items() if keys.match(key)} for entry in entries]


def assert_same_end(out, reference, logs: bool = True) -> None:
    """Compares the model, the optimizer's state and, with `logs`, every logged loss, bit for bit."""
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (out, reference))
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    a, b = (
        torch.load(newest_checkpoint(folder) / "optimizer.pt", weights_only=True)["state"]
        for folder in (out, reference)
    )
    assert a.keys() == b.keys()
    for i, state in a.items():
        assert all(torch.equal(value, b[i][name]) for name, value in state.items())
    if logs:
        assert losses(out) == losses(reference)


def files_of(folder) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path(folder).rglob("*")}


# Stopped and resumed


def test_interrupted_is_uninterrupted(tiny_run, tmp_path, monkeypatch, capsys):
    reference = tiny_run(**LONG, out=str(tmp_path / "whole"))
    pretrain.train(reference)
    for step in (4, 10, 12):  # in an epoch, at its end, in the next one and after the MTP weight's change
        out = tmp_path / str(step)
        interrupt(monkeypatch, tiny_run(**LONG, out=str(out)), step)
        assert f"stopped    at step {step}" in capsys.readouterr().out
        assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{step}"]
        assert (out / "loss.png").exists()
        assert not (out / "config.json").exists()
        resume(out)
        assert f"resuming   from {out}/checkpoint-{step}" in capsys.readouterr().out
        assert_same_end(out, reference.out)


def test_interrupted_again_and_again(tiny_run, tmp_path, monkeypatch):
    reference, config = tiny_run(out=str(tmp_path / "whole")), tiny_run()
    pretrain.train(reference)
    interrupt(monkeypatch, config, 1)
    for step in (2, 4):
        interrupt(monkeypatch, parse(["--out", config.out, "--resume"]), step)
    resume(config.out)
    assert_same_end(config.out, reference.out)


def test_a_crash_costs_the_steps_since_the_last_checkpoint(tiny_run, tmp_path, monkeypatch):
    options = {"steps": 9, "save_every": 4, "log_every": 3, "eval_every": 5}
    reference, config = tiny_run(**options, out=str(tmp_path / "whole")), tiny_run(**options)
    pretrain.train(reference)
    crash(monkeypatch, config, 7)
    assert (Path(config.out) / "loss.png").exists()
    resume(config.out)
    assert_same_end(config.out, reference.out)
    assert [entry["step"] for entry in losses(config.out) if "loss" in entry] == [1, 3, 4, 6, 8, 9]


def hanging(where: str, options: str) -> None:
    """A run that stops in the middle, prints NOW and waits to be killed."""

    def hang(*args, **kwargs):
        print("NOW", flush=True)
        time.sleep(600)

    publish, step = muonclip_trainer.publish_checkpoint, MTPTrainer.training_step
    if where == "in a step":
        MTPTrainer.training_step = lambda self, *a: hang() if self.state.global_step == 4 else step(self, *a)
    else:
        muonclip_trainer.publish_checkpoint = lambda written, *a: (
            hang() if written.name == "checkpoint-6" else publish(written, *a)
        )
    cli.main(["train", "--config", options])


@pytest.mark.parametrize("where", ["in a step", "while it saves"])
def test_kill_9(tiny_run, tmp_path, where):
    options = {"steps": 8, "save_every": 3}
    reference, config = tiny_run(**options, out=str(tmp_path / "whole")), tiny_run(**options)
    pretrain.train(reference)
    write_run_file(config, tmp_path / "run.yaml")
    process = ForkedProcess(tmp_path / "said.out", {}, hanging, where, str(tmp_path / "run.yaml"))
    process.until("NOW")
    process.kill()
    assert newest_checkpoint(config.out).name == "checkpoint-3"
    assert find_damage(newest_checkpoint(config.out)) is None
    resume(config.out)
    assert not (Path(config.out) / ".unfinished").exists()
    assert_same_end(config.out, reference.out)


def test_ctrl_c_at_the_command_line(tiny_run, tmp_path):
    reference, config = tiny_run(steps=60, log_every=5, out=str(tmp_path / "whole")), tiny_run(steps=60, log_every=5)
    write_run_file(config, tmp_path / "run.yaml")
    argv = [sys.executable, "-m", "moonwhale", "train", "--config", str(tmp_path / "run.yaml")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("step      5"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.search(
        r"^stopped    at step \d+, which is saved; go on with: moonwhale train --out .* --resume$", out, re.M
    )
    assert err.splitlines() == [
        "stopping at the end of a step (Ctrl-C again: at once, without saving)",
        "moonwhale: interrupted",
    ]
    assert 5 <= step_of(newest_checkpoint(config.out)) < 60
    resume(config.out)
    pretrain.train(reference)
    assert_same_end(config.out, reference.out, logs=False)  # the interruption added a line to the log


def test_a_second_ctrl_c_stops_at_once(tiny_run, monkeypatch):
    config = tiny_run()
    at_step(monkeypatch, 2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(config)
    assert not list_checkpoints(config.out)
    assert signal.getsignal(signal.SIGINT) is before


# Damage


@pytest.fixture
def finished(tiny_run):
    config = tiny_run(save_every=2, keep_checkpoints=3)
    pretrain.train(config)
    return Path(config.out)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_checkpoint(out: Path, step: int, names: tuple = ("weights",), keep: int | None = None) -> None:
    written = unfinished_folder(out) / f"checkpoint-{step}"
    written.mkdir(parents=True)
    for name in names:
        (written / name).write_text(str(step))
    publish_checkpoint(written, out, keep)


DAMAGED_MANIFESTS = [
    lambda good: b"",
    lambda good: good[: len(good) // 2],
    lambda good: good + b"}",
    lambda good: b"\xff\xfe" + good,
    lambda good: b"\0" * len(good),
    lambda good: b"[" * 100_000,
    lambda good: b"null",
    lambda good: b"[]",
    lambda good: b"{}",
    lambda good: b"1" * 10_000,
    lambda good: good.replace(b'"files"', b'"filet"'),
    lambda good: good.replace(b'"sha256"', b'"sha257"'),
    lambda good: good.replace(b'"bytes"', b'"bites"'),
    lambda good: json.dumps({"files": []} | {"sha256": json.loads(good)["sha256"]}).encode(),
    lambda good: json.dumps(json.loads(good) | {"files": {}}).encode(),
    lambda good: json.dumps(json.loads(good)["files"]).encode(),
    lambda good: json.dumps(dict.fromkeys(("trainer_state.json", "optimizer.pt", "scheduler.pt"), 1)).encode(),
    lambda good: json.dumps({name: {} for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt")}).encode(),
]


def test_a_damaged_checkpoint_is_skipped(finished, tmp_path, caplog):
    for hurt, name, said in [
        (truncate, "model.safetensors", r"model\.safetensors is truncated: \d+ of \d+ bytes"),
        (corrupt, "optimizer.pt", r"optimizer\.pt is damaged: its checksum differs"),
        (Path.unlink, "scheduler.pt", r"scheduler\.pt is missing"),
        (truncate, "manifest.json", r"manifest\.json is damaged"),
        (Path.unlink, "manifest.json", r"manifest\.json is missing"),
    ]:
        out = tmp_path / name / hurt.__name__
        shutil.copytree(finished, out)
        hurt(out / "checkpoint-6" / name)
        caplog.clear()
        resume(out)
        (warning,) = [r.getMessage() for r in caplog.records if r.name == "moonwhale.checkpoint"]
        assert re.fullmatch(rf"skipping {out}/checkpoint-6: {said}", warning)
        assert_same_end(out, finished)
        names = {path.name for path in out.glob("*checkpoint*")}
        assert names == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "damaged-checkpoint-6"}


@pytest.mark.parametrize("content", DAMAGED_MANIFESTS)
def test_a_damaged_manifest_costs_one_checkpoint(tmp_path, caplog, content):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    manifest = tmp_path / "checkpoint-2" / "manifest.json"
    manifest.write_bytes(content(manifest.read_bytes()))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert [r.getMessage() for r in caplog.records] == [f"skipping {tmp_path}/checkpoint-2: manifest.json is damaged"]


def test_flipped_bits_of_a_manifest_are_noticed_or_change_nothing(tmp_path):
    write_checkpoint(tmp_path, 1)
    manifest = tmp_path / "checkpoint-1" / "manifest.json"
    good = manifest.read_bytes()
    for bit in range(0, 8 * len(good), 3):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        assert find_damage(manifest.parent) or json.loads(data) == json.loads(good)


def rewrite_manifest(checkpoint: Path, change) -> None:
    """Changes the files that a manifest lists, and its sum with them, as the author of a folder can."""
    values = json.loads((checkpoint / "manifest.json").read_bytes())
    files = change(values["files"])
    sum = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files, "sha256": sum}))


@pytest.mark.parametrize("name", ["./{}", "././{}", "../checkpoint-1/{}", "/{}", "{}/", "a//{}", "", "..", "a\\{}"])
def test_a_manifest_names_files_of_the_folder_in_one_way_only(tmp_path, name):
    write_checkpoint(tmp_path, 1)
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "a").mkdir()
    rewrite_manifest(checkpoint, lambda files: files)
    assert find_damage(checkpoint) is None
    rewrite_manifest(checkpoint, lambda files: {name.format(real): entry for real, entry in files.items()})
    assert find_damage(checkpoint) == "manifest.json is damaged"


def test_a_pipe_that_the_manifest_does_not_list_is_damage(tmp_path):
    write_checkpoint(tmp_path, 1)
    os.mkfifo(tmp_path / "checkpoint-1" / "optimizer.pt")
    assert find_damage(tmp_path / "checkpoint-1") == "optimizer.pt is no plain file"


def test_a_file_of_many_names_is_read_once(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1)
    checkpoint, read = tmp_path / "checkpoint-1", []
    real, entry = next(iter(json.loads((checkpoint / "manifest.json").read_bytes())["files"].items()))
    for i in range(20):
        (checkpoint / f"symbolic{i}").symlink_to(real)
        os.link(checkpoint / real, checkpoint / f"hard{i}")
    names = [real] + [f"{kind}{i}" for i in range(20) for kind in ("symbolic", "hard")]
    rewrite_manifest(checkpoint, lambda files: dict.fromkeys(names, entry))
    monkeypatch.setattr(manifest, "checksum", lambda path: read.append(path) or entry["sha256"])
    assert find_damage(checkpoint) is None and len(read) == 1


def test_a_manifest_of_an_earlier_version(tmp_path):
    names = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    write_checkpoint(tmp_path, 1, names)
    manifest = tmp_path / "checkpoint-1" / "manifest.json"
    files = json.loads(manifest.read_bytes())["files"]
    manifest.write_text(json.dumps(files))
    assert find_damage(manifest.parent) is None
    for name in names:  # nothing but the list itself could tell
        manifest.write_text(json.dumps({other: entry for other, entry in files.items() if other != name}))
        assert find_damage(manifest.parent) == "manifest.json is damaged"


def test_a_kill_while_a_checkpoint_replaces_another(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1)
    rename = Path.rename

    def killed(path, target):
        if path.parent.name == ".unfinished":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, 1)
    assert newest_checkpoint(tmp_path) is None
    clear_unfinished(tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_system_without_sighup(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    assert runpy.run_path(callbacks.__file__)["STOP_SIGNALS"] == [signal.SIGINT, signal.SIGTERM]


def test_a_kill_while_old_checkpoints_are_deleted(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, ("weights", "optimizer.pt"))

    def killed(folder, **_):
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        if files:
            files[0].unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        written = unfinished_folder(tmp_path) / "checkpoint-3"
        written.mkdir(parents=True)
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            publish_checkpoint(written, tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (done.append("rename"), rename(path, target)))
    write_checkpoint(tmp_path, 1)
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    written = tmp_path / ".unfinished" / "checkpoint-1"
    assert set(before) == {str(written), str(written / "weights"), str(written / "manifest.json")}
    assert after == [str(tmp_path)]


def test_all_damaged(finished):
    for checkpoint in list_checkpoints(finished):
        truncate(checkpoint / "optimizer.pt")
    with pytest.raises(UserError, match=r"^`resume`: every checkpoint in .* is damaged"):
        resume(finished)


def test_a_damaged_one_never_pushes_out_a_whole_one(tmp_path):
    write = partial(write_checkpoint, tmp_path, keep=1)
    write(5)
    write(30)
    truncate(tmp_path / "checkpoint-30" / "weights")
    write(20)  # the run went on from an earlier one
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "damaged-checkpoint-30"]
    write(20)
    write(20)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


# Going on, or not


def test_resuming_a_finished_run(finished, capsys):
    before = (finished / "model.safetensors").read_bytes()
    resume(finished)
    assert "finished   already, with all 6 steps" in capsys.readouterr().out
    assert (finished / "model.safetensors").read_bytes() == before
    for path in finished.iterdir():  # as if killed before the model was put in its place
        if path.is_file() and path.name not in ("run.yaml", "data.txt"):
            path.unlink()
    resume(finished)
    assert (finished / "model.safetensors").read_bytes() == before
    assert {"config.json", "tokenizer.json", "generation_config.json", "loss.png"} <= set(os.listdir(finished))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lr", "1e-4"], r"^`lr`: 0.0001 differs from the 0.005"),
        (["--model.hidden_size", "64"], r"^`model.hidden_size`: 64 differs from the 32"),
        (["--model.aux_loss_alpha", "0"], r"^`model.aux_loss_alpha`: 0.0 differs from the None"),
    ],
)
def test_what_is_learned_may_not_change(tiny_run, argv, said):
    config = tiny_run()
    Path(config.out).mkdir()
    write_run_file(config, Path(config.out) / "run.yaml")
    before = files_of(config.out)
    with pytest.raises(UserError, match=said):
        resume(config.out, *argv)
    assert files_of(config.out) == before


def test_more_steps(tiny_run, tmp_path, capsys):
    """A finished run is extended from its plateau, and equals one that was to take so many steps from the start."""
    options = {"decay_fraction": 0.5, "mtp_loss_weight_final": 0.1, "save_every": 2, "keep_checkpoints": 9}
    whole = tiny_run(**options, steps=10, out=str(tmp_path / "whole"))
    config = tiny_run(**options)
    pretrain.train(whole)
    pretrain.train(config)
    for step in (2, 3):
        (Path(config.out) / f"checkpoint-{step}").rename(tmp_path / f"of step {step}")
    resume_10 = ["--steps", "10", "--save-every", "3"]
    with pytest.raises(UserError, match=r"^`steps`: 10 needs a checkpoint of step 3 or before, .* is of step 4: go on"):
        resume(config.out, *resume_10)
    (tmp_path / "of step 2").rename(Path(config.out) / "checkpoint-2")
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:  # killed; checkpoints 4 and 6 are still those of the shorter run
        crash(patch, parse(["--out", config.out, "--resume", *resume_10]), 5)
    said = capsys.readouterr().out
    assert f"resuming   from {config.out}/checkpoint-2" in said
    assert (
        "schedule   6 steps become 10: the learning rate stays at its peak until step 5 and falls until step 10" in said
    )
    resume(config.out, "--save-every", "2")
    assert f"resuming   from {config.out}/checkpoint-3" in capsys.readouterr().out
    assert_same_end(config.out, whole.out, logs=False)


def test_more_steps_whatever_the_checkpoints(tiny_run, tmp_path):
    """The last step that a longer run shares is always saved, here before the first regular checkpoint."""
    options = {"decay_fraction": 0.7, "mtp_start": 0.6, "save_every": 5, "keep_checkpoints": 1}
    whole = tiny_run(**options, steps=12, out=str(tmp_path / "whole"))
    config = tiny_run(**options, steps=10)
    pretrain.train(whole)
    pretrain.train(config)
    assert [step_of(path) for path in list_checkpoints(config.out)] == [10, 3]
    resume(config.out, "--steps", "12")
    assert_same_end(config.out, whole.out, logs=False)


def test_a_run_that_saves_nothing_on_its_way_saves_no_shared_step(tiny_run):
    config = tiny_run(steps=4, decay_fraction=0.5, save_every=0)
    pretrain.train(config)
    assert [step_of(path) for path in list_checkpoints(config.out)] == [4]


def test_fewer_steps(tiny_run, tmp_path):
    """A run may begin to decay earlier than it was to."""
    options = {"decay_fraction": 0.5, "save_every": 2, "keep_checkpoints": 9}
    short, config = tiny_run(**options, steps=4, out=str(tmp_path / "short")), tiny_run(**options)
    pretrain.train(short)
    pretrain.train(config)
    resume(config.out, "--steps", "4")
    for step in (3, 6):  # of the longer run
        shutil.rmtree(Path(config.out) / f"checkpoint-{step}")
    assert_same_end(config.out, short.out)


def test_a_cosine_has_no_plateau(tiny_run):
    config = tiny_run(schedule="cosine")
    Path(config.out).mkdir()
    write_run_file(config, Path(config.out) / "run.yaml")
    with pytest.raises(UserError, match=r"^`steps`: 12 differs from the 6 .*: leave it out, or go on .* by `from_`"):
        resume(config.out, "--steps", "12")


def test_changed_data_are_noticed(tiny_run, text_folder, tmp_path, monkeypatch):
    data = shutil.copytree(text_folder, tmp_path / "data")
    config = tiny_run(data=str(data))
    interrupt(monkeypatch, config, 2)
    (data / "07.txt").write_text("the sea " * 30)
    with pytest.raises(UserError, match=r"^`data`: .*, or its tokenizer, has changed since the run"):
        resume(config.out)


@pytest.mark.parametrize("make", [lambda record: record.write_bytes(b"abc\xff\n"), os.mkfifo, Path.mkdir])
def test_a_record_of_the_data_that_cannot_be_read_is_one_line(tmp_path, make):
    make(tmp_path / "data.txt")
    with pytest.raises(UserError, match=r"^cannot read .*data\.txt: .*: bring it back, or train into another `out`$"):
        check_data_unchanged(SimpleNamespace(out=str(tmp_path)), "`data`: it", b"", "")


def test_intervals_may_change(tiny_run, monkeypatch):
    config = tiny_run(log_every=10, save_every=10)
    interrupt(monkeypatch, config, 2)
    resume(config.out, "--log-every", "1", "--eval-every", "2", "--save-every", "5", "--keep-checkpoints", "9")
    assert [path.name[-1] for path in list_checkpoints(config.out)] == ["6", "5", "2"]
    assert [entry["step"] for entry in losses(config.out) if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in losses(config.out) if "eval_loss_main" in entry] == [4, 6]


def test_resume_without_a_run_starts_one(tiny_run, capsys):
    config = tiny_run(resume=True)
    pretrain.train(config)
    assert f"resuming   nothing: {config.out} holds no checkpoint" in capsys.readouterr().out
    assert (Path(config.out) / "config.json").exists()


def test_a_run_is_replayed_from_its_file(tiny_run, tmp_path):
    config = tiny_run(seed=3, schedule="cosine")
    pretrain.train(config)
    again = parse(["--config", f"{config.out}/run.yaml", "--out", str(tmp_path / "again")])
    pretrain.train(again)
    assert_same_end(again.out, config.out)


@pytest.mark.parametrize("resuming", [False, True])
def test_foreign_folders_are_left_alone(tiny_run, resuming):
    config = tiny_run(resume=resuming)
    out = Path(config.out)
    out.mkdir()
    (out / "thesis.txt").write_text("dear")
    before = files_of(out)
    with pytest.raises(UserError, match=r"^`out`: .* holds files that are not a run's"):
        pretrain.train(config)
    assert files_of(out) == before


def test_a_checkpoint_in_place_of_its_run(tiny_run, tmp_path):
    config = tiny_run(out=str(tmp_path / "run" / "checkpoint-2"), resume=True)
    write_checkpoint(tmp_path / "run", 2)
    write_run_file(config, tmp_path / "run" / "run.yaml")
    with pytest.raises(UserError, match=rf"^`out`: .* are not a run's: name the run's own folder, {tmp_path}/run$"):
        pretrain.train(config)


def test_another_run_is_left_alone(finished, tiny_run):
    before = files_of(finished)
    with pytest.raises(UserError, match=r"^`out`: .* already holds a run: go on with it by `resume`"):
        pretrain.train(tiny_run())
    assert files_of(finished) == before


@pytest.mark.parametrize("resuming", [False, True])
def test_a_model_without_its_checkpoints_is_left_alone(tiny_run, resuming):
    config = tiny_run(resume=resuming)
    out = Path(config.out)
    out.mkdir()
    write_run_file(config, out / "run.yaml")
    (out / "config.json").write_text("{}")
    before = files_of(out)
    with pytest.raises(UserError, match=r"^`out`: .* holds a trained model without the checkpoints of its run"):
        pretrain.train(config)
    assert files_of(out) == before


def test_out_is_a_file(tiny_run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^`out`: .*/file is a file"):
        pretrain.train(tiny_run(out=str(tmp_path / "file")))


# A full disk


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")),
        ("torch.save", RuntimeError("basic_ios::clear: iostream error")),
        ("transformers.modeling_utils.safe_save_file", SafetensorError("I/O error: No space left on device")),
        ("pathlib.Path.write_text", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_no_space_left(tiny_run, monkeypatch, writer, error):
    config = tiny_run(save_every=2)
    write = pkgutil.resolve_name(writer)

    def write_until_full(*args, **kwargs):
        if "checkpoint-4" in str(args):
            raise error
        return write(*args, **kwargs)

    monkeypatch.setattr(writer, write_until_full)
    with pytest.raises(UserError, match=r"^`out`: no space left on the disk of [^\n]*checkpoint-2 is whole, go on"):
        pretrain.train(config)
    assert [path.name for path in list_checkpoints(config.out)] == ["checkpoint-2"]
    assert find_damage(f"{config.out}/checkpoint-2") is None
    assert not (Path(config.out) / ".unfinished").exists()


def test_no_space_for_the_model_itself(tiny_run, monkeypatch):
    config = tiny_run()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(UserError, match=r"^`out`: no space left on the disk of .*checkpoint-6 is whole, go on"):
            pretrain.train(config)
    assert not (Path(config.out) / "config.json").exists()
    resume(config.out)
    assert (Path(config.out) / "config.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_leaves_a_checkpoint_and_a_command_to_paste(tiny_run, tmp_path, monkeypatch, capsys, number):
    config = tiny_run(out=str(tmp_path / "my run"))
    interrupt(monkeypatch, config, 2, number)
    assert [path.name for path in list_checkpoints(config.out)] == ["checkpoint-2"]
    command = capsys.readouterr().out.rpartition("go on with: moonwhale train ")[2]
    assert shlex.split(command) == ["--out", config.out, "--resume"]
    pretrain.train(parse(shlex.split(command)))
    assert f"moonwhale chat '{config.out}'" in capsys.readouterr().out
