"""One process of benchmarks/parallel_runs.py: `moonwhale train`, with measurements of what it computes and holds.

    torchrun … benchmarks/parallel_rank.py FOLDER [options of moonwhale train]

Writes FOLDER/RANK.pt with these entries:

- "grads": the gradients of the first step, by name.
- "bytes": what this process holds in the first step: weights, gradients, optimizer state, and the most activations that
  autograd keeps for backward passes at once.
- "sent": the bytes that it sends in the first step to "pipeline" neighbours, and to "reduce" gradients in a ring.
- "saving": of the newest checkpoint, "share", the bytes of its weights and optimizer state, and "extra", the memory
  that it needs in addition at most while it saves them. Only in runs with a PipelineTrainer, on Linux.
"""

import ctypes
import gc
import os
import re
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from moonwhale import cli
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.optim import muonclip
from moonwhale.parallel.fsdp import full_tensor
from moonwhale.train.mtp_trainer import MTPTrainer
from moonwhale.train.pipeline_trainer import PipelineTrainer


class SavedTensor:
    """A tensor that autograd keeps for the backward pass, for as long as it does.

    `peak` is the largest sum of these tensors so far, in bytes. Each storage counts once, and parameters do not count.
    """

    uses, parameters, now, peak = Counter(), frozenset(), 0, 0

    def __init__(self, tensor: Tensor):
        self.tensor, self.storage = tensor, tensor.untyped_storage().data_ptr()
        if not SavedTensor.uses[self.storage] and self.storage not in SavedTensor.parameters:
            SavedTensor.now += tensor.untyped_storage().nbytes()
            SavedTensor.peak = max(SavedTensor.peak, SavedTensor.now)
        SavedTensor.uses[self.storage] += 1

    def __del__(self):
        SavedTensor.uses[self.storage] -= 1
        if not SavedTensor.uses[self.storage] and self.storage not in SavedTensor.parameters:
            SavedTensor.now -= self.tensor.untyped_storage().nbytes()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors) -> int:
    """Return the bytes that this process holds of some tensors; other values count nothing."""
    return sum(t.numel() * t.element_size() for t in map(local, (t for t in tensors if isinstance(t, Tensor))))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return local_bytes(value for state in states for value in state.values())


class Sent:
    """Counts the bytes that leave this process through `isend` and `all_reduce` of torch.distributed."""

    total, isend, reduce = Counter(), dist.isend, dist.all_reduce

    @staticmethod
    def counted_isend(tensor, *args, **kwargs):
        Sent.total["pipeline"] += local_bytes([tensor])
        return Sent.isend(tensor, *args, **kwargs)

    @staticmethod
    def counted_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        ranks = dist.get_world_size(group)
        Sent.total["reduce"] += local_bytes([tensor]) * 2 * (ranks - 1) // ranks
        return Sent.reduce(tensor, op, group, async_op)


class Measurements(TrainerCallback):
    """Records the first step, and writes all measurements to `path`."""

    def __init__(self, path: Path):
        self.path, self.seen = path, {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(SavedTensor, lambda saved: saved.tensor)

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            SavedTensor.parameters = frozenset(local(p).untyped_storage().data_ptr() for p in model.parameters())
            self.hooks.__enter__()
            Sent.total.clear()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.hooks.__exit__()
            self.seen["sent"] = dict(Sent.total)
            grads = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            self.seen["grads"] = {name: grad.clone() for name, grad in grads.items()}
            self.seen["bytes"] = {
                "weights": local_bytes(model.parameters()),
                "gradients": local_bytes(p.grad for p in model.parameters()),
                "activations": SavedTensor.peak,
            }

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if state.global_step == 0:
            self.seen["bytes"]["optimizer"] = state_bytes(optimizer)
            self.write()

    def write(self) -> None:
        torch.save(self.seen, self.path)


def resident_bytes(peak: bool = False) -> int:
    """Return this process's resident memory, now or at most since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", status)[1])


def reset_peak() -> None:
    """Give unused memory back to the system, and start the peak of the resident memory anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(folder: str, argv: list[str]) -> int:
    muonclip._fast_dtype = lambda device: torch.float32  # so that rounding errors stay small
    dist.all_reduce = Sent.counted_all_reduce
    # torch compares the function in a P2POp with its own
    dist.isend = dist.distributed_c10d.isend = Sent.counted_isend
    measurements = Measurements(Path(folder) / f"{os.environ.get('RANK', 0)}.pt")
    init_trainer, init_model = MTPTrainer.__init__, MoonwhaleForCausalLM.__init__
    save = PipelineTrainer._save_checkpoint

    def measured_trainer(self, *args, **kwargs):
        init_trainer(self, *args, **kwargs)
        self.add_callback(measurements)

    def drawn_model(self, config):
        init_model(self, config)
        for p in self.parameters():  # weights that start at zero would hide the gradients of earlier layers
            if p.device.type != "meta" and not p.any():
                torch.nn.init.normal_(p, std=0.02)

    def measured_save(self, *args, **kwargs):
        reset_peak()
        before = resident_bytes()
        save(self, *args, **kwargs)
        share = local_bytes(self.model.state_dict().values()) + state_bytes(self.optimizer)
        measurements.seen["saving"] = {"share": share, "extra": resident_bytes(peak=True) - before}
        measurements.write()

    MTPTrainer.__init__, MoonwhaleForCausalLM.__init__ = measured_trainer, drawn_model
    if sys.platform == "linux":
        PipelineTrainer._save_checkpoint = measured_save
    return cli.main(["train", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
