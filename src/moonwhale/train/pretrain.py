"""`moonwhale train`: from options to a trained checkpoint folder."""

import hashlib
import os
from functools import partial
from pathlib import Path

from moonwhale import options
from moonwhale.errors import UserError
from moonwhale.processes import is_main_process, say, world_size
from moonwhale.train import run_folder
from moonwhale.train.config import TrainConfig, build_model_config, fit_to_tokenizer, parse, resolve, write_config

DATA_FILE = "data.txt"


def main(argv: list[str]) -> None:
    launched = "WORLD_SIZE" in os.environ  # by torchrun
    try:
        train(parse(argv))
    finally:
        if launched:
            import torch.distributed as dist

            if dist.is_initialized():  # left to the interpreter's end, gloo's threads may abort the process
                dist.destroy_process_group()


def train(config: TrainConfig) -> None:
    """Trains as `config` says; the folder `config.out` then holds the model, its checkpoints, `run.yaml` and
    `loss.png`.

    Raises:
        UserError: one line, for anything the user can put right.
        KeyboardInterrupt: after a stop that was asked for, and a checkpoint.
    """
    main_process, world, split = is_main_process(), world_size(), config.split
    pipelined = split.cuts
    micro_batches = config.micro_batches(split.copies(world)) if pipelined else None
    if main_process:
        run_folder.check_folder(config, lambda run_file: resolve({}, run_file))
    checkpoint = run_folder.newest_checkpoint(config.out) if config.resume else None
    if config.resume:
        say(f"resuming   from {checkpoint}" if checkpoint else f"resuming   nothing: {config.out} holds no checkpoint")

    import torch
    import transformers
    from torch.utils.data import Subset

    from moonwhale import fp8, precision
    from moonwhale.checkpoint import log_history, publish_model, step_of
    from moonwhale.costs import model_size
    from moonwhale.data.packing import build_data
    from moonwhale.data.tokenizer import byte_lengths
    from moonwhale.model import MoonwhaleForCausalLM
    from moonwhale.parallel import process_groups
    from moonwhale.train import memory, progress
    from moonwhale.train.mtp_trainer import MTPTrainer
    from moonwhale.train.pipeline_trainer import PipelineTrainer

    run_folder.quieten()
    out = Path(config.out)
    if checkpoint and step_of(checkpoint) >= config.steps:
        if main_process:
            publish_model(checkpoint, out)
            progress.plot_loss(log_history(checkpoint), out / "loss.png")
        say(f"finished   already, with all {config.steps} steps: the model is in {out}")
        return

    if pipelined:
        process_groups.take_gpu()
    choice = precision.choose(config.device, config.precision)
    choice.apply()
    precision.tune_allocator()
    model_config = build_model_config(config)  # an impossible model must not cost a tokenizer's training first
    settings = run_folder.learned(config, also=("out", "resume"))
    place = process_groups.meet(split, model_config, config.context, choice.device.type == "cpu", settings)
    shares = 1 if place else world  # of the rows, one for each of the Trainer's processes
    args = _trainer_arguments(config, choice, shares)
    hub = config.data_split, config.data_columns
    data = build_data(
        config.data, *hub, config.tokenizer, model_config.vocab_size, config.context, limit=config.data_documents
    )
    if len(data.train) < config.batch_size * shares:
        raise UserError(
            f"`batch_size`: {config.batch_size * shares} rows are computed at once, but the text fills only "
            f"{len(data.train)} rows of `context` {config.context}: lower the one or the other, or give more `data`"
        )
    ids = {name: getattr(data.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fit_to_tokenizer(model_config, config, len(data.tokenizer), **ids)
    transformers.set_seed(config.seed)
    model = MoonwhaleForCausalLM(model_config)
    if choice.fp8:
        fp8.convert(model, choice.fp8)
    if config.compile:
        compile_blocks(model, choice.device)

    sizes = model_size(model_config)
    fits = memory.estimate(model_config, config, choice.device, choice.dtype.itemsize) if not pipelined else ""
    say(data.describe())
    say(f"model      {sizes.parameters / 1e6:.2f} M parameters, {sizes.active_parameters / 1e6:.2f} M active")
    say(f"device     {choice.reason}, {torch.get_num_threads()} threads" + split.describe(world))
    if fits:
        say(fits)
    say(f"run        {config.steps} steps of {config.tokens_per_step:,} tokens into {out}")
    out.mkdir(parents=True, exist_ok=True)
    if main_process:
        write_config(config, out / run_folder.RUN_FILE)
        _check_data(data, out, config)

    rows = torch.linspace(0, len(data.held_out) - 1, min(config.eval_rows, len(data.held_out))).long().tolist()
    how = {"ranks": place, "schedule": split.order, "micro_batches": micro_batches, "fsdp": split.fsdp}
    build = partial(
        PipelineTrainer if place else MTPTrainer,
        **(how if place else {}),
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=Subset(data.held_out, rows),
        processing_class=data.tokenizer,
        data_collator=transformers.default_data_collator,  # rows are whole: a tokenizer's takes 80 times as long
        byte_lengths=torch.from_numpy(byte_lengths(data.tokenizer)),
    )
    plot = partial(progress.plot_loss, path=out / "loss.png")
    trainer = run_folder.carry_out(config, choice, build, checkpoint, "train", plot, progress.line_of)
    if main_process:
        publish_model(out / f"checkpoint-{trainer.state.global_step}", out)
    say(progress.summary(trainer.state.log_history, config.tokens_per_step, out))


def _check_data(data, out: Path, config: TrainConfig) -> None:
    """A run that goes on must go on with the same tokens, which it was told by name only."""
    record = out / DATA_FILE
    checksum = hashlib.sha256(repr(data.train.shards.index["files"]).encode()).hexdigest()
    if not record.exists():
        options.write_whole(record, f"{data.describe()}\nchecksum   {checksum}\n")
    elif checksum not in record.read_text(encoding="utf-8"):
        raise UserError(
            f"`data`: {config.data}, or its tokenizer, has changed since the run in {out} began (see {record}): "
            "bring it back, or train into another `out`"
        )


def _trainer_arguments(config: TrainConfig, choice, world: int):
    """The run's options in transformers' words."""
    from moonwhale.train.mtp_trainer import MTPTrainingArguments

    if choice.device.index and world == 1:
        raise UserError(
            f"`device`: training takes the first visible GPU: instead of {config.device}, set CUDA_VISIBLE_DEVICES="
            f"{choice.device.index} in the environment"
        )
    decay = round(config.steps * config.decay_fraction)
    if config.schedule == "wsd":
        scheduler = "warmup_stable_decay"
        scheduler_kwargs = {"num_decay_steps": decay, "min_lr_ratio": config.min_lr_ratio, "decay_type": "linear"}
    else:
        scheduler, scheduler_kwargs = "cosine_with_min_lr", {"min_lr_rate": config.min_lr_ratio}
    return MTPTrainingArguments(
        **run_folder.trainer_arguments(config, choice, config.steps),
        gradient_accumulation_steps=config.accumulation(world),
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=scheduler_kwargs,
        mtp_loss_weight_final=config.mtp_loss_weight_final,
        decay_steps=decay,
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )


def compile_blocks(model, device) -> None:
    """Compiles each block, and on a GPU the loss. On a CPU attention and experts stay out: there the data decide their
    sizes, which is faster than any graph.

    Raises:
        UserError: something that compiling needs is missing.
    """
    import torch

    from moonwhale.model.mla import MultiheadLatentAttention
    from moonwhale.model.moe import Experts
    from moonwhale.precision import why_not_compile

    if why := why_not_compile(device):
        raise UserError(f"`compile`: {why}, or leave it out")
    for module in model.modules():
        if device.type == "cpu" and isinstance(module, MultiheadLatentAttention | Experts):
            module.forward = torch.compiler.disable(module.forward)
    if device.type != "cpu":
        model.add_loss = torch.compile(model.add_loss)
    for layer in model.model.layers:
        layer.compile()
