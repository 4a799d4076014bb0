"""The process groups of a run over several ranks, the settings that all ranks must share, and the loss of a rank.

Process c · P + r is rank r of replica c of a pipeline of P ranks.
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
from moonwhale.parallel.options import ParallelOptions
from moonwhale.parallel.schedule_properties import SCHEDULES
from moonwhale.parallel.stages import partition
from moonwhale.processes import init_process_group, world_size

# The variables by which torchrun tells a process its rank. The Trainer must take a pipeline for one device, but
# accelerate wraps the model for DDP if it finds them, and no argument tells it otherwise. So they are removed.
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
SIGNS_OF_A_LOST_RANK = (
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
class RankPlacement:
    """The place of this process in the run, and its process groups."""

    rank: int  # among all processes
    pp_rank: int
    replica: int
    num_replicas: int
    pp_group: dist.ProcessGroup  # the pipeline of this replica
    replicate_group: dist.ProcessGroup  # all ranks that hold the same stages
    ep_group: dist.ProcessGroup | None  # the ranks that share these stages' experts; None: each has all of them
    expert_replicate_group: dist.ProcessGroup  # all ranks that hold the same experts
    control_group: dist.ProcessGroup  # all processes, on the CPU, for Python objects

    @property
    def ep(self) -> int:
        """How many replicas share their experts."""
        return dist.get_world_size(self.ep_group) if self.ep_group else 1

    def explain_lost_rank(self, error: RuntimeError, step: int) -> str | None:
        """Return one line on an error in `step` if it means that another rank was lost, else None."""
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if not any(sign in f"{error} {cause}" for sign in SIGNS_OF_A_LOST_RANK):
            return None
        silent = self._silent_ranks()
        what = f"rank {' and '.join(map(str, silent))} no longer answers" if silent else "a connection broke"
        return (
            f"rank {self.rank}: stopped in step {step}, since {what} ({one_line(cause)[:120]}): go on from the last "
            "checkpoint with `resume`"
        )

    def _silent_ranks(self, seconds: float = 3.0) -> list[int]:
        """Report that this rank stops. Return the ranks that do not report the same within a few seconds."""
        try:
            store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
            store.set(f"stopped/{self.rank}", "")
            end = time.monotonic() + seconds
            while missing := [r for r in range(world) if not store.check([f"stopped/{r}"])]:
                if time.monotonic() > end:
                    return missing
                time.sleep(0.05)
        except (RuntimeError, OSError):  # the rank that keeps the store is lost
            pass
        return []


def select_gpu() -> None:
    """Let this process see only its own GPU of the machine. Call it before CUDA is initialized."""
    if torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]


def join_run(
    options: ParallelOptions, config: MoonwhaleConfig, context: int, on_cpu: bool, settings: dict
) -> RankPlacement | None:
    """Connect the processes that torchrun started.

    Args:
        settings: the options, by name, with which all processes must have been started.

    Returns:
        the place of this process, or None if each process has the whole model.

    Raises:
        UserError: before any group is made, if the model can't be split as asked; on every rank, if the ranks were
            started with different settings; if a rank is missing after the timeout.
    """
    if not options.splits_model:
        init_process_group(on_cpu, options.timeout)
        return None
    schedule, replicas = SCHEDULES[options.effective_schedule], options.replicas(world_size())
    partition(config, schedule.stages_per_rank * options.pp, context)
    options.check_experts(config.n_routed_experts if config.first_k_dense_replace < config.num_blocks else 0)
    # torch would log a lost rank's error, which `explain_lost_rank` says in one line
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
    timeout = timedelta(seconds=options.timeout)
    init_process_group(on_cpu, options.timeout)
    for name in TORCHRUN_VARIABLES:
        os.environ.pop(name, None)
    control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=timeout)
    _check_settings(settings | {f"parallel.{name}": value for name, value in vars(options).items()}, control)
    return place_rank(options.pp, replicas, options.ep, schedule.bidirectional, timeout, control)


def place_rank(
    pp: int,
    replicas: int,
    ep: int,
    bidirectional: bool,
    timeout: timedelta,
    control_group: dist.ProcessGroup | None = None,
) -> RankPlacement:
    """Make the groups of `replicas` pipelines of `pp` ranks. All processes call it together.

    Args:
        ep: how many replicas share their experts, each with a shard of them.
        bidirectional: ranks r and P - 1 - r of a pipeline hold the same stages.
        timeout: how long a rank waits for another.
    """
    rank = dist.get_rank()
    # Ranks of a pipeline that hold the same stages
    same_stages = [sorted({r, pp - 1 - r}) for r in range(pp // 2)] if bidirectional else [[r] for r in range(pp)]

    def processes(of_replicas: Iterable[int], pp_ranks: Iterable[int]) -> list[int]:
        return [c * pp + r for c in of_replicas for r in pp_ranks]

    def own_group(groups: Iterable[list[int]]) -> dist.ProcessGroup | None:
        made = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in groups]
        return next((group for ranks, group in made if rank in ranks), None)

    pp_group = own_group(processes([c], range(pp)) for c in range(replicas))
    replicate_group = own_group(processes(range(replicas), ranks) for ranks in same_stages)
    ep_group, expert_replicate_group = None, replicate_group
    if ep > 1:
        ep_group = own_group(
            processes(range(first, first + ep), [r]) for first in range(0, replicas, ep) for r in range(pp)
        )
        expert_replicate_group = own_group(
            processes(range(k, replicas, ep), ranks) for k in range(ep) for ranks in same_stages
        )
    return RankPlacement(
        rank=rank,
        pp_rank=rank % pp,
        replica=rank // pp,
        num_replicas=replicas,
        pp_group=pp_group,
        replicate_group=replicate_group,
        ep_group=ep_group,
        expert_replicate_group=expert_replicate_group,
        control_group=control_group,
    )


def _check_settings(settings: dict, control_group: dist.ProcessGroup) -> None:
    """Raise a UserError on every rank unless all ranks have the same settings."""
    gathered = [None] * dist.get_world_size(control_group)
    dist.all_gather_object(gathered, settings, group=control_group)
    first = gathered[0]
    for rank, other in enumerate(gathered):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise UserError(
                    f"`{name}`: rank {rank} was started with {other.get(name)!r}, rank 0 with {first.get(name)!r}: "
                    "start all ranks with the same options"
                )


def run_on_all(work: Callable[[], object] | None, group: dist.ProcessGroup) -> None:
    """Run `work`, if this rank has any, and wait for the other ranks of the group.

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
