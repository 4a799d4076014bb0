"""The schedules there are, what each asks of a run, and the options of a pipeline. Nothing heavy: `--help` needs it."""

import typing
from dataclasses import dataclass

from moonwhale.errors import UserError, did_you_mean


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


@dataclass(frozen=True)
class Parallel:
    """`--parallel.FIELD`: how a run is spread over the processes that torchrun starts. Several times `pp` of them are
    copies of the pipeline, which share each step's micro-batches.

    Raises:
        UserError: an impossible setting, naming the nearest that works.
    """

    pp: int = 1  # ranks of the pipeline; 1: none, every process has the whole model
    schedule: str = "dualpipev"
    fsdp: bool = False  # ranks that hold the same weights keep a part of them each (FSDP2)
    timeout: int = 600  # seconds that a rank waits for another

    def __post_init__(self):
        for name in ("pp", "timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"--parallel.{name}: {getattr(self, name)} is impossible: it must be at least 1")
        if self.schedule not in SCHEDULES:
            near = did_you_mean(self.schedule, SCHEDULES)
            raise UserError(f"--parallel.schedule: {self.schedule!r} is none of {', '.join(SCHEDULES)}{near}")
        if SCHEDULES[self.schedule].mirrored and self.pp > 1 and self.pp % 2:
            raise UserError(
                f"--parallel.pp: {self.schedule} runs two copies against each other, so {self.pp} ranks are "
                f"impossible: give {self.pp - 1} or {self.pp + 1}, or --parallel.schedule dualpipev"
            )

    def micro_batches(self, count: int, copies: int, tokens: int, what: str) -> int:
        """How many of a step's `count` micro-batches of so many `tokens` each of `copies` pipelines computes; `what`
        says in words what there are.
        """
        kind, lots, least = SCHEDULES[self.schedule], copies, copies
        if self.pp > 1:
            least, lots = kind.micro_batches * self.pp * copies, copies * (1 + kind.mirrored)
        if count < least or count % lots:
            enough = max(least, -(-count // lots) * lots) * tokens
            raise UserError(
                f"{what}, but "
                + (f"{self.schedule} on {self.pp} ranks" if self.pp > 1 else f"the work of {copies} processes")
                + f", {copies} times," * (copies > 1 and self.pp > 1)
                + f" needs at least {least}"
                + f" and a multiple of {lots}" * (lots > 1)
                + f": give {enough}, or a smaller --batch-size"
            )
        return count // copies

    @property
    def cuts(self) -> bool:
        """Whether a process has less than the whole model, and so needs the PipelineTrainer."""
        return self.pp > 1 or self.fsdp

    def copies(self, world: int) -> int:
        """Pipelines that `world` processes are."""
        copies, rest = divmod(world, self.pp)
        if rest or not copies:
            nearest = " or ".join(str(n * self.pp) for n in (copies, copies + 1) if n)
            raise UserError(
                f"--parallel.pp: pipelines of {self.pp} ranks can't be made of {world} process{'es' * (world > 1)}: "
                f"start torchrun --nproc-per-node {nearest}" + ", or give --parallel.pp 1" * (world == 1)
            )
        if self.fsdp and copies == 1 and not (self.pp > 1 and SCHEDULES[self.schedule].mirrored):
            raise UserError(
                f"--parallel.fsdp: with {world} process{'es' * (world > 1)} and --parallel.pp {self.pp} no weight is "
                f"held twice: start torchrun --nproc-per-node {2 * self.pp}, or leave --parallel.fsdp out"
            )
        return copies


def parallel_fields() -> dict[str, typing.Any]:
    return typing.get_type_hints(Parallel)
