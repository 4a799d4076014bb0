"""The verb `moonwhale sft`: supervised fine-tuning, which makes a base model an assistant."""

import hashlib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from moonwhale.data.hub_sets import DATA_HELP
from moonwhale.data.source_options import SourceOptions
from moonwhale.errors import UserError, require_package
from moonwhale.options import option, require, require_at_least_one, require_not_negative
from moonwhale.posttrain.config import PostTrainOptions, open_model
from moonwhale.processes import print_on_rank_0, world_size
from moonwhale.train import progress, run_folder
from moonwhale.train.outlook import in_passes, repetition
from moonwhale.train.run import Run, common_trainer_arguments, execute
from moonwhale.train.run_options import run_verb
from moonwhale.train.run_result import RunResult

if typing.TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class SFTOptions(SourceOptions, PostTrainOptions):
    """The options of supervised fine-tuning. Lengths are in tokens."""

    verb: ClassVar[str] = "sft"

    data: str = option("chitchat", f"conversations: {DATA_HELP}; task:SPEC for a task's right answers", group="data")
    context: int | None = option(
        None, "tokens per row; conversations are packed into rows (by default, the model's context)", group="data"
    )

    epochs: float = option(1.0, "passes over all conversations", group="optimization")
    steps: int | None = option(None, "optimizer steps, in place of --epochs", group="optimization")
    accumulation: int = option(1, "micro-batches per optimizer step", group="optimization")
    lora_rank: int = option(
        0, "train adapters of this rank (peft) in place of the weights; 0 turns it off", group="optimization"
    )

    eval_rows: int = option(64, "held-out rows per evaluation", group="reports and checkpoints")
    sample_every: int = option(
        50, "steps between samples of what the model answers; 0: none", group="reports and checkpoints"
    )
    sample_prompt: str = option("Hi! How are you?", "message that the samples answer", group="reports and checkpoints")

    def __post_init__(self):
        super().__post_init__()
        require_at_least_one(self, "accumulation", "eval_rows", "steps", "data_documents")
        require_not_negative(self, "sample_every")
        require(self, "lora_rank", 0 <= self.lora_rank <= 2**16, "give a rank from 0 to 65,536")
        if self.lora_rank:
            require_package("peft", "rl", "`lora_rank`")
        require(self, "context", self.context is None or self.context >= 2, "a row needs at least 2 tokens")
        require(self, "epochs", self.epochs > 0, "it must be above 0")
        if self.steps is not None:
            self.require_room_for_warmup(self.steps)

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        if self.steps is not None:
            yield "epochs", f"with `steps` {self.steps}"
        if not self.sample_every:
            yield "sample_prompt", "with `sample_every` 0"
        if self.lora_rank:  # frozen weights are neither clipped nor rebalanced
            for name in ("qk_clip_tau", "bias_update_speed"):
                yield name, f"with `lora_rank` {self.lora_rank}"


def main(argv: list[str]) -> None:
    description = (
        "Fine-tune a model on conversations. The loss is on what the assistant says; the MTP modules are trained too."
    )
    examples = (
        "moonwhale sft runs/mine --data openorca --out runs/talks",
        "moonwhale sft runs/mine --data task:chain_sum --steps 200 --lr 3e-3 --out runs/cold",
    )
    run_verb(SFTOptions, argv, sft, description=description, examples=examples)


def sft(config: SFTOptions) -> RunResult:
    """Fine-tunes as `config` says. The folder `config.out` then holds the model, its checkpoints, `run.yaml` and
    `loss.png`.

    Returns:
        its folder, its log and the model.

    Raises:
        UserError: an option, the data or the checkpoint is at fault. The message is one line.
        KeyboardInterrupt: the user asked to stop; a checkpoint has been written.
    """
    return execute(config, build, progress.plot_loss)


def build(config: SFTOptions) -> Run:
    """Opens the model, packs the conversations, prints what will be trained, and writes `run.yaml`.

    Raises:
        UserError: an option does not fit the machine, the model or the data.
    """
    import torch

    from moonwhale import precision
    from moonwhale.data.tokenizer import byte_lengths
    from moonwhale.posttrain.lora import lora_config, merge_adapters
    from moonwhale.posttrain.sft_trainer import MTPSFTTrainer
    from moonwhale.train.samples import SampleAnswer, message_ids

    check_processes(config)
    choice = precision.choose(config.device, config.precision)
    model, tokenizer = open_model(config, choice)
    context = choose_context(config, model.config.max_position_embeddings)
    train_rows, eval_rows, data_description = load_rows(config, tokenizer, context)
    micro_batches = len(train_rows) // (config.batch_size * world_size())
    steps_per_epoch = -(-micro_batches // config.accumulation)  # the last one takes those that are left
    steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    config.require_room_for_warmup(steps)
    args = trainer_arguments(config, choice, steps, context)
    if config.sample_every:
        message_ids(tokenizer, config.sample_prompt)  # a message that can't be answered is refused now
    describe(config, choice, data_description, steps, steps / steps_per_epoch)
    run_folder.create(config)
    what = f"`data`: {config.data}, or its tokenizer,"
    run_folder.check_data_unchanged(config, what, contents_of(train_rows), data_description)
    make_trainer = partial(
        MTPSFTTrainer,
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        byte_lengths=torch.from_numpy(byte_lengths(tokenizer)),
        evaluate_all=True,
        peft_config=lora_config(model, config.lora_rank) if config.lora_rank else None,
    )
    summarize = partial(progress.summary, out=Path(config.out))
    run = Run(config, choice, make_trainer, progress.log_line, summarize)
    if config.sample_every:
        run.make_sampler = partial(SampleAnswer, every=config.sample_every, prompt=config.sample_prompt)
    if config.lora_rank:
        run.publish = lambda trainer, out: merge_adapters(trainer.model, tokenizer, out)
    return run


def check_processes(config: SFTOptions) -> None:
    """Raises UserError if the run to be resumed was begun on another number of processes, with other steps."""
    from moonwhale.checkpoint import list_checkpoints, n_processes

    before = [n_processes(checkpoint) for checkpoint in list_checkpoints(config.out)[:1] if config.resume]
    if before and before[0] not in (0, world_size()):
        raise UserError(
            f"`resume`: the run in {config.out} has its steps from {before[0]} processes, not {world_size()}: start "
            f"{before[0]}, or train into another `out`"
        )


def choose_context(config: SFTOptions, longest: int) -> int:
    """Returns the tokens per row: `config.context`, or by default the model's context, `longest`."""
    context = config.context or longest
    if context > longest:
        raise UserError(f"`context`: {context} is longer than the model's context of {longest}: give at most that")
    return context


def load_rows(config: SFTOptions, tokenizer, context: int) -> tuple["Dataset", "Dataset", str]:
    """Returns the packed rows for training, the packed rows for evaluation, and a description to print.

    Raises:
        UserError: the conversations fill fewer rows than are computed at once.
    """
    from moonwhale.data.sft_dataset import load_conversations
    from moonwhale.posttrain.sft_trainer import pack

    source = config.load_source()
    train, held_out = load_conversations(source, tokenizer)
    rows, n_split = pack(train, context)
    rows_at_once = config.batch_size * world_size()
    if len(rows) < rows_at_once:
        raise UserError(
            f"`batch_size`: {rows_at_once} rows are computed at once, but the conversations fill only "
            f"{len(rows)} rows of `context` {context}: lower one of the two, or give more `data`"
        )
    description = (
        f"{'data':<11}{source.name}: {len(train):,} conversations in {len(rows):,} rows, {len(held_out):,} held out"
    )
    if n_split:
        description += (
            f"\n{'split':<11}{n_split:,} conversations are longer than {context} tokens and continue in another row"
        )
    eval_rows, _ = pack(held_out, context)
    return rows, eval_rows.select(range(min(config.eval_rows, len(eval_rows)))), description


def contents_of(rows: "Dataset") -> bytes:
    """Returns bytes that differ if a token, a label or a row's end does."""
    sums = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(1000):
        for name in ("input_ids", "labels"):
            column = batch[name].combine_chunks()
            sums.update(column.value_lengths().to_numpy().tobytes())
            sums.update(column.flatten().to_numpy().tobytes())
    return sums.digest()


def describe(config: SFTOptions, choice, data_description: str, steps: int, passes: float) -> None:
    """Prints what will be trained, and a warning if that is too many `passes` over the conversations."""
    import torch

    print_on_rank_0(
        f"{'model':<11}{config.checkpoint}" + (f", LoRA of rank {config.lora_rank}" if config.lora_rank else "")
    )
    print_on_rank_0(data_description)
    print_on_rank_0(f"{'device':<11}{choice.reason}, {torch.get_num_threads()} threads")
    rows = config.batch_size * config.accumulation * world_size()
    print_on_rank_0(f"{'run':<11}{steps:,} steps of {rows} rows, {in_passes(passes)} over the text, into {config.out}")
    if warning := repetition(passes):
        print_on_rank_0(f"{'warning':<11}{warning}")


def trainer_arguments(config: SFTOptions, choice, steps: int, context: int):
    """Returns the run's options as TRL's SFTConfig."""
    from moonwhale.posttrain.sft_trainer import MTPSFTConfig

    return MTPSFTConfig(
        **common_trainer_arguments(config, choice, steps),
        gradient_accumulation_steps=config.accumulation,
        lr_scheduler_type="linear",
        max_length=context,
        dataloader_drop_last=True,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are encoded and packed already
    )
