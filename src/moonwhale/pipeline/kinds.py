"""The schedules there are, and what each asks of a run. Only the standard library, since options are checked by it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A schedule of torch.distributed.pipelining: `engine` is its class there."""

    engine: str
    stages: int  # on each rank
    micro_batches: int  # least number of them for each rank of the pipeline
    v_shape: bool  # rank r of P holds stages r and 2P - 1 - r


SCHEDULES = {
    "dualpipev": Kind("ScheduleDualPipeV", stages=2, micro_batches=2, v_shape=True),
    "zerobubble": Kind("ScheduleZBVZeroBubble", stages=2, micro_batches=2, v_shape=True),
    "1f1b": Kind("Schedule1F1B", stages=1, micro_batches=1, v_shape=False),
}


def places(schedule: str, ranks: int) -> list[int]:
    """The rank of each stage."""
    return [*range(ranks), *reversed(range(ranks))] if SCHEDULES[schedule].v_shape else [*range(ranks)]
