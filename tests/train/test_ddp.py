"""Two processes under DDP learn what one process with the same global batch learns."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from forked import ForkedProcess, finish, rank_variables, start, train
from moonwhale.checkpoint import log_history, newest_checkpoint
from moonwhale.model import MoonwhaleConfig
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.train import pretrain
from moonwhale.train.mtp_trainer import MTPTrainer
from moonwhale.train.run_folder import write_run_file

SCRIPT = """
import sys
from forked import train
sys.exit(train(sys.argv[1:]))
"""
OPTIONS = {
    "steps": 4,  # less than an epoch: its last batch does not divide evenly among the processes
    "tokens_per_step": 256,
    "save_every": 2,
    "lr": 1e-3,
    "qk_clip_tau": 2e-3,  # low enough that QK-clip acts
    "mtp_start": 0.5,
    "model": {"aux_loss_alpha": 0.0, "bias_update_speed": 0.01},
}


def processes_of(launched: subprocess.Popen) -> list[psutil.Process]:
    """Return the descendants of a running launcher and then the launcher, or nothing if the launcher has exited."""
    if launched.poll() is not None:
        return []
    return [*psutil.Process(launched.pid).children(recursive=True), psutil.Process(launched.pid)]


def torchrun(*argv: str, processes: int = 2, before: str = "", launcher: tuple[str, ...] = ()) -> str:
    """Run `moonwhale train` under torchrun as users do, after the code in `before`. Return what the processes print.

    New processes take long to import everything. Tests that do not concern torchrun use `together`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        f"--master-port={port}",
        *launcher,
    ]
    script = Path(os.environ["MOONWHALE_CACHE"]) / "ddp.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(before + SCRIPT)
    launched = subprocess.Popen(
        [*launch, str(script), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = launched.communicate(timeout=300)
    finally:
        for process in processes_of(launched):  # on a timeout they may still be waiting for each other
            process.kill()
    assert launched.returncode == 0, said
    return said


def together(*argv: str, processes: int = 2) -> str:
    """Run `moonwhale train` in forked processes. Return what the processes print."""
    return finish(start(Path(os.environ["MOONWHALE_CACHE"]), *[argv] * processes))


def assert_close(out, reference) -> None:
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (out, reference))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in zip(*(log_history(newest_checkpoint(f)) for f in (out, reference)), strict=True):
        names = [name for name in ours if not re.search("second|runtime|mfu|epoch", name)]
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-3, abs=1e-5)


def assert_mtp_rests(checkpoint: Path, reference: Path) -> None:
    """Assert that two checkpoints from before `mtp_start` have the same MTP modules, bit for bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (checkpoint, reference))
    config = MoonwhaleConfig.from_pretrained(reference)
    modules = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    names = [name for name in a if name.startswith(tuple(f"model.layers.{i}." for i in modules))]
    assert names and not [name for name in names if not torch.equal(a[name], b[name])]


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_run, tmp_path, monkeypatch):
    from moonwhale.optim import muonclip

    monkeypatch.setattr(muonclip, "_fast_dtype", lambda device: torch.float32)
    reference = tiny_run(**OPTIONS, out=str(tmp_path / "one"))
    pretrain.train(reference)
    logs = log_history(newest_checkpoint(reference.out))
    assert all(log["clipped_heads"] > 0 for log in logs if "loss_main" in log)

    out = tmp_path / "two"
    write_run_file(reference, tmp_path / "run.yaml")
    said = torchrun("--config", str(tmp_path / "run.yaml"), "--out", str(out))
    assert said.count("step      2  loss") == 1 and "2 processes" in said
    assert_close(out, reference.out)
    assert_mtp_rests(out / "checkpoint-2", Path(reference.out) / "checkpoint-2")
    names = set(os.listdir(out / "checkpoint-4"))
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "manifest.json"} <= names
    assert not (out / ".unfinished").exists()

    # Resume from the middle.
    for path in out.iterdir():
        if path.name not in ("checkpoint-2", "run.yaml", "data.txt"):
            path.rename(tmp_path / f"aside-{path.name}")
    together("--out", str(out), "--resume")
    resumed, before = load_file(out / "model.safetensors"), load_file(tmp_path / "aside-model.safetensors")
    assert not [name for name, value in resumed.items() if not torch.equal(value, before[name])]


def fail_in_evaluation(rank: int, argv: list[str]) -> int:
    def evaluation_loop(self, *args, **kwargs):
        if rank == 1:
            raise RuntimeError("a bad row")
        return evaluate(self, *args, **kwargs)

    evaluate, MTPTrainer.evaluation_loop = MTPTrainer.evaluation_loop, evaluation_loop
    return train(argv)


def test_a_rank_that_fails_in_the_last_evaluation_costs_nothing(tiny_run, tmp_path):
    config = tiny_run(**OPTIONS | {"steps": 2, "save_every": 0})
    write_run_file(config, tmp_path / "run.yaml")
    variables, argv = rank_variables(2), ["--config", str(tmp_path / "run.yaml")]
    ranks = [
        ForkedProcess(tmp_path / f"{rank}.out", variables[rank], fail_in_evaluation, rank, argv) for rank in range(2)
    ]
    with pytest.raises(RuntimeError, match="a bad row"):
        finish(ranks)
    assert newest_checkpoint(config.out) == Path(config.out) / "checkpoint-2"


def run_hooks(rank: int, store: Path) -> None:
    """Run the step hooks on one of two ranks with different logits and loads in two layers. Print the results."""

    class Seen(nn.Module):
        def __init__(self, logits, loads):
            super().__init__()
            self.max_logit, self.load, self.at_update = torch.tensor(logits), torch.tensor(loads), []

        def clip_qk_(self, tau):
            self.at_update.append(self.max_logit.tolist())
            return (self.max_logit > tau).sum()

        def update_bias_(self):
            self.at_update.append(self.load.tolist())

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    layers = [
        Seen([[3.0, 1.0], [0.0, 2.0]][rank], [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]][rank]),
        Seen([[1.0, -math.inf], [-math.inf, 0.0]][rank], [0.0, 1.0, 2.0]),
    ]
    model = nn.ModuleList([*layers, nn.Linear(1, 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hooks = attach_hooks(optimizer, model, 1.0)
    optimizer.step()
    seen = {name: value.tolist() for name, value in hooks.last.items()}
    print(json.dumps(seen | {"at_update": layers[0].at_update}))
    dist.destroy_process_group()


def test_hooks_reduce_statistics_over_ranks(tmp_path):
    ranks = [ForkedProcess(tmp_path / f"{rank}.out", {}, run_hooks, rank, tmp_path / "store") for rank in range(2)]
    finish(ranks, 60)
    first, second = (json.loads(rank.out.read_text().splitlines()[-1]) for rank in ranks)
    assert first == second
    assert first == {
        "max_logits": [[3, 2], [1, 0]],
        "loads": [[4, 6, 8], [0, 2, 4]],
        "clipped_heads": 2,
        "at_update": [[3, 2], [4, 6, 8]],
    }
