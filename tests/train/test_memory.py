"""Too little memory is a one-line error: before the run if it is certain, otherwise when it happens."""

from types import SimpleNamespace

import pytest
import torch

from moonwhale.cli import main
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleConfig
from moonwhale.presets import PRESETS
from moonwhale.train import memory
from moonwhale.units import in_bytes

GPU = torch.device("cuda")
CONFIG = MoonwhaleConfig(**PRESETS["seed_190m"].model)


def run(**changes):
    options = {"batch_size": 8, "context": 1024, "gradient_checkpointing": False, "optimizer": "muon"}
    return SimpleNamespace(**options | changes)


def test_adamw_keeps_two_moments_of_every_weight():
    needed = memory.needed_bytes(CONFIG, run(optimizer="adamw"), 4)
    assert needed["optimizer"] == 2 * needed["weights"] > memory.needed_bytes(CONFIG, run(), 4)["optimizer"]


@pytest.fixture
def gpu_of(monkeypatch):
    return lambda gigabytes: monkeypatch.setattr(memory, "free_bytes", lambda device: int(gigabytes * 1e9))


def test_a_cpu_is_not_checked():
    assert memory.check_gpu_memory(CONFIG, run(), torch.device("cpu"), 4) == ""


def test_a_run_that_fits_is_reported(gpu_of):
    gpu_of(80)
    line = memory.check_gpu_memory(CONFIG, run(), GPU, 2)
    whole = sum(memory.needed_bytes(CONFIG, run(), 2).values())
    assert line == f"memory     about {in_bytes(whole)} of the 80.0 GB that cuda has left"


def test_a_run_that_may_not_fit_gets_advice(gpu_of):
    weights = sum(memory.needed_bytes(CONFIG, run(), 2).values()) - memory.needed_bytes(CONFIG, run(), 2)["activations"]
    gpu_of(weights / 1e9 + 0.1)
    line = memory.check_gpu_memory(CONFIG, run(), GPU, 2)
    assert "may not suffice (give `batch_size` 4, `gradient_checkpointing`, a shorter `context`, or" in line


def test_a_run_that_cannot_fit_is_refused(gpu_of):
    gpu_of(1)
    with pytest.raises(
        UserError, match=r"^`device`: weights, gradients and optimizer take 2\.\d\d GB, and cuda has 1\.00 GB left"
    ):
        memory.check_gpu_memory(CONFIG, run(), GPU, 2)


def test_gradient_checkpointing_reduces_activations():
    whole, few = (memory.needed_bytes(CONFIG, run(gradient_checkpointing=on), 2) for on in (False, True))
    assert few["activations"] < whole["activations"] / 3
    assert few["weights"] == whole["weights"]


def test_gradient_checkpointing_leaves_what_is_outside_the_blocks():
    """With one token that is the gradient of the head, nearly alone."""
    needed = memory.needed_bytes(CONFIG, run(batch_size=1, context=1, gradient_checkpointing=True), 2)
    assert needed["activations"] > 4 * CONFIG.vocab_size * CONFIG.hidden_size


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, …)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: …"),
    ],
)
def test_out_of_memory_becomes_advice(error):
    with pytest.raises(UserError) as raised, memory.out_of_memory_as_advice(run(), GPU):
        raise error
    assert str(raised.value) == (
        "cuda is out of memory with `batch_size` 8 rows: give `batch_size` 4, `gradient_checkpointing`, "
        "a shorter `context`, or a smaller model"
    )


def test_advice_lists_only_options_still_available():
    least = run(batch_size=1, gradient_checkpointing=True)
    del least.context
    with pytest.raises(UserError, match=r"rows: train a smaller model$"), memory.out_of_memory_as_advice(least, GPU):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_other_errors_are_raised_unchanged():
    with pytest.raises(RuntimeError, match="shapes"), memory.out_of_memory_as_advice(run(), GPU):
        raise RuntimeError("shapes do not fit")


def test_training_that_runs_out_of_memory_ends_in_a_line(tiny_run, monkeypatch, capsys, tmp_path):
    from moonwhale.train.mtp_trainer import MTPTrainer
    from moonwhale.train.run_folder import write_run_file

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(MTPTrainer, "training_step", fail)
    write_run_file(tiny_run(), tmp_path / "options.yaml")
    assert main(["train", "--config", str(tmp_path / "options.yaml"), "--out", str(tmp_path / "out")]) != 0
    said = capsys.readouterr().err
    assert "cpu is out of memory with --batch-size 2 rows: give --batch-size 1, --gradient-" in said
    assert "Traceback" not in said
