"""The schedules there are, and what each asks of a run. Only the standard library, since options are checked by it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a schedule asks of P ranks. Its stages are numbered along the model, a second copy's after the first's.

    v_shape: rank r has the stages r and 2P - 1 - r.
    mirrored: the second of them is stage P - 1 - r of a second copy, which runs the other way; P is even, and so is the
        number of micro-batches, half of them for each copy.
    """

    stages: int  # that the model is cut into, for each rank
    micro_batches: int  # least number of them for each rank
    v_shape: bool = False
    mirrored: bool = False


SCHEDULES = {
    "dualpipev": Kind(stages=2, micro_batches=2, v_shape=True),
    "dualpipe": Kind(stages=1, micro_batches=2, v_shape=True, mirrored=True),
    "zerobubble": Kind(stages=2, micro_batches=2, v_shape=True),
    "1f1b": Kind(stages=1, micro_batches=1),
}


def places(schedule: str, ranks: int) -> list[int]:
    """The rank of each stage."""
    return [*range(ranks), *reversed(range(ranks))] if SCHEDULES[schedule].v_shape else [*range(ranks)]
