"""The options `--parallel.FIELD` and their checks. This imports nothing heavy, because `--help` imports it."""

from dataclasses import dataclass

from moonwhale.errors import UserError, did_you_mean
from moonwhale.options import option
from moonwhale.parallel.schedule_properties import SCHEDULES

MAX_TIMEOUT = 10_000_000  # seconds, about four months


@dataclass(frozen=True)
class ParallelOptions:
    """How a run is spread over the processes that torchrun starts.

    `pp` processes form a pipeline. All processes form several replicas of it, which share each step's micro-batches.
    Every `ep` replicas share their routed experts.

    Raises:
        UserError: if a setting is impossible. The message names the nearest setting that works.
    """

    pp: int = option(1, "ranks of a pipeline; 1: every process has the whole model")
    ep: int = option(1, "replicas that share their routed experts; 1: each has all of them")
    schedule: str = option("dualpipev", "the pipeline's schedule", choices=tuple(SCHEDULES))
    fsdp: bool = option(False, "shard weights among the ranks that hold the same ones (FSDP2)")
    timeout: int = option(600, "seconds that a rank waits for another")

    def __post_init__(self):
        for name in ("pp", "ep", "timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"`parallel.{name}`: {getattr(self, name)} is impossible: it must be at least 1")
        if self.timeout > MAX_TIMEOUT:
            raise UserError(f"`parallel.timeout`: {self.timeout} is impossible: give at most {MAX_TIMEOUT:,}")
        if self.schedule not in SCHEDULES:
            near = did_you_mean(self.schedule, SCHEDULES)
            raise UserError(f"`parallel.schedule`: {self.schedule!r} is none of {', '.join(SCHEDULES)}{near}")
        if SCHEDULES[self.schedule].bidirectional and self.pp > 1 and self.pp % 2:
            raise UserError(
                f"`parallel.pp`: {self.schedule} runs two replicas in opposite directions, so {self.pp} ranks are "
                f"impossible: give {self.pp - 1} or {self.pp + 1}, or `parallel.schedule` dualpipev"
            )
        if self.fsdp and self.ep > 1:
            raise UserError("`parallel.fsdp`: it can't be combined with shared experts: leave `parallel.ep` out")

    @property
    def splits_model(self) -> bool:
        """Whether a process holds less than the whole model, so that the run needs the PipelineTrainer."""
        return self.pp > 1 or self.ep > 1 or self.fsdp

    @property
    def effective_schedule(self) -> str:
        """The schedule that runs. A single stage runs one micro-batch after the other, as 1F1B does."""
        return self.schedule if self.pp > 1 else "1f1b"

    def check_experts(self, num_experts: int) -> None:
        """Check that the ranks can share the routed experts of a layer; `num_experts` is 0 if no layer has any."""
        if self.ep > 1 and not num_experts:
            raise UserError("`parallel.ep`: the model has no experts to share: leave it out")
        if num_experts % self.ep:
            near = _nearest_divisors(num_experts, self.ep)
            raise UserError(f"`parallel.ep`: {num_experts} experts can't be shared by {self.ep} ranks: give {near}")

    def micro_batches_per_replica(self, count: int, replicas: int, tokens: int, found: str) -> int:
        """Divide a step's `count` micro-batches of `tokens` tokens each among the replicas.

        Raises:
            UserError: if there are too few or they do not divide. The message begins with `found`, which says in words
                what the step consists of.
        """
        schedule, multiple, least = SCHEDULES[self.effective_schedule], replicas, replicas
        if self.pp > 1:
            least = schedule.min_micro_batches_per_rank * self.pp * replicas
            multiple = replicas * (2 if schedule.bidirectional else 1)
        if count < least or count % multiple:
            work = f"{self.schedule} on {self.pp} ranks" if self.pp > 1 else f"the work of {replicas} processes"
            if self.pp > 1 and replicas > 1:
                work += f", {replicas} times,"
            needed = f"at least {least}" + (f" and a multiple of {multiple}" if multiple > 1 else "")
            enough = max(least, -(-count // multiple) * multiple) * tokens
            raise UserError(f"{found}, but {work} needs {needed}: give {enough}, or a smaller `batch_size`")
        return count // replicas

    def replicas(self, world_size: int) -> int:
        """Return how many replicas of the pipeline the processes form; without a pipeline, one for each process.

        Raises:
            UserError: if the number of processes does not fit the options.
        """
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        replicas, rest = divmod(world_size, self.pp)
        if rest or not replicas:
            nearest = " or ".join(str(n * self.pp) for n in (replicas, replicas + 1) if n)
            alone = ", or give `parallel.pp` 1" if world_size == 1 else ""
            raise UserError(
                f"`parallel.pp`: pipelines of {self.pp} ranks can't be made of {processes}: "
                f"start torchrun --nproc-per-node {nearest}{alone}"
            )
        if replicas % self.ep:
            groups = replicas // self.ep
            nearest = " or ".join(str(n * self.ep * self.pp) for n in (groups, groups + 1) if n)
            raise UserError(
                f"`parallel.ep`: {self.ep} replicas of the model are to share experts, but there are {replicas}: "
                f"give {_nearest_divisors(replicas, self.ep)}, or start torchrun --nproc-per-node {nearest}"
            )
        if self.fsdp and replicas == 1 and not (self.pp > 1 and SCHEDULES[self.schedule].bidirectional):
            raise UserError(
                f"`parallel.fsdp`: with {processes} and `parallel.pp` {self.pp} no weight is "
                f"held twice: start torchrun --nproc-per-node {2 * self.pp}, or leave `parallel.fsdp` out"
            )
        return replicas

    def describe(self, world_size: int) -> str:
        """Say in words how the processes share the work, to follow the name of the device."""
        parts = []
        if self.pp > 1:
            parts.append(f"{self.schedule} over {self.pp} processes")
            if (replicas := self.replicas(world_size)) > 1:
                parts.append(f"{replicas} times")
        elif world_size > 1:
            parts.append(f"{world_size} processes")
        if self.ep > 1:
            parts.append(f"each layer's experts over {self.ep}")
        if self.fsdp:
            parts.append("weights sharded")
        return "".join(f", {part}" for part in parts)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest_divisors(number: int, wrong: int) -> str:
    """Name the divisors of a number that are nearest to `wrong`, below and above."""
    below = max(n for n in divisors(number) if n < wrong)
    above = [n for n in divisors(number) if n > wrong]
    return " or ".join(map(str, [below, *above][:2]))
