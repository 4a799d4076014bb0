"""`moonwhale train`: pretrain a model on text. See `train/run.py` for the stages of a run."""

import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.processes import print_on_rank_0, world_size
from moonwhale.train import progress, run_folder
from moonwhale.train.config import TrainConfig, build_model_config, fit_to_tokenizer, parser_settings
from moonwhale.train.lr_schedule import lr_schedule_arguments
from moonwhale.train.outlook import describe_run, tokens_after
from moonwhale.train.run import Run, common_trainer_arguments, execute, prepare_process
from moonwhale.train.run_options import run_verb
from moonwhale.train.run_result import RunResult
from moonwhale.train.starting_model import load_starting_model, starting_folder

if typing.TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Trainer

    from moonwhale.data.packing import TrainingData
    from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
    from moonwhale.parallel.process_groups import RankPlacement
    from moonwhale.precision import ComputeSettings
    from moonwhale.train.mtp_trainer import MTPTrainingArguments


def main(argv: list[str]) -> None:
    run_verb(TrainConfig, argv, train, **parser_settings(argv))


def train(config: TrainConfig) -> RunResult:
    """Trains as `config` says. The folder `config.out` then holds the model, its checkpoints, `run.yaml` and
    `loss.png`.

    Returns:
        its folder, its log and the model.

    Raises:
        UserError: one line, for anything the user can put right.
        KeyboardInterrupt: the user asked to stop; a checkpoint has been written.
    """
    parallelism = config.parallelism
    if parallelism.splits_model:
        config.micro_batches_per_replica(parallelism.replicas(world_size()))
    return execute(config, build, progress.plot_loss)


def build(config: TrainConfig) -> Run:
    """Prepares the device, the data and the model, writes `run.yaml`, and prints what will be trained.

    Raises:
        UserError: an option that does not fit the machine, the data or the other processes.
    """
    from moonwhale import precision
    from moonwhale.parallel import process_groups
    from moonwhale.train.samples import SampleText

    parallelism, world = config.parallelism, world_size()  # `join_run` hides it from the Trainer
    if parallelism.splits_model:
        process_groups.select_gpu()
    choice = precision.choose(config.device, config.precision)
    choice.apply()
    prepare_process(choice.device)
    model_config = build_model_config(config)  # refuses an impossible model before a tokenizer is trained
    settings = run_folder.options_that_affect_training(config, also=("out", "resume"))
    on_cpu = choice.device.type == "cpu"
    placement = process_groups.join_run(parallelism, model_config, config.context, on_cpu, settings)
    replicas = 1 if placement else world  # as the Trainer sees it: pipelines are one device
    args = trainer_arguments(config, choice, replicas)
    data = load_data(config, model_config.vocab_size, replicas)
    model = build_model(config, model_config, data.tokenizer, choice)
    describe(config, choice, data, model_config, world, replicas)
    run_folder.create(config)
    run_folder.check_data_unchanged(
        config, f"`data`: {config.data}, or its tokenizer,", contents(data).encode(), data.describe()
    )

    tokens = tokens_after(config.steps, config, len(data.train), replicas)
    summarize = partial(progress.summary, out=Path(config.out), tokens=tokens)
    sampler = partial(SampleText, every=config.sample_every, prompt=config.sample_prompt)
    return Run(
        config,
        choice,
        trainer_factory(config, model, args, data, placement),
        progress.log_line,
        summarize,
        evaluate_first=config.from_ is not None,
        make_sampler=sampler if config.sample_every else None,
    )


def trainer_factory(
    config: TrainConfig,
    model: "MoonwhaleForCausalLM",
    args: "MTPTrainingArguments",
    data: "TrainingData",
    placement: "RankPlacement | None",
) -> Callable[..., "Trainer"]:
    """Returns what makes the trainer when its callbacks are known.

    It is a PipelineTrainer if the run has a `placement`, else an MTPTrainer.
    """
    import torch
    import transformers

    from moonwhale.data.packing import choose_rows
    from moonwhale.data.tokenizer import byte_lengths
    from moonwhale.train.mtp_trainer import MTPTrainer
    from moonwhale.train.pipeline_trainer import PipelineTrainer

    trainer_class, of_pipeline = MTPTrainer, {}
    if placement:
        trainer_class = PipelineTrainer
        of_pipeline = {
            "placement": placement,
            "schedule": config.parallelism.effective_schedule,
            "micro_batches": config.micro_batches_per_replica(placement.num_replicas),
            "fsdp": config.parallelism.fsdp,
        }
    return partial(
        trainer_class,
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=choose_rows(data.held_out, config.eval_rows),
        processing_class=data.tokenizer,
        data_collator=transformers.default_data_collator,  # rows are full: a tokenizer's collator is 80 times slower
        byte_lengths=torch.from_numpy(byte_lengths(data.tokenizer)),
        evaluate_all=True,
        **of_pipeline,
    )


def load_data(config: TrainConfig, vocab_size: int, replicas: int) -> "TrainingData":
    """The tokenized data (`data.packing.build_data`). A tokenizer that is trained on them has `vocab_size` tokens.

    Raises:
        UserError: they fill fewer rows than one micro-batch of all replicas.
    """
    from moonwhale.data.packing import build_data

    tokenizer = str(starting_folder(config)) if config.from_ else config.tokenizer
    data = build_data(config.load_source(), tokenizer, vocab_size=vocab_size, context=config.context)
    if len(data.train) < config.batch_size * replicas:
        raise UserError(
            f"`batch_size`: {config.batch_size * replicas} rows are computed at once, but the text fills only "
            f"{len(data.train)} rows of `context` {config.context}: lower the one or the other, or give more `data`"
        )
    return data


def contents(data: "TrainingData") -> str:
    """A text that differs if the tokenized data do: it holds the checksums of their files."""
    files = repr(data.train.shards.index["files"])
    if data.held_out.shards is not data.train.shards:  # of a split of their own
        files += repr(data.held_out.shards.index["files"])
    return files


def build_model(
    config: TrainConfig,
    model_config: "MoonwhaleConfig",
    tokenizer: "PreTrainedTokenizerFast",
    choice: "ComputeSettings",
) -> "MoonwhaleForCausalLM":
    """The model of `config.from_`, or a new one, with the modules of its precision, compiled if asked for.

    A new one is initialised from `config.seed`, and `model_config` is completed with what only the tokenizer knows.
    """
    import transformers

    from moonwhale import fp8
    from moonwhale.model import MoonwhaleForCausalLM

    if config.from_:
        model = load_starting_model(config, model_config)
    else:
        token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        fit_to_tokenizer(model_config, config, len(tokenizer), **token_ids)
        transformers.set_seed(config.seed)
        model = MoonwhaleForCausalLM(model_config)
    if choice.fp8:
        fp8.convert(model, choice.fp8)
    if config.compile:
        compile_blocks(model, choice.device)
    return model


def describe(
    config: TrainConfig,
    choice: "ComputeSettings",
    data: "TrainingData",
    model_config: "MoonwhaleConfig",
    world: int,
    replicas: int,
) -> None:
    """Prints what will be trained: data, model, device, memory and steps.

    `world` is the number of processes, and `replicas` that of the devices among which the Trainer divides the rows.

    Raises:
        UserError: weights, gradients and optimizer do not fit into the device's memory.
    """
    import torch

    from moonwhale.costs import model_size
    from moonwhale.train.memory import check_gpu_memory

    parallelism, size = config.parallelism, model_size(model_config)
    memory = (
        "" if parallelism.splits_model else check_gpu_memory(model_config, config, choice.device, choice.dtype.itemsize)
    )
    if config.from_:
        print_on_rank_0(f"from       {config.from_}")
    print_on_rank_0(data.describe())
    print_on_rank_0(f"model      {size.parameters / 1e6:.2f} M parameters, {size.active_parameters / 1e6:.2f} M active")
    print_on_rank_0(f"device     {choice.reason}, {torch.get_num_threads()} threads" + parallelism.describe(world))
    if memory:
        print_on_rank_0(memory)
    print_on_rank_0(describe_run(config, len(data.train), replicas))


def trainer_arguments(config: TrainConfig, choice: "ComputeSettings", replicas: int) -> "MTPTrainingArguments":
    """The run's options as transformers' TrainingArguments."""
    from moonwhale.train.mtp_trainer import MTPTrainingArguments

    return MTPTrainingArguments(
        **common_trainer_arguments(config, choice, config.steps),
        gradient_accumulation_steps=config.gradient_accumulation_steps(replicas),
        **lr_schedule_arguments(config),
        mtp_loss_weight_final=config.mtp_loss_weight_final,
        embedding_lr=config.embedding_lr,
        decay_steps=config.decay_steps,
        last_shared_step=config.shared_steps(config.steps) if config.save_every else 0,
        mtp_start_step=round(config.steps * config.mtp_start),
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )


def compile_blocks(model: "MoonwhaleForCausalLM", device: "torch.device") -> None:
    """Compiles each block, and on a GPU the loss as well.

    On a CPU attention and experts stay eager: their sizes depend on the data there, which is faster than any graph.

    Raises:
        UserError: something that compiling needs is missing.
    """
    import torch

    from moonwhale.model.compiling import compile_unsupported_reason
    from moonwhale.model.gqa import GroupedQueryAttention
    from moonwhale.model.mla import MultiheadLatentAttention
    from moonwhale.model.moe import Experts

    if why := compile_unsupported_reason(device):
        raise UserError(f"`compile`: {why}, or leave it out")
    # An instance's method is replaced, since torch can neither exclude one module of a compiled block nor compile a
    # method in place: a wrapped module would change the names of the weights, a decorated class every other model.
    eager = MultiheadLatentAttention | GroupedQueryAttention | Experts
    for module in model.modules():
        if device.type == "cpu" and isinstance(module, eager):
            module.forward = torch.compiler.disable(module.forward)
    if device.type != "cpu":
        model.losses = torch.compile(model.losses)
    for layer in model.model.layers:
        layer.compile()
