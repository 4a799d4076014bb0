"""What a run says before it trains: how often it reads the text, and what is wrong with its plan.

The limits of repetition are those of Muennighoff et al., "Scaling Data-Constrained Language Models" (arXiv 2305.16264):
up to 4 passes are nearly as good as new text, and after about 16 further ones add almost nothing.
"""

from moonwhale.train.config import TrainConfig

GOOD_PASSES, USEFUL_PASSES = 4, 16


def tokens_after(steps: int, config: TrainConfig, n_rows: int, replicas: int = 1) -> int:
    """Returns how many tokens a run on a text of `n_rows` rows reads in its first `steps`, on all `replicas` together.

    An epoch has as many micro-batches as the rows fill on every replica. Its last step takes those that are left.
    """
    rows_per_step, rows_per_epoch, steps_per_epoch = _epoch(config, n_rows, replicas)
    epochs, steps_left = divmod(steps, steps_per_epoch)
    return (epochs * rows_per_epoch + steps_left * rows_per_step) * config.context


def steps_within(tokens: int, config: TrainConfig, n_rows: int) -> int:
    """Returns the largest number of steps in which a run on a text of `n_rows` rows reads at most `tokens` tokens."""
    rows_per_step, rows_per_epoch, steps_per_epoch = _epoch(config, n_rows, 1)
    epochs, rows_left = divmod(tokens // config.context, rows_per_epoch)
    return epochs * steps_per_epoch + rows_left // rows_per_step


def _epoch(config: TrainConfig, n_rows: int, replicas: int) -> tuple[int, int, int]:
    """Returns the rows of a whole step, and the rows and steps of an epoch."""
    rows_at_once, rows_per_step = config.batch_size * replicas, config.tokens_per_step // config.context
    rows_per_epoch = n_rows // rows_at_once * rows_at_once
    return rows_per_step, rows_per_epoch, -(-rows_per_epoch // rows_per_step)


def describe_run(config: TrainConfig, n_rows: int, replicas: int = 1) -> str:
    """Returns the lines about the steps of a run, with warnings."""
    times = tokens_after(config.steps, config, n_rows, replicas) / (n_rows * config.context)
    passes = in_passes(times)
    steps = f"{config.steps:,} steps of {config.tokens_per_step:,} tokens, {passes} over the text, into {config.out}"
    warnings = [warning for warning in (repetition(times), schedule_without_room(config)) if warning]
    return "\n".join([f"run        {steps}", *(f"warning    {warning}" for warning in warnings)])


def in_passes(times: float) -> str:
    """Returns how often a text is read, such as "0.52 passes"."""
    count = f"{times:.2g}" if times < 10 else f"{times:,.0f}"
    return "1 pass" if count == "1" else f"{count} passes"


def repetition(times: float) -> str | None:
    """Returns a warning if a text is read so often that new text would teach more."""
    if round(times) <= GOOD_PASSES:
        return None
    worth = "teach less and less" if times <= USEFUL_PASSES else f"add almost nothing after {USEFUL_PASSES}"
    return (
        f"the run reads the text {times:,.0f} times: up to {GOOD_PASSES} passes are nearly as good as new text, more "
        f"of them {worth} (arXiv 2305.16264): give more `data`, or make the run shorter"
    )


def schedule_without_room(config: TrainConfig) -> str | None:
    """Returns a warning if warm-up and decay leave the learning rate no step at its peak."""
    if config.schedule != "wsd" or not config.warmup_steps or config.warmup_steps + config.decay_steps < config.steps:
        return None
    return (
        f"the learning rate never stays at its peak: warm-up takes {config.warmup_steps:,} and decay "
        f"{config.decay_steps:,} of all {config.steps:,} steps: give more `steps`, or lower `warmup_steps` or "
        "`decay_fraction`"
    )
