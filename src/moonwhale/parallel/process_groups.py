"""The processes of a pipelined run: how they find each other, what they must agree on, and what is said when one dies.

Process c · P + r is rank r of copy c of a pipeline of P ranks.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moonwhale.errors import UserError, one_line
from moonwhale.model import MoonwhaleConfig
from moonwhale.parallel.options import SCHEDULES, Parallel
from moonwhale.parallel.stages import cut
from moonwhale.processes import init_process_group, world_size

# What torchrun tells a process. The Trainer must not see it: to it, a pipeline is one device.
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
LOST = (
    "gloo",
    "NCCL",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "Timed out",
    "timed out",
    "wait timeout",
)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int  # among all processes
    stage: int  # in its pipeline
    copy: int
    copies: int
    pipeline: dist.ProcessGroup  # the ranks of this copy
    same: dist.ProcessGroup  # all ranks that hold the same stages
    sharing: dist.ProcessGroup | None  # the ranks that share these stages' experts; None: each has all of them
    same_experts: dist.ProcessGroup  # all ranks that hold the same experts
    control: dist.ProcessGroup  # all processes, for objects, on the CPU

    @property
    def ep(self) -> int:
        """Copies that share their experts."""
        return dist.get_world_size(self.sharing) if self.sharing else 1

    def lost(self, error: RuntimeError, step: int) -> str | None:
        """One line to say of an error in `step` if it means that another rank was lost; else None."""
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if not any(sign in f"{error} {cause}" for sign in LOST):
            return None
        silent = self._silent()
        whom = f"rank {' and '.join(map(str, silent))} no longer answers" if silent else "a connection broke"
        return (
            f"rank {self.rank}: stopped in step {step}, since {whom} ({one_line(cause)[:120]}): go on from the last "
            "checkpoint with `resume`"
        )

    def _silent(self, seconds: float = 3.0) -> list[int]:
        """The ranks that do not report within a few seconds that they stop, too."""
        try:
            store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
            store.set(f"stopped/{self.rank}", "")
            end = time.monotonic() + seconds
            while missing := [r for r in range(world) if not store.check([f"stopped/{r}"])]:
                if time.monotonic() > end:
                    return missing
                time.sleep(0.05)
        except (RuntimeError, OSError):  # the store went with the rank that kept it
            pass
        return []


def take_gpu() -> None:
    """Lets this process see one of the machine's GPUs only, its own; to be called before CUDA wakes up."""
    if torch.cuda.device_count() > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]


def meet(split: Parallel, config: MoonwhaleConfig, context: int, on_cpu: bool, settings: dict) -> Ranks | None:
    """Joins the processes that torchrun started. Returns this one's place; None where each has the whole model.

    settings: what all must have been started with, by option.

    Raises:
        UserError: before any group is made, if the model can't be split up so; on every rank, when they were started
            with different settings; when not all came in time.
    """
    if not split.cuts:
        init_process_group(on_cpu, split.timeout)
        return None
    kind, copies = SCHEDULES[split.order], split.copies(world_size())
    cut(config, kind.stages * split.pp, context)
    split.check_experts(config.n_routed_experts if config.first_k_dense_replace < config.num_blocks else 0)
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)  # an error is said in one line, above
    limit = timedelta(seconds=split.timeout)
    init_process_group(on_cpu, split.timeout)
    for name in TOLD:
        os.environ.pop(name, None)
    control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=limit)
    _agree(settings | {f"parallel.{name}": value for name, value in vars(split).items()}, control)
    return stand(split.pp, copies, split.ep, kind.mirrored, limit, control)


def stand(
    pp: int, copies: int, ep: int, mirrored: bool, limit: timedelta, control: dist.ProcessGroup | None = None
) -> Ranks:
    """This process's place among `copies` pipelines of `pp` ranks, and its groups, which all processes make together.

    ep: copies that share their experts, each with a part of them. mirrored: ranks r and P - 1 - r of a pipeline hold
    the same stages. limit: how long a rank waits for another.
    """
    rank = dist.get_rank()
    cells = [sorted({s, pp - 1 - s}) for s in range(pp // 2)] if mirrored else [[s] for s in range(pp)]

    def own(groups: Iterable[list[int]]) -> dist.ProcessGroup | None:
        made = [(ranks, dist.new_group(ranks, timeout=limit)) for ranks in groups]
        return next((group for ranks, group in made if rank in ranks), None)

    pipeline = own([c * pp + s for s in range(pp)] for c in range(copies))
    same = own([c * pp + s for c in range(copies) for s in cell] for cell in cells)
    if ep == 1:
        return Ranks(rank, rank % pp, rank // pp, copies, pipeline, same, None, same, control)
    firsts = range(0, copies, ep)
    sharing = own([c * pp + s for c in range(first, first + ep)] for first in firsts for s in range(pp))
    same_experts = own([c * pp + s for c in range(k, copies, ep) for s in cell] for k in range(ep) for cell in cells)
    return Ranks(rank, rank % pp, rank // pp, copies, pipeline, same, sharing, same_experts, control)


def _agree(settings: dict, control: dist.ProcessGroup) -> None:
    everyone = [None] * dist.get_world_size(control)
    dist.all_gather_object(everyone, settings, group=control)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise UserError(
                    f"`{name}`: rank {rank} was started with {other.get(name)!r}, rank 0 with {first.get(name)!r}: "
                    "start all ranks with the same options"
                )


def run_on_all(work: Callable[[], object] | None, group: dist.ProcessGroup) -> None:
    """Does this rank's work, if it has any, and waits for the other ranks of a group.

    Raises:
        Exception: on every rank, the error of the first rank that failed.
    """
    error = None
    try:
        if work is not None:
            work()
    except Exception as caught:
        error = caught
    errors = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    for failed in errors:
        if failed is not None:
            raise failed
