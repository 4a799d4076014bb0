"""One process of benchmarks/parallel_runs.py: `moonwhale train`, as it is, with a look at what it computes and holds.

    torchrun … benchmarks/parallel_rank.py FOLDER [options of moonwhale train]

Leaves FOLDER/RANK.pt, of the first step: {"grads": the gradients by name; "bytes": what this process holds of weights,
gradients and optimizer state, and at most at once for backward passes; "sent": the bytes it sends to "pipeline"
neighbours, and to "reduce" over a ring}.
"""

import os
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


class Held:
    """A tensor that autograd keeps for the backward pass, while it does; `most` is their largest sum so far in bytes,
    each storage once, parameters left out.
    """

    uses, parameters, now, most = Counter(), frozenset(), 0, 0

    def __init__(self, tensor: Tensor):
        self.tensor, self.storage = tensor, tensor.untyped_storage().data_ptr()
        if not Held.uses[self.storage] and self.storage not in Held.parameters:
            Held.now += tensor.untyped_storage().nbytes()
            Held.most = max(Held.most, Held.now)
        Held.uses[self.storage] += 1

    def __del__(self):
        Held.uses[self.storage] -= 1
        if not Held.uses[self.storage] and self.storage not in Held.parameters:
            Held.now -= self.tensor.untyped_storage().nbytes()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def here(tensors) -> int:
    """Bytes of what this process has of some tensors."""
    return sum(t.numel() * t.element_size() for t in map(local, (t for t in tensors if isinstance(t, Tensor))))


class Sent:
    """Counts what leaves this process, while `torch.distributed` is asked through it."""

    total, isend, reduce = Counter(), dist.isend, dist.all_reduce

    @staticmethod
    def isend_(tensor, *args, **kwargs):
        Sent.total["pipeline"] += here([tensor])
        return Sent.isend(tensor, *args, **kwargs)

    @staticmethod
    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        ranks = dist.get_world_size(group)
        Sent.total["reduce"] += here([tensor]) * 2 * (ranks - 1) // ranks
        return Sent.reduce(tensor, op, group, async_op)


class Look(TrainerCallback):
    """Writes down the first step."""

    def __init__(self, path: Path):
        self.path, self.seen = path, {}
        self.watch = torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            Held.parameters = frozenset(local(p).untyped_storage().data_ptr() for p in model.parameters())
            self.watch.__enter__()
            Sent.total.clear()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.watch.__exit__()
            self.seen["sent"] = dict(Sent.total)
            grads = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            self.seen["grads"] = {name: grad.clone() for name, grad in grads.items()}
            held = here(p.grad for p in model.parameters())
            self.seen["bytes"] = {"weights": here(model.parameters()), "gradients": held, "activations": Held.most}

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if state.global_step == 0:
            states = getattr(optimizer, "optimizer", optimizer).state.values()
            self.seen["bytes"]["optimizer"] = here(value for state in states for value in state.values())
            torch.save(self.seen, self.path)


def main(folder: str, argv: list[str]) -> int:
    muonclip._fast_dtype = lambda device: torch.float32  # rounding must stay rounding
    dist.all_reduce = Sent.all_reduce
    dist.isend = dist.distributed_c10d.isend = Sent.isend_  # torch compares what it is given with its own
    path = Path(folder) / f"{os.environ.get('RANK', 0)}.pt"
    build = MTPTrainer.__init__

    def watched(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.add_callback(Look(path))

    MTPTrainer.__init__ = watched
    make = MoonwhaleForCausalLM.__init__

    def drawn(self, config):
        make(self, config)
        for p in self.parameters():  # what begins at zero would hide the gradients of what is before it
            if p.device.type != "meta" and not p.any():
                torch.nn.init.normal_(p, std=0.02)

    MoonwhaleForCausalLM.__init__ = drawn
    return cli.main(["train", *argv])


def forked(told: dict[str, str], folder: str, argv: list[str]) -> None:
    """The same in a process that was forked from one with everything imported, instead of started by torchrun."""
    os.environ |= told
    with open(f"{folder}/said{told.get('RANK', 0)}.txt", "w") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        sys.exit(main(folder, argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
