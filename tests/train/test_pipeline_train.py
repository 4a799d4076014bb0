"""`moonwhale train` on several processes trains the same model as one process and writes the same files."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_ddp import assert_close, assert_mtp_rests, together, torchrun

from forked import start
from moonwhale import processes
from moonwhale.checkpoint import log_history, newest_checkpoint
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.optim.muonclip import param_groups
from moonwhale.train import pretrain
from moonwhale.train.config import parse
from moonwhale.train.pipeline_trainer import PipelineTrainer
from moonwhale.train.run_folder import write_run_file

OPTIONS = {
    "steps": 6,  # an epoch of 39 rows has 4 steps of 5 micro-batches; its last step has only 4 micro-batches
    "tokens_per_step": 320,
    "save_every": 3,
    "eval_every": 3,
    "lr": 1e-3,
    "qk_clip_tau": 2e-3,
    "mtp_start": 0.5,
    "mtp_loss_weight_final": 0.1,
    "decay_fraction": 0.4,
    "model": {"num_hidden_layers": 4, "bias_update_speed": 0.01, "aux_loss_alpha": 0.01},
}


@pytest.fixture
def one(tiny_run, tmp_path, monkeypatch):
    """`one(**options)` trains in one process, writes the options to tmp_path/run.yaml and returns the configuration."""
    from moonwhale.optim import muonclip

    monkeypatch.setattr(muonclip, "_fast_dtype", lambda device: torch.float32)

    def one(**options):
        config = tiny_run(**OPTIONS | options, out=str(tmp_path / "one"))
        pretrain.train(config)
        write_run_file(config, tmp_path / "run.yaml")
        return config

    return one


def assert_same_files(out, reference) -> None:
    """Assert that two runs wrote the same files, except for the optimizer's shards.

    The headers of `model.safetensors` must be equal.
    """
    for folder in ("checkpoint-3", "checkpoint-6", "."):
        files = [set(os.listdir(Path(run) / folder)) for run in (out, reference)]
        assert files[0] == files[1] | ({"optimizer"} if folder != "." else set())
        headers = []
        for run in (out, reference):
            with (Path(run) / folder / "model.safetensors").open("rb") as file:
                headers.append(file.read(int.from_bytes(file.read(8), "little")))
        assert headers[0] == headers[1]


def states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the optimizer's state in a checkpoint, by PARAMETER.KEY."""
    if (checkpoint / "optimizer").is_dir():
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / "optimizer"))
        tensors = {name: torch.zeros(saved.size) for name, saved in reader.read_metadata().state_dict_metadata.items()}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors
    model = MoonwhaleForCausalLM(MoonwhaleConfig.from_pretrained(checkpoint))
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[p] for group in param_groups(model) for p in group["params"]]
    saved = torch.load(checkpoint / "optimizer.pt")["state"]
    return {f"{order[i]}.{key}": value for i, state in saved.items() for key, value in state.items()}


@pytest.mark.slow
def test_a_pipeline_trains_as_one_process(one, tmp_path):
    config = one()
    out = tmp_path / "two"
    pipeline = ("--config", str(tmp_path / "run.yaml"), "--out", str(out), "--parallel.pp", "2")
    said = together(*pipeline, "--parallel.schedule", "dualpipev")
    assert said.count("step      2  loss") == 1 and "dualpipev over 2 processes" in said
    assert_close(out, config.out)
    assert_same_files(out, config.out)
    assert_mtp_rests(out / "checkpoint-3", Path(config.out) / "checkpoint-3")
    log = log_history(newest_checkpoint(out))
    assert any(entry.get("clipped_heads", 0) > 0 for entry in log)

    # Resume both runs from the middle: the pipeline on one process, and the single process as a pipeline.
    for path in (*out.glob("checkpoint-6"), *out.glob("config.json"), *out.glob("model.safetensors")):
        path.rename(tmp_path / f"aside-{path.name}")
    pretrain.train(parse(["--out", str(out), "--resume", "--parallel.pp", "1"]))
    assert_close(out, config.out)
    other = Path(config.out)
    for path in (*other.glob("checkpoint-6"), *other.glob("config.json"), *other.glob("model.safetensors")):
        path.rename(tmp_path / f"one-{path.name}")
    together("--out", str(other), "--resume", "--parallel.pp", "2", "--parallel.schedule", "1f1b")
    a, b = load_file(other / "model.safetensors"), load_file(tmp_path / "one-model.safetensors")
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("split", [["pp=2", "schedule=1f1b"], ["fsdp=true"]], ids=" ".join)
def test_a_split_model_goes_on_from_a_checkpoint(one, split, trained_checkpoint, tmp_path):
    options = {"from_": str(trained_checkpoint), "steps": 2, "tokens_per_step": 256, "save_every": 0, "eval_every": 0}
    options["model"] = {"aux_loss_alpha": 0.0}
    config = one(**options)
    out = tmp_path / "two"
    said = together(
        "--config", str(tmp_path / "run.yaml"), "--out", str(out), *(f"--parallel.{name}" for name in split)
    )
    assert said.count("step      0  held out") == 1
    assert_close(out, config.out)


def our_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("moonwhale:")]


@pytest.fixture(params=["pp"])
def endless(tiny_run, tmp_path, request):
    """Arguments of a run too long to finish, on two ranks: a pipeline, or with `ep`, expert parallelism."""
    changes = {"steps": 5000, "save_every": 0, "eval_every": 0, "tokens_per_step": 384}
    config = tiny_run(**OPTIONS | changes, parallel={request.param: 2, "timeout": 30})
    write_run_file(config, tmp_path / "run.yaml")
    return ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "found"),
    [
        (("--lr", "0.5"), "--lr: rank 1 was started with 0.5, rank 0 with 0.001"),
        (
            ("--parallel.schedule", "1f1b"),
            "--parallel.schedule: rank 1 was started with '1f1b', rank 0 with 'dualpipev'",
        ),
    ],
)
def test_ranks_with_different_options_are_refused(endless, tmp_path, other, found):
    processes = start(tmp_path, endless, [*endless, *other])
    try:
        for process in processes:
            assert process.wait() == 2
            assert our_lines(process.err.read_text()) == [
                f"moonwhale: error: {found}: start all ranks with the same options"
            ]
    finally:
        for process in processes:
            process.kill()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("endless", ["pp", "ep"], indirect=True)
def test_a_dead_rank_stops_the_others(endless, tmp_path):
    processes = start(tmp_path, endless, endless)
    try:
        processes[0].until("step      3")
        processes[1].kill()
        processes[0].wait()
        said = processes[0].err.read_text()
    finally:
        for process in processes:
            process.kill()
    (line,) = our_lines(said)
    assert re.match(
        r"moonwhale: error: rank 0: stopped in step \d+, since rank 1 no longer answers \(.*\): go on", line
    )
    assert "Traceback" not in said


def launch_names(store: dist.Store, world_size: int) -> set[str]:
    """Return the launch names that `world_size` processes agree on when they start together. Rank 0 starts last."""
    with ThreadPoolExecutor(world_size) as pool:
        return set(
            pool.map(lambda rank: processes._launch_name(store, rank, world_size, 30), reversed(range(world_size)))
        )


def test_each_launch_has_a_unique_name():
    """Each launch gets a new name in a store that outlives it, even if a rank died before all ranks had agreed."""
    store = dist.HashStore()
    (first,) = launch_names(store, 3)
    (second,) = launch_names(store, 3)
    store.set("asks/2", "of one who died")
    (third,) = launch_names(store, 3)
    assert len({first, second, third}) == 3
    with pytest.raises(TimeoutError):
        processes._launch_name(store, 0, 3, 0)


def test_a_restart_resumes_without_being_asked(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not parse([]).resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert parse([]).resume


@pytest.mark.slow
def test_torchrun_resumes_from_the_last_checkpoint(one, tmp_path):
    """After rank 1 is killed in step 5, torchrun restarts all ranks, and they resume from the last checkpoint."""
    config = one()
    out = tmp_path / "two"
    script = f"""
import os, signal, sys
from moonwhale import cli
from moonwhale.train.pipeline_trainer import PipelineTrainer
step = PipelineTrainer.training_step
def dying(self, *args):
    if self.state.global_step == 4 and self.placement.rank == 1 and not os.path.exists({str(tmp_path / "died")!r}):
        open({str(tmp_path / "died")!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)
PipelineTrainer.training_step = dying
"""
    options = ("--config", str(tmp_path / "run.yaml"), "--out", str(out), "--parallel.pp", "2")
    torchrun(*options, before=script, launcher=("--max-restarts=1",))
    assert (tmp_path / "died").exists()
    assert_close(out, config.out)


@pytest.mark.slow
def test_two_pipelines_train_as_one_process(one, tmp_path):
    config = one(tokens_per_step=512, steps=4, save_every=4, eval_every=4)
    out = tmp_path / "four"
    options = ("--config", str(tmp_path / "run.yaml"), "--out", str(out), "--parallel.pp", "2")
    assert "dualpipev over 2 processes, 2 times" in together(*options, processes=4)
    assert_close(out, config.out)


@pytest.mark.slow
def test_dualpipe_trains_as_one_process(one, tmp_path):
    # The last step of an epoch has one micro-batch.
    config = one(tokens_per_step=384, steps=4, save_every=4, eval_every=4)
    options = ("--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "two"), "--parallel.pp", "2")
    together(*options, "--parallel.schedule", "dualpipe")
    assert_close(tmp_path / "two", config.out)


@pytest.mark.slow
def test_expert_parallelism_trains_as_one_process(one, tmp_path):
    # The last step of an epoch has 3 micro-batches, so one replica gets only one.
    config = one(tokens_per_step=256, steps=6)
    out = tmp_path / "two"
    shared = ("--parallel.ep", "2")
    said = together("--config", str(tmp_path / "run.yaml"), "--out", str(out), *shared)
    assert "2 processes, each layer's experts over 2" in said
    assert_close(out, config.out)
    assert_mtp_rests(out / "checkpoint-3", Path(config.out) / "checkpoint-3")
    a, b = (states(folder / "checkpoint-6") for folder in (out, Path(config.out)))
    assert a.keys() == b.keys()
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, atol=1e-5, rtol=1e-3)

    # Resume both runs from the middle: the expert-parallel run on one process, and the other on two.
    for folder in (out, Path(config.out)):
        for path in (*folder.glob("checkpoint-6"), *folder.glob("config.json"), *folder.glob("model.safetensors")):
            path.rename(tmp_path / f"{folder.name}-{path.name}")
    pretrain.train(parse(["--out", str(out), "--resume", "--parallel.ep", "1"]))
    together("--out", config.out, "--resume", *shared)
    assert_close(out, config.out)
    a, b = load_file(Path(config.out) / "model.safetensors"), load_file(tmp_path / "one-model.safetensors")
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_adamws_state_of_experts_goes_to_the_ranks_that_hold_them(one, tmp_path):
    """A rank reads its experts' moments and the whole step counters, which have no dimension to cut."""
    config = one(tokens_per_step=256, optimizer="adamw")
    out = Path(config.out)
    for path in (*out.glob("checkpoint-6"), *out.glob("config.json"), *out.glob("model.safetensors")):
        path.rename(tmp_path / f"one-{path.name}")
    together("--out", config.out, "--resume", "--parallel.ep", "2")
    a, b = states(out / "checkpoint-6"), states(tmp_path / "one-checkpoint-6")
    assert a.keys() == b.keys()
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_pipelines_with_expert_parallelism_train_as_one_process(one, tmp_path):
    """Pipelines with sharded experts train as one process.

    Gradient checkpointing is on, so the recomputed forward pass sends the tokens again.
    """
    config = one(tokens_per_step=512, steps=4, save_every=4, eval_every=4)
    options = ("--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "four"), "--gradient-checkpointing")
    together(*options, "--parallel.pp", "2", "--parallel.ep", "2", processes=4)
    assert_close(tmp_path / "four", config.out)


def test_fsdp_trains_as_one_process(one, tmp_path):
    config = one(tokens_per_step=256)
    out = tmp_path / "parts"
    options = ("--config", str(tmp_path / "run.yaml"), "--out", str(out), "--parallel.fsdp", "true")
    assert "2 processes, weights sharded" in together(*options)
    assert_close(out, config.out)
    assert_same_files(out, config.out)
    assert_mtp_rests(out / "checkpoint-3", Path(config.out) / "checkpoint-3")

    def from_the_middle(name: str) -> str:
        shutil.copytree(out, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-6", "config.json", "model.*"))
        shutil.copytree(out / "checkpoint-3", tmp_path / name / "checkpoint-3", dirs_exist_ok=True)
        return str(tmp_path / name)

    pretrain.train(parse(["--out", from_the_middle("alone"), "--resume", "--parallel.fsdp", "false"]))
    assert_close(tmp_path / "alone", config.out)
    mirrored = ("--out", from_the_middle("mirrored"), "--resume", "--parallel.pp", "2", "--parallel.schedule")
    assert "weights sharded" in together(*mirrored, "dualpipe")
    assert_close(tmp_path / "mirrored", config.out)


def test_an_optimizer_state_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"damaged")
    trainer = object.__new__(PipelineTrainer)  # reading comes before everything that needs other ranks
    with pytest.raises(UserError, match=r"^`resume`: .* cannot be read .*: delete it to go on from the checkpoint bef"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))


# Errors raised before any process starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": {"pp": 0}}, "`parallel.pp`: 0 is impossible: it must be at least 1"),
        ({"parallel": {"timeout": 0}}, "`parallel.timeout`: 0 is impossible: it must be at least 1"),
        (
            {"parallel": {"schedule": "dualpip"}},
            "`parallel.schedule`: 'dualpip' is none of dualpipev, dualpipe, zerobubble, 1f1b (did you mean dualpipe?)",
        ),
        (
            {"parallel": {"pp": 3, "schedule": "dualpipe"}},
            "`parallel.pp`: dualpipe runs two replicas in opposite directions, so 3 ranks are impossible: give "
            "2 or 4, or `parallel.schedule` dualpipev",
        ),
        (
            {"parallel": {"pp": 2, "schedule": "dualpipe"}},
            "`tokens_per_step`: 320 is 5 micro-batches of `batch_size` 2 x `context` 32, but dualpipe on 2 ranks needs "
            "at least 4 and a multiple of 2: give 384,",
        ),
        ({"parallel": {"pp": 2}, "compile": True}, "`compile`: a pipeline can't split a compiled backward pass"),
        ({"parallel": {"ep": 0}}, "`parallel.ep`: 0 is impossible: it must be at least 1"),
        ({"parallel": {"ep": 2}, "compile": True}, "`compile`: experts on several ranks can't be compiled: leave it"),
        ({"parallel": {"fsdp": True}, "compile": True}, "`compile`: compiled blocks don't gather their weights: leave"),
        (
            {"parallel": {"pp": 4}},
            "`tokens_per_step`: 320 is 5 micro-batches of `batch_size` 2 x `context` 32, but dualpipev on 4 ranks "
            "needs at least 8: give 512, or a smaller `batch_size`",
        ),
        (
            {"parallel": {"pp": 6, "schedule": "1f1b"}},
            "`tokens_per_step`: 320 is 5 micro-batches of `batch_size` 2 x `context` 32, but 1f1b on 6 ranks needs at "
            "least 6: give 384, or a smaller `batch_size`",
        ),
    ],
)
def test_impossible_options_are_refused(tiny_run, options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        tiny_run(**OPTIONS | options)


def test_unknown_fields_of_parallel():
    with pytest.raises(UserError, match=r"^unknown option --parallel.stages "):
        parse(["--parallel.stages", "2"])
    with pytest.raises(UserError, match=r"^`parallel.pp`: 'two' is not a whole number"):
        parse(["--parallel.pp", "two"])


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        (
            1,
            {"parallel": {"pp": 2}},
            "`parallel.pp`: pipelines of 2 ranks can't be made of 1 process: start torchrun --nproc-per-node 2, or "
            "give `parallel.pp` 1",
        ),
        (
            1,
            {"parallel": {"fsdp": True}},
            "`parallel.fsdp`: with 1 process and `parallel.pp` 1 no weight is held twice: start torchrun "
            "--nproc-per-node 2, or leave `parallel.fsdp` out",
        ),
        (
            2,
            {"parallel": {"pp": 2, "fsdp": True}},
            "`parallel.fsdp`: with 2 processes and `parallel.pp` 2 no weight is held twice: start torchrun "
            "--nproc-per-node 4, or leave `parallel.fsdp` out",
        ),
        (
            2,
            {"parallel": {"fsdp": True}},
            "`tokens_per_step`: 320 is 5 micro-batches of `batch_size` 2 x `context` 32, but the work of 2 processes "
            "needs at least 2 and a multiple of 2: give 384, or a smaller `batch_size`",
        ),
        (
            5,
            {"parallel": {"pp": 2}},
            "`parallel.pp`: pipelines of 2 ranks can't be made of 5 processes: start torchrun --nproc-per-node 4 or 6",
        ),
        (
            4,
            {"parallel": {"pp": 2}, "tokens_per_step": 576},
            "`tokens_per_step`: 576 is 9 micro-batches of `batch_size` 2 x `context` 32, but dualpipev on 2 ranks"
            ", 2 times, needs at least 8 and a multiple of 2: give 640,",
        ),
        (
            2,
            {"parallel": {"pp": 2}, "model": {"num_hidden_layers": 3}},
            "`model.num_hidden_layers`: 3 blocks can't be cut into 4 stages: give at least 4, or a smaller "
            "`parallel.pp`",
        ),
        (
            4,
            {"parallel": {"ep": 2}},
            "`tokens_per_step`: 320 is 5 micro-batches of `batch_size` 2 x `context` 32, but the work of 4 processes "
            "needs at least 4 and a multiple of 4: give 512,",
        ),
        (
            1,
            {"parallel": {"ep": 2}},
            "`parallel.ep`: 2 replicas of the model are to share experts, but there are 1: give 1, or start "
            "torchrun --nproc-per-node 2",
        ),
        (
            8,
            {"parallel": {"pp": 2, "ep": 3}, "tokens_per_step": 1024},
            "`parallel.ep`: 3 replicas of the model are to share experts, but there are 4: give 2 or 4, or "
            "start torchrun --nproc-per-node 6 or 12",
        ),
        (
            3,
            {"parallel": {"ep": 3}, "tokens_per_step": 384},
            "`parallel.ep`: 4 experts can't be shared by 3 ranks: give 2 or 4",
        ),
        (
            2,
            {"parallel": {"ep": 2}, "tokens_per_step": 384, "model": {"first_k_dense_replace": 9}},
            "`parallel.ep`: the model has no experts to share: leave it out",
        ),
    ],
)
def test_runs_that_do_not_fit_the_processes_are_refused(tiny_run, monkeypatch, world, options, message):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    config = tiny_run(**OPTIONS | options)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        pretrain.train(config)
    assert not torch.distributed.is_initialized() and not Path(config.out).exists()
