"""The verb `moonwhale grpo`: reinforcement learning from answers that a rule can check."""

import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from moonwhale.data.tasks import TASK_HELP, Problem, load_task
from moonwhale.errors import UserError
from moonwhale.options import option, require, require_at_least_one, require_not_negative
from moonwhale.posttrain import progress
from moonwhale.posttrain.config import PostTrainOptions, open_model
from moonwhale.posttrain.rewards import BUILTIN_REWARDS, load_rewards
from moonwhale.processes import print_on_rank_0, world_size
from moonwhale.train import run_folder
from moonwhale.train.run import Run, common_trainer_arguments, execute
from moonwhale.train.run_options import run_verb
from moonwhale.train.run_result import RunResult

if typing.TYPE_CHECKING:
    from datasets import Dataset

# The arguments of TRL's GRPOConfig for each objective.
# - loss_type "grpo" averages over the tokens of an answer, then over the answers: every answer has the same weight.
#   "dapo" averages over all tokens: a long answer has more weight.
# - beta is the weight of the KL penalty, which keeps the policy near the model it began as.
# - epsilon clips the ratio of the new to the old policy to 1 ± epsilon.
# - use_bias_correction_kl multiplies the KL penalty by that ratio, as DeepSeek-V3.2 does. DeepSeek-R1 does not.
OBJECTIVES = {
    "r1": {"loss_type": "grpo", "beta": 0.001, "epsilon": 0.2, "use_bias_correction_kl": False},
    "trl": {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "use_bias_correction_kl": True},
}
OBJECTIVES_HELP = """objectives:
  r1   DeepSeek-R1's (arXiv 2501.12948 eq. 1-3): the mean over answers of the mean over their tokens of
       min(ratio A, clip(ratio, 1 - ε, 1 + ε) A) - β KL, with A = (r - mean) / (std + 1e-4) in the group
       and β = 0.001.
  trl  TRL's default: the mean over all tokens, and β = 0. If --beta adds a KL term, it is multiplied by the
       ratio, as in DeepSeek-V3.2.
--beta and --epsilon override the values of both."""
REWARDS_HELP = (
    f"NAME or NAME=WEIGHT of {', '.join(BUILTIN_REWARDS)}, or a function of yours as module:function, whose module is "
    "imported, hence run, also if a --config file names it"
)


@dataclass
class GRPOOptions(PostTrainOptions):
    """The options of GRPO. Lengths are in tokens."""

    verb: ClassVar[str] = "grpo"
    RENAMED: ClassVar[dict[str, str]] = {"show": "show_answers"}

    task: str = option("chain_sum", TASK_HELP, group="task")
    questions: int = option(10_000, "training questions to draw from the task", group="task")
    rewards: list[str] = option(["accuracy", "format"], REWARDS_HELP, group="task")

    objective: str = option(
        "r1", "r1: DeepSeek-R1's; trl: TRL's default (see below)", group="GRPO", choices=tuple(OBJECTIVES)
    )
    beta: float | None = option(
        None, "weight of the KL divergence from CHECKPOINT (by default, the objective's)", group="GRPO"
    )
    epsilon: float | None = option(
        None, "clips the ratio to 1 ± this, if --iterations is above 1 (by default, the objective's)", group="GRPO"
    )
    group_size: int = option(8, "answers per question, which are compared with one another", group="GRPO")
    questions_per_step: int = option(16, "questions per optimizer step, on all devices together", group="GRPO")
    iterations: int = option(
        1, "optimizer steps on the same answers (μ), after which the run evaluates, saves or stops", group="GRPO"
    )
    temperature: float = option(1.0, "sampling temperature of the answers", group="GRPO")
    max_new_tokens: int = option(256, "maximum length of an answer", group="GRPO")

    batch_size: int = option(64, "answers per micro-batch on each device", group="optimization")
    lr: float = option(
        1e-4, "learning rate after warm-up, on AdamW's scale, for both Muon and AdamW", group="optimization"
    )
    steps: int = option(200, "optimizer steps", group="optimization")

    eval_questions: int = option(64, "held-out questions per evaluation", group="reports and checkpoints")
    show_answers: int = option(
        2, "answers to print with each log line; all are kept in completions/", group="reports and checkpoints"
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least_one(self, "questions", "questions_per_step", "iterations")
        require_at_least_one(self, "max_new_tokens", "steps", "eval_questions")
        require_not_negative(self, "show_answers", "beta", "epsilon")
        for name in ("questions", "eval_questions"):
            require(self, name, getattr(self, name) <= 10**7, "give at most 10,000,000, which fit into memory")
        require(self, "group_size", self.group_size >= 2, "an answer is compared with at least one other")
        require(self, "temperature", self.temperature > 0, "at 0 all answers of a group would be the same")
        self.require_room_for_warmup(self.steps)
        self.gradient_accumulation_steps()
        if self.questions < self.questions_per_step:
            raise UserError(
                f"`questions`: {self.questions} are fewer than `questions_per_step` {self.questions_per_step}: give at "
                "least that many"
            )

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        if self.iterations == 1:  # the policy has not moved since it drew the answers: the ratio is 1
            yield "epsilon", "with `iterations` 1"

    def shared_steps(self, steps: int) -> int:
        """All of the shorter run, since the learning rate is constant after its warm-up, to the end of `iterations`."""
        shorter = min(self.steps, steps) // self.iterations * self.iterations
        return shorter if self.warmup_steps <= shorter else 0

    def describe_rate(self) -> str:
        return "the learning rate stays constant"

    def gradient_accumulation_steps(self, replicas: int = 1) -> int:
        """Returns the micro-batches per optimizer step on each of the devices, of which there are `replicas`."""
        answers, at_once = self.group_size * self.questions_per_step, self.batch_size * replicas
        if answers % at_once:
            around = {1, *range(max(1, self.batch_size - 4096), self.batch_size + 4097)}
            fits = [n for n in sorted(around) if answers % (n * replicas) == 0]
            nearest = min(fits, key=lambda n: abs(n - self.batch_size), default=None)
            advice = f"give `batch_size` {nearest}" if nearest else f"give `questions_per_step` {replicas}"
            raise UserError(
                f"`batch_size`: {self.batch_size} x {replicas} device(s) does not divide the {answers} answers of a "
                f"step (`group_size` {self.group_size} x `questions_per_step` {self.questions_per_step}): {advice}"
            )
        return answers // at_once


def main(argv: list[str]) -> None:
    description = "Train a model by rewards for its own answers to questions that a rule can check (GRPO)."
    examples = (
        "moonwhale grpo runs/cold --task chain_sum --out runs/counts",
        "moonwhale grpo runs/talks --task gsm8k --rewards accuracy,format=0.5 --out runs/thinks",
    )
    run_verb(GRPOOptions, argv, grpo, description=description, examples=examples, epilog=OBJECTIVES_HELP)


def grpo(config: GRPOOptions) -> RunResult:
    """Trains as `config` says.

    The folder `config.out` then holds the model, its checkpoints, `run.yaml` and `rewards.png`. For each log line,
    `completions/` holds all answers of the step with their rewards.

    Returns:
        its folder, its log and the model.

    Raises:
        UserError: an option, the task or the checkpoint is at fault. The message is one line.
        KeyboardInterrupt: the user asked to stop; a checkpoint has been written.
    """
    return execute(config, build, progress.plot_rewards)


def build(config: GRPOOptions) -> Run:
    """Draws the questions, opens the model, prints what will be trained, and writes `run.yaml`.

    Raises:
        UserError: an option does not fit the machine, the model or the task.
    """
    task = load_task(config.task)
    problems = task.problems(config.questions, config.seed)
    held_out = task.problems(config.eval_questions, config.seed, held_out=True)
    rewards, weights = load_rewards(config.rewards, task, problems + held_out)

    from moonwhale import precision
    from moonwhale.infer.decoder import require_latent_attention
    from moonwhale.posttrain.grpo_trainer import MTPGRPOTrainer

    choice = precision.choose(config.device, config.precision)
    model, tokenizer = open_model(config, choice)
    require_latent_attention(model.config)  # the engine draws the answers
    args = trainer_arguments(config, choice, weights)
    task_description = f"{task.name}: {len(problems):,} questions"
    describe(config, choice, args, task_description)
    run_folder.create(config)
    # Some of reasoning-gym's questions depend on Python's hash seed: the same task may give others when it is resumed.
    contents = task.package or json.dumps([[problem.question, problem.answer] for problem in problems])
    what, record = f"`task`: {config.task}", f"{'task':<11}{task_description}"
    run_folder.check_data_unchanged(config, what, contents.encode(), record)
    make_trainer = partial(
        MTPGRPOTrainer,
        model=model,
        args=args,
        reward_funcs=rewards,
        train_dataset=rows_of(problems),
        eval_dataset=rows_of(held_out, first=len(problems)),
        processing_class=tokenizer,
    )
    summarize = partial(progress.summary, out=Path(config.out))
    return Run(config, choice, make_trainer, progress.log_line, summarize)


def trainer_arguments(config: GRPOOptions, choice, reward_weights: list[float]):
    """Returns the run's options as TRL's GRPOConfig."""
    from moonwhale.posttrain.grpo_trainer import MTPGRPOConfig

    given = {name: getattr(config, name) for name in ("beta", "epsilon") if getattr(config, name) is not None}
    # A checkpoint holds no answers: a run can go on only from a step whose next one draws new ones.
    reports = {
        name: math.ceil(getattr(config, name) / config.iterations) * config.iterations
        for name in ("eval_every", "save_every")
    }
    return MTPGRPOConfig(
        **common_trainer_arguments(replace(config, **reports), choice, config.steps),
        **OBJECTIVES[config.objective] | given,
        gradient_accumulation_steps=config.gradient_accumulation_steps(replicas=world_size()),
        lr_scheduler_type="constant_with_warmup",
        num_generations=config.group_size,
        num_generations_eval=1,
        num_iterations=config.iterations,
        last_shared_step=config.shared_steps(config.steps) if config.save_every else 0,
        temperature=config.temperature,
        max_completion_length=config.max_new_tokens,
        reward_weights=reward_weights,
        log_completions=True,
        num_completions_to_print=config.show_answers,
    )


def describe(config: GRPOOptions, choice, args, task: str) -> None:
    """Prints what will be trained."""
    import torch

    objective = ", ".join(f"{name} {getattr(args, name)}" for name in ("loss_type", "beta", "epsilon"))
    answers = f"{config.questions_per_step} x {config.group_size} answers"
    print_on_rank_0(f"{'model':<11}{config.checkpoint}")
    print_on_rank_0(f"{'task':<11}{task}, rewards {', '.join(config.rewards)}")
    print_on_rank_0(f"{'objective':<11}{config.objective}: {objective}")
    print_on_rank_0(f"{'device':<11}{choice.reason}, {torch.get_num_threads()} threads")
    print_on_rank_0(f"{'run':<11}{config.steps} steps of {answers} into {config.out}")


def rows_of(problems: list[Problem], first: int = 0) -> "Dataset":
    """Returns the columns that TRL and the rewards read.

    `problem` is the index by which the rewards find a problem; the indices start at `first`.
    """
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt": [problem.messages for problem in problems],
            "answer": [problem.answer for problem in problems],
            "problem": list(range(first, first + len(problems))),
        }
    )
