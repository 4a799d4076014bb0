"""The schedules there are, what each asks of a run, and the options of a pipeline. Nothing heavy: `--help` needs it."""

from dataclasses import dataclass

from moonwhale.errors import UserError, did_you_mean
from moonwhale.options import option


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
    copies of the pipeline, which share each step's micro-batches; and `ep` copies share their routed experts.

    Raises:
        UserError: an impossible setting, naming the nearest that works.
    """

    pp: int = option(1, "ranks of the pipeline; 1: every process has the whole model")
    ep: int = option(1, "replicas that share their routed experts; 1: each has all of them")
    schedule: str = option("dualpipev", "the pipeline's schedule", choices=tuple(SCHEDULES))
    fsdp: bool = option(False, "shard weights among the ranks that hold the same ones (FSDP2)")
    timeout: int = option(600, "seconds that a rank waits for another")

    def __post_init__(self):
        for name in ("pp", "ep", "timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"`parallel.{name}`: {getattr(self, name)} is impossible: it must be at least 1")
        if self.schedule not in SCHEDULES:
            near = did_you_mean(self.schedule, SCHEDULES)
            raise UserError(f"`parallel.schedule`: {self.schedule!r} is none of {', '.join(SCHEDULES)}{near}")
        if SCHEDULES[self.schedule].mirrored and self.pp > 1 and self.pp % 2:
            raise UserError(
                f"`parallel.pp`: {self.schedule} runs two copies against each other, so {self.pp} ranks are "
                f"impossible: give {self.pp - 1} or {self.pp + 1}, or `parallel.schedule` dualpipev"
            )
        if self.fsdp and self.ep > 1:
            raise UserError("`parallel.fsdp`: weights in parts don't go with shared experts: leave `parallel.ep` out")

    @property
    def cuts(self) -> bool:
        """Whether a process has less than the whole model, and so needs the PipelineTrainer."""
        return self.pp > 1 or self.ep > 1 or self.fsdp

    @property
    def order(self) -> str:
        """The schedule that runs: a single stage has one micro-batch after the other."""
        return self.schedule if self.pp > 1 else "1f1b"

    def check_experts(self, experts: int) -> None:
        """Of how many routed experts the model's layers have, 0 if no layer has any."""
        if self.ep > 1 and not experts:
            raise UserError("`parallel.ep`: the model has no experts to share: leave it out")
        if experts % self.ep:
            near = _divisors_near(experts, self.ep)
            raise UserError(f"`parallel.ep`: {experts} experts can't be shared by {self.ep} ranks: give {near}")

    def micro_batches(self, count: int, copies: int, tokens: int, what: str) -> int:
        """How many of a step's `count` micro-batches of so many `tokens` each of `copies` pipelines computes; `what`
        says in words what there are.
        """
        kind, lots, least = SCHEDULES[self.order], copies, copies
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
                + f": give {enough}, or a smaller `batch_size`"
            )
        return count // copies

    def copies(self, world: int) -> int:
        """Pipelines that `world` processes are; without a pipeline, the processes."""
        copies, rest = divmod(world, self.pp)
        if rest or not copies:
            nearest = " or ".join(str(n * self.pp) for n in (copies, copies + 1) if n)
            raise UserError(
                f"`parallel.pp`: pipelines of {self.pp} ranks can't be made of {world} process{'es' * (world > 1)}: "
                f"start torchrun --nproc-per-node {nearest}" + ", or give `parallel.pp` 1" * (world == 1)
            )
        if copies % self.ep:
            nearest = " or ".join(str(n * self.ep * self.pp) for n in (copies // self.ep, copies // self.ep + 1) if n)
            raise UserError(
                f"`parallel.ep`: {self.ep} copies of the model are to share experts, which can't be made of {copies}: "
                f"give {_divisors_near(copies, self.ep)}, or start torchrun --nproc-per-node {nearest}"
            )
        if self.fsdp and copies == 1 and not (self.pp > 1 and SCHEDULES[self.schedule].mirrored):
            raise UserError(
                f"`parallel.fsdp`: with {world} process{'es' * (world > 1)} and `parallel.pp` {self.pp} no weight is "
                f"held twice: start torchrun --nproc-per-node {2 * self.pp}, or leave `parallel.fsdp` out"
            )
        return copies

    def describe(self, world: int) -> str:
        """How `world` processes share the work, in words."""
        words = [f"{world} processes"] * (world > 1 and self.pp == 1)
        if self.pp > 1:
            words.append(f"{self.schedule} over {self.pp} processes")
            words += [f"{self.copies(world)} times"] * (self.copies(world) > 1)
        words += [f"each layer's experts over {self.ep}"] * (self.ep > 1) + ["weights in parts"] * self.fsdp
        return "".join(f", {word}" for word in words)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _divisors_near(number: int, wrong: int) -> str:
    """Of a number's divisors, the nearest on both sides of one that is none."""
    near = [max(n for n in divisors(number) if n < wrong), *(n for n in divisors(number) if n > wrong)][:2]
    return " or ".join(map(str, near))
