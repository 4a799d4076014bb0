"""`moonwhale train`: from options to a trained checkpoint folder."""

import logging
import os
from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.train import arguments

RUN_FILE = "run.yaml"
# May change when a run goes on: they alter what is shown and kept, not what is learned.
FREE_TO_CHANGE = {
    "out",
    "resume",
    "device",
    "eval_every",
    "eval_rows",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "report_to",
}


def main(argv: list[str]) -> None:
    config = arguments.parse(argv)
    run_file = Path(config.out) / RUN_FILE
    if config.resume and run_file.exists() and "--config" not in argv:
        config = arguments.parse([*argv, "--config", str(run_file)])
    train(config)


def train(config: arguments.TrainConfig) -> None:
    """Trains as `config` says; the folder `config.out` then holds the model, its checkpoints, `run.yaml` and
    `loss.png`.

    Raises:
        UserError: one line, for anything the user can put right.
    """
    _check_folder(config)

    import torch
    import transformers
    from torch.utils.data import Subset

    from moonwhale import precision
    from moonwhale.counts import count
    from moonwhale.data.packing import build_data
    from moonwhale.data.tokenizer import byte_lengths
    from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
    from moonwhale.train import checkpoints, report
    from moonwhale.train.trainer import MTPTrainer

    logging.basicConfig(format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    main_process = int(os.environ.get("RANK", 0)) == 0
    say = print if main_process else (lambda *_: None)

    checkpoint = checkpoints.newest(config.out) if config.resume else None
    if config.resume and checkpoint is None and checkpoints.all_of(config.out):
        raise UserError(
            f"--resume: every checkpoint in {config.out} is damaged (see above): train anew into another --out"
        )

    choice = precision.choose(config.device, config.precision)
    precision.tune_allocator()
    vocab_size = config.model.get("vocab_size", MoonwhaleConfig.vocab_size)
    arguments.build_model_config(config)  # an impossible model should not cost a tokenizer's training first
    data = build_data(config.data, config.data_split, config.data_columns, config.tokenizer, vocab_size, config.context)
    tokenizer = data.tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model_config = arguments.build_model_config(config, len(tokenizer), **ids)
    transformers.set_seed(config.seed)
    model = MoonwhaleForCausalLM(model_config)
    if config.compile:
        for layer in model.model.layers:
            layer.compile()

    sizes = count(model_config)
    say(data.describe())
    say(f"model      {sizes.parameters / 1e6:.2f} M parameters, {sizes.active_parameters / 1e6:.2f} M active")
    say(f"device     {choice.reason}, {torch.get_num_threads()} threads")
    say(f"run        {config.steps} steps of {config.tokens_per_step:,} tokens into {config.out}")
    if checkpoint:
        say(f"resuming   from {checkpoint}")

    Path(config.out).mkdir(parents=True, exist_ok=True)
    if main_process:
        arguments.write(config, Path(config.out) / RUN_FILE)
    held_out = data.held_out
    rows = torch.linspace(0, len(held_out) - 1, min(config.eval_rows, len(held_out))).long().tolist()
    trainer = MTPTrainer(
        model=model,
        args=_trainer_arguments(config, choice),
        train_dataset=data.train,
        eval_dataset=Subset(held_out, rows),
        processing_class=tokenizer,
        byte_lengths=torch.from_numpy(byte_lengths(tokenizer)),
        callbacks=[report.Progress()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    interrupt = report.StopAtStepEnd()
    trainer.add_callback(interrupt)
    with interrupt:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.asked:
        step = trainer.state.global_step
        say(f"stopped at step {step} and saved; go on with: moonwhale train --out {config.out} --resume")
        raise KeyboardInterrupt
    if main_process:
        _finish(trainer, tokenizer, config.out)
        report.plot_loss(trainer.state.log_history, Path(config.out) / "loss.png")
        say(f"done       {config.out} (loss curve: {Path(config.out) / 'loss.png'})")


def _check_folder(config: arguments.TrainConfig) -> None:
    """Nothing is overwritten: a folder with a run in it needs --resume, and the run that goes on must be the same one.
    """
    out, run_file = Path(config.out), Path(config.out) / RUN_FILE
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file: name a folder")
    if not run_file.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out: {out} holds files that are not a run's: name a new or an empty folder")
        return
    if not config.resume:
        raise UserError(f"--out: {out} already holds a run: go on with it by --resume, or name another folder")
    before = arguments.resolve({}, str(run_file))
    for name in vars(config):
        if name not in FREE_TO_CHANGE and getattr(config, name) != getattr(before, name):
            raise UserError(
                f"--{name.replace('_', '-')}: {getattr(config, name)!r} differs from the {getattr(before, name)!r} that the run in {out} "
                "was started with: leave it out to go on, or name another --out"
            )


def _trainer_arguments(config: arguments.TrainConfig, choice):
    """The run's options in transformers' words."""
    from moonwhale.train.trainer import MTPTrainingArguments

    world = int(os.environ.get("WORLD_SIZE", 1))
    decay = round(config.steps * config.decay_fraction)
    if config.schedule == "wsd":
        scheduler, scheduler_kwargs = (
            "warmup_stable_decay",
            {"num_decay_steps": decay, "min_lr_ratio": config.min_lr_ratio, "decay_type": "linear"},
        )
    else:
        scheduler, scheduler_kwargs = "cosine_with_min_lr", {"min_lr_rate": config.min_lr_ratio}
    return MTPTrainingArguments(
        output_dir=config.out,
        seed=config.seed,
        data_seed=config.seed,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation(world),
        learning_rate=config.lr,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=scheduler_kwargs,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.grad_clip,
        muon_momentum=config.momentum,
        qk_clip_tau=config.qk_clip_tau,
        mtp_loss_weight_final=config.mtp_loss_weight_final,
        decay_steps=decay,
        use_cpu=choice.device.type == "cpu",
        bf16=choice.autocast,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps",
        eval_steps=config.eval_every or config.steps,
        save_strategy="steps",
        save_steps=config.save_every or config.steps,
        save_total_limit=config.keep_checkpoints,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=config.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=choice.device.type == "cuda",
        ddp_find_unused_parameters=False,
    )


def _finish(trainer, tokenizer, out: str) -> None:
    """Puts the trained model into the run's folder: a plain checkpoint folder from then on, complete or not there."""
    from moonwhale.train import checkpoints

    aside = checkpoints.unfinished(out)
    try:
        trainer.model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    except OSError as error:
        raise checkpoints.explain_disk(error, out) from error
    for path in sorted(
        aside.iterdir(), key=lambda p: p.name == "config.json"
    ):  # the file that makes it a checkpoint comes last
        os.replace(path, Path(out) / path.name)
    aside.rmdir()
