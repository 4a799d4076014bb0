"""The pipeline schedules, and what each of them needs. This imports nothing heavy, because `--help` imports it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleProperties:
    """What a schedule needs on P ranks.

    v_shape: rank r holds two stages, r and 2P - 1 - r, so the model runs down the ranks and up again.
    bidirectional: the second of them is stage P - 1 - r of a second replica of the model, which runs through the ranks
        in the opposite direction. P and the number of micro-batches are even, and each replica gets half of these.
    """

    stages_per_rank: int  # P ranks split the model into so many stages each
    min_micro_batches_per_rank: int
    v_shape: bool = False
    bidirectional: bool = False


SCHEDULES = {
    "dualpipev": ScheduleProperties(stages_per_rank=2, min_micro_batches_per_rank=2, v_shape=True),
    "dualpipe": ScheduleProperties(stages_per_rank=1, min_micro_batches_per_rank=2, v_shape=True, bidirectional=True),
    "zerobubble": ScheduleProperties(stages_per_rank=2, min_micro_batches_per_rank=2, v_shape=True),
    "1f1b": ScheduleProperties(stages_per_rank=1, min_micro_batches_per_rank=1),
}


def stage_ranks(schedule: str, pp: int) -> list[int]:
    """Return the rank of each stage. A bidirectional schedule's second replica has the numbers P to 2P - 1."""
    return [*range(pp), *reversed(range(pp))] if SCHEDULES[schedule].v_shape else [*range(pp)]
