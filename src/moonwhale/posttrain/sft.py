"""`moonwhale sft`: from a base model to an assistant."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from moonwhale.data.hub_sets import DATA_HELP
from moonwhale.errors import UserError
from moonwhale.options import option, require
from moonwhale.posttrain import config as post
from moonwhale.posttrain.config import PostTraining
from moonwhale.processes import is_main_process, say, world_size
from moonwhale.train import run_folder

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
    """Fine-tunes as `config` says; the folder `config.out` then holds the model, its checkpoints, `run.yaml` and
    `loss.png`.

    Raises:
        UserError: one line, for anything the user can put right.
        KeyboardInterrupt: after a stop that was asked for, and a checkpoint.
    """
    checkpoint = config.begin()

    import torch

    from moonwhale import precision
    from moonwhale.checkpoint import publish_model
    from moonwhale.data.loading import load_source
    from moonwhale.data.sft_dataset import load_conversations
    from moonwhale.data.tokenizer import byte_lengths
    from moonwhale.posttrain.sft_trainer import MTPSFTConfig, MTPSFTTrainer, lora, merge, pack
    from moonwhale.train import progress

    choice = precision.choose(config.device, config.precision)
    model, tokenizer = config.open(choice)
    context = config.context or model.config.max_position_embeddings
    if context > model.config.max_position_embeddings:
        raise UserError(
            f"`context`: {context} is longer than the model's context of {model.config.max_position_embeddings}: "
            "give at most that"
        )
    source = load_source(config.data, config.data_split, config.data_columns, config.data_documents)
    train, held_out = load_conversations(source, tokenizer)
    rows, cut = pack(train, context)
    world = world_size()
    of_step = config.batch_size * config.accumulation * world
    steps = config.steps or max(1, round(config.epochs * len(rows) / of_step))
    if len(rows) < config.batch_size * world:
        raise UserError(
            f"`batch_size`: {config.batch_size * world} rows are computed at once, but the conversations fill only "
            f"{len(rows)} rows of `context` {context}: lower the one or the other, or give more `data`"
        )
    out = Path(config.out)
    say(f"{'model':<11}{config.checkpoint}" + (f", LoRA of rank {config.lora_rank}" if config.lora_rank else ""))
    say(f"{'data':<11}{source.name}: {len(train):,} conversations in {len(rows):,} rows, {len(held_out):,} held out")
    if cut:
        say(f"{'split':<11}{cut:,} conversations are longer than {context} tokens, and go on in another row")
    say(f"{'device':<11}{choice.reason}, {torch.get_num_threads()} threads")
    say(f"{'run':<11}{steps:,} steps of {of_step} rows into {out}")
    if config.is_finished(checkpoint, steps):
        return
    if is_main_process():
        post.write(config)

    args = MTPSFTConfig(
        **run_folder.trainer_arguments(config, choice, steps),
        gradient_accumulation_steps=config.accumulation,
        lr_scheduler_type="linear",
        max_length=context,
        dataloader_drop_last=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    seen, _ = pack(held_out, context)

    def build(callbacks: list) -> MTPSFTTrainer:
        return MTPSFTTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=seen.select(range(min(config.eval_rows, len(seen)))),
            processing_class=tokenizer,
            byte_lengths=torch.from_numpy(byte_lengths(tokenizer)),
            peft_config=lora(model, config.lora_rank, LORA_MODULES) if config.lora_rank else None,
            callbacks=callbacks,
        )

    plot = partial(progress.plot_loss, path=out / "loss.png")
    trainer = run_folder.carry_out(config, choice, build, checkpoint, "sft", plot, progress.line_of)
    if is_main_process():
        last = out / f"checkpoint-{trainer.state.global_step}"
        merge(trainer.model, tokenizer, out) if config.lora_rank else publish_model(last, out)
    say(progress.summary(trainer.state.log_history, None, out))
