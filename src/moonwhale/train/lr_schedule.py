"""The learning-rate schedules of pretraining, as transformers' schedulers.

SFT's rate decays linearly and GRPO's is constant: see their `trainer_arguments`. To add a schedule, add its name to the
choices of `schedule` in config.py, and its arguments here.
"""

from moonwhale.train.config import TrainConfig


def lr_schedule_arguments(config: TrainConfig) -> dict:
    """Returns the schedule as arguments of transformers' TrainingArguments."""
    if config.schedule == "wsd":
        settings = {
            "num_decay_steps": config.decay_steps,
            "min_lr_ratio": config.min_lr_ratio,
            "decay_type": "linear",
        }
        return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": settings}
    settings = {"min_lr_rate": config.min_lr_ratio}
    return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": settings}
