"""`moonwhale sft`: from a base model to an assistant."""

import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from moonwhale.data.hub_sets import DATA_HELP
from moonwhale.errors import UserError
from moonwhale.options import option, require
from moonwhale.posttrain import config as post
from moonwhale.posttrain.config import PostTraining, check, open_model
from moonwhale.processes import print_once, world_size
from moonwhale.train import progress, run_folder
from moonwhale.train.run import Run, already_finished, carry_out, common_trainer_arguments, finish

if typing.TYPE_CHECKING:
    from datasets import Dataset

# Of every attention and dense network, but for kv_b_proj, whose weight is also used outside of its forward.
LORA_MODULES = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class SFTOptions(PostTraining):
    """Every option of supervised fine-tuning. Lengths are in tokens."""

    verb: ClassVar[str] = "sft"

    data: str = option("chitchat", f"conversations: {DATA_HELP}; task:SPEC for a task's right answers", group="data")
    data_split: str | None = option(None, "split of a hub set (train)", group="data")
    data_columns: list[str] | None = option(None, "column of a hub set or a table with the messages", group="data")
    data_documents: int | None = option(None, "read so many conversations only", group="data")
    context: int | None = option(None, "tokens of a row, which conversations share (the model's)", group="data")

    epochs: float = option(1.0, "how often every conversation is seen", group="optimization")
    steps: int | None = option(None, "optimizer steps, in place of --epochs", group="optimization")
    accumulation: int = option(1, "micro-batches of an optimizer step", group="optimization")
    lora_rank: int = option(0, "train adapters of this rank (peft), not the weights; 0 = off", group="optimization")

    eval_rows: int = option(64, "held-out rows of an evaluation", group="reports and checkpoints")

    def __post_init__(self):
        super().__post_init__()
        for name in ("accumulation", "eval_rows", "steps", "data_documents"):
            require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "it must be at least 1")
        require(self, "context", self.context is None or self.context >= 2, "a row needs at least 2 tokens")
        require(self, "epochs", self.epochs > 0, "it must be above 0")
        require(self, "lora_rank", self.lora_rank >= 0, "it must not be negative")


def main(argv: list[str]) -> None:
    description = (
        "Fine-tune a model on conversations: the loss is on what the assistant says, and MTP is trained along."
    )
    sft(post.parse(SFTOptions, argv, description))


def sft(config: SFTOptions) -> None:
    """Fine-tunes as `config` says. The folder `config.out` then holds the model, its checkpoints, `run.yaml` and
    `loss.png`.

    Raises:
        UserError: one line, for anything the user can put right.
        KeyboardInterrupt: the user asked to stop; a checkpoint has been written.
    """
    checkpoint = check(config)
    if already_finished(config, checkpoint, progress.plot_loss):
        return
    run = build(config)
    trainer = carry_out(run, checkpoint)
    finish(run, trainer)


def build(config: SFTOptions) -> Run:
    """Opens the model, packs the conversations, writes `run.yaml`, and prints what will be trained.

    Raises:
        UserError: an option that does not fit the machine, the model or the data.
    """
    import torch

    from moonwhale import precision
    from moonwhale.data.tokenizer import byte_lengths
    from moonwhale.posttrain.sft_trainer import MTPSFTConfig, MTPSFTTrainer, lora, merge

    choice = precision.choose(config.device, config.precision)
    model, tokenizer = open_model(config, choice)
    context = choose_context(config, model.config.max_position_embeddings)
    train_rows, eval_rows, description = load_rows(config, tokenizer, context)
    rows_per_step = config.batch_size * config.accumulation * world_size()
    steps = config.steps or max(1, round(config.epochs * len(train_rows) / rows_per_step))
    print_once(f"{'model':<11}{config.checkpoint}" + (f", LoRA of rank {config.lora_rank}" if config.lora_rank else ""))
    print_once(description)
    print_once(f"{'device':<11}{choice.reason}, {torch.get_num_threads()} threads")
    print_once(f"{'run':<11}{steps:,} steps of {rows_per_step} rows into {config.out}")
    run_folder.create(config)

    args = MTPSFTConfig(
        **common_trainer_arguments(config, choice, steps),
        gradient_accumulation_steps=config.accumulation,
        lr_scheduler_type="linear",
        max_length=context,
        dataloader_drop_last=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )

    def make_trainer(callbacks: list) -> MTPSFTTrainer:
        return MTPSFTTrainer(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            byte_lengths=torch.from_numpy(byte_lengths(tokenizer)),
            peft_config=lora(model, config.lora_rank, LORA_MODULES) if config.lora_rank else None,
            callbacks=callbacks,
        )

    summarize = partial(progress.summary, tokens_per_step=None, out=Path(config.out))
    run = Run(config, choice, make_trainer, progress.log_line, progress.plot_loss, summarize)
    if config.lora_rank:
        run.publish = lambda trainer, out: merge(trainer.model, tokenizer, out)
    return run


def choose_context(config: SFTOptions, longest: int) -> int:
    """The tokens of a row: `config.context`, or all that the model can have."""
    context = config.context or longest
    if context > longest:
        raise UserError(f"`context`: {context} is longer than the model's context of {longest}: give at most that")
    return context


def load_rows(config: SFTOptions, tokenizer, context: int) -> tuple["Dataset", "Dataset", str]:
    """The packed rows to train on, the packed rows of an evaluation, and a description to print.

    Raises:
        UserError: the conversations fill fewer rows than are computed at once.
    """
    from moonwhale.data.loading import load_source
    from moonwhale.data.sft_dataset import load_conversations
    from moonwhale.posttrain.sft_trainer import pack

    source = load_source(config.data, config.data_split, config.data_columns, config.data_documents)
    train, held_out = load_conversations(source, tokenizer)
    rows, n_split = pack(train, context)
    at_once = config.batch_size * world_size()
    if len(rows) < at_once:
        raise UserError(
            f"`batch_size`: {at_once} rows are computed at once, but the conversations fill only "
            f"{len(rows)} rows of `context` {context}: lower the one or the other, or give more `data`"
        )
    description = (
        f"{'data':<11}{source.name}: {len(train):,} conversations in {len(rows):,} rows, {len(held_out):,} held out"
    )
    if n_split:
        description += (
            f"\n{'split':<11}{n_split:,} conversations are longer than {context} tokens, and go on in another row"
        )
    eval_rows, _ = pack(held_out, context)
    return rows, eval_rows.select(range(min(config.eval_rows, len(eval_rows)))), description
