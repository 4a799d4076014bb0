"""The options of `moonwhale train`: their defaults, their checks, and how they are read.

A later source wins: the defaults, the preset, a YAML file (`--config`), the command line.
"""

import argparse
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from moonwhale import options
from moonwhale.data.source_options import SourceOptions
from moonwhale.errors import UserError
from moonwhale.options import option, require, require_at_least_one, require_not_negative
from moonwhale.parallel.options import ParallelOptions
from moonwhale.presets import PRESETS, get_preset, is_record, model_fields
from moonwhale.train import starting_model
from moonwhale.train.effects import idle_model_fields
from moonwhale.train.run_options import RunOptions, parse_run

if typing.TYPE_CHECKING:
    from moonwhale.model.configuration_moonwhale import MoonwhaleConfig

MODEL_FIELDS = model_fields()
MODEL_HELP = "fields of MoonwhaleConfig that differ from its defaults"


@dataclass
class ModelOverrides:
    """Only the options `--model.FIELD`, for verbs that do not train."""

    model: dict = option({}, MODEL_HELP, fields=MODEL_FIELDS)


@dataclass
class TrainConfig(SourceOptions, RunOptions):
    """The options of pretraining. Lengths are in tokens."""

    verb: typing.ClassVar[str] = "train"

    preset: str = option("demo", "size of the model, and options that suit it", group="run", choices=tuple(PRESETS))
    from_: str | None = option(
        None, "folder of a model to go on from: its configuration and tokenizer are kept, the rest is new", group="run"
    )
    out: str | None = option(None, "the run's folder (runs/PRESET, or runs/MODEL-train with --from)", group="run")

    tokenizer: str | None = option(
        None,
        "folder, hub id, or a packaged one: deepseek, gpt2; if not given, one is trained on the data",
        group="data",
    )
    context: int = option(1024, "tokens per row", group="data")

    tokens_per_step: int = option(
        8192, "tokens per optimizer step; micro-batches are accumulated to reach it", group="optimization"
    )
    steps: int = option(1000, "optimizer steps", group="optimization")
    schedule: str = option(
        "wsd", "wsd: warm-up, plateau, decay; cosine: warm-up, cosine", group="optimization", choices=("wsd", "cosine")
    )
    decay_fraction: float = option(0.2, "fraction of the steps in which wsd decays", group="optimization")
    min_lr_ratio: float = option(0.0, "final learning rate, relative to the peak", group="optimization")
    mtp_loss_weight_final: float | None = option(
        None,
        "weight λ of the MTP loss in the last --decay-fraction of the steps (model.mtp_loss_weight)",
        group="optimization",
    )

    embedding_lr: float = option(1.0, "learning rate of the embedding, relative to --lr", group="optimization")
    mtp_start: float = option(
        0.0, "fraction of the steps before the MTP modules are trained; they take no time then", group="optimization"
    )

    compile: bool = option(False, "compile the model with torch.compile", group="device")

    eval_rows: int = option(64, "held-out rows per evaluation", group="reports and checkpoints")
    sample_every: int = option(
        0, "steps between samples of what the model writes; 0: none", group="reports and checkpoints"
    )
    sample_prompt: str = option(
        "", "text that the samples continue (the beginning of a document)", group="reports and checkpoints"
    )

    parallel: dict = option(
        {}, "how the model is spread over several processes", group="several processes", fields=ParallelOptions
    )
    model: dict = option({}, MODEL_HELP, group="model configuration", fields=MODEL_FIELDS)

    def __post_init__(self):
        self.from_ = starting_model.absolute(self.from_)
        super().__post_init__()
        if self.from_ and self.tokenizer:
            raise UserError(
                f"`tokenizer`: {self.tokenizer} is impossible: a model goes on with its own: leave `tokenizer` or "
                "`from_` out"
            )
        self._check_ranges()
        self._check_compile()
        if self.sample_every and self.parallelism.splits_model:
            raise UserError("`sample_every`: no rank holds the whole model that would write: leave it out")
        self.gradient_accumulation_steps()
        self.micro_batches_per_replica()

    def _check_ranges(self) -> None:
        require_at_least_one(self, "context", "tokens_per_step", "steps", "eval_rows", "data_documents")
        require_not_negative(self, "sample_every", "mtp_loss_weight_final", "embedding_lr")
        for name in ("decay_fraction", "min_lr_ratio", "mtp_start"):
            require(self, name, 0 <= getattr(self, name) <= 1, "it lies in [0, 1]")
        decay_steps = self.decay_steps if self.schedule == "wsd" else 0
        without_decay = self.steps - decay_steps
        minus_decay = f" less {decay_steps} of decay" if decay_steps else ""
        fix = f"`steps` {self.steps}{minus_decay} leave {without_decay} for warm-up"
        require(self, "warmup_steps", self.warmup_steps <= without_decay, fix)

    def _check_compile(self) -> None:
        if not self.compile:
            return
        if self.parallelism.pp > 1:
            raise UserError("`compile`: a pipeline can't split a compiled backward pass: leave it out")
        if self.parallelism.ep > 1:
            raise UserError("`compile`: experts on several ranks can't be compiled: leave it out")
        if self.parallelism.fsdp:
            raise UserError("`compile`: compiled blocks don't gather their weights: leave it or `parallel.fsdp` out")

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        if not self.sample_every:
            split = self.parallelism.splits_model
            yield "sample_prompt", "with a model that is split" if split else "with `sample_every` 0"
        if self.parallelism.pp == 1:
            yield "parallel.schedule", "with `parallel.pp` 1"
        if self.schedule != "wsd" and self.mtp_loss_weight_final is None:
            yield "decay_fraction", f"with `schedule` {self.schedule}"
        if not self.decay_fraction:
            yield "mtp_loss_weight_final", "with `decay_fraction` 0"
            if self.schedule == "wsd":
                yield "min_lr_ratio", "with `decay_fraction` 0"
        if not self.from_:  # else the model is that of a folder
            model = MODEL_FIELDS(**self.model)
            if not model.num_nextn_predict_layers:
                yield "mtp_start", "with `model.num_nextn_predict_layers` 0"
                yield "mtp_loss_weight_final", "with `model.num_nextn_predict_layers` 0"
            yield from idle_model_fields(model)

    @classmethod
    def default_out(cls, given: dict) -> str:
        folder = starting_model.absolute(given.get("from_"))
        return os.path.join("runs", f"{os.path.basename(folder)}-train" if folder else given.get("preset", cls.preset))

    @classmethod
    def resolve(cls, given: dict, path: str | None = None) -> typing.Self:
        """Merges the options: defaults, then the preset, then the YAML file at `path`, then `given`, a dict by name.

        Raises:
            UserError: `given` names another preset than the file, or an option is impossible.
        """
        in_file = options.read_yaml(path, cls) if path else {}
        if "preset" in in_file and given.get("preset", in_file["preset"]) != in_file["preset"]:
            raise UserError(
                f"`preset`: {given['preset']!r} contradicts {path}, whose values come from preset "
                f"{in_file['preset']!r}: leave `preset` out, or take `preset` and the values it should decide out of "
                "the file"
            )
        explicit = options.merge(in_file, given)
        folder = starting_model.absolute(explicit.get("from_"))
        name = explicit.setdefault("preset", (folder and starting_model.preset_of(folder)) or cls.preset)
        preset = get_preset(name)
        if is_record(in_file, preset):
            merged = explicit
        else:
            merged = options.merge(preset.train, {"model": {} if folder else preset.model}, explicit)
        if "warmup_steps" not in explicit:
            merged["warmup_steps"] = fitted_warmup(merged)
        if "sample_every" not in given and ParallelOptions(**merged.get("parallel", {})).splits_model:
            merged["sample_every"] = 0  # no rank could write them
        if folder and "context" not in explicit and (longest := starting_model.longest_context(folder)):
            merged["context"] = min(merged["context"], longest)
        return cls(**merged)

    @property
    def decay_steps(self) -> int:
        """The last steps: in wsd the rate decays in them, and in both schedules `mtp_loss_weight_final` holds."""
        return round(self.steps * self.decay_fraction)

    def shared_steps(self, steps: int) -> int:
        """In wsd, those before the shorter run decays or trains its MTP modules. A cosine depends on all its steps."""
        if self.schedule != "wsd":
            return 0
        shorter = min(self.steps, steps)
        before_decay = shorter - round(shorter * self.decay_fraction)
        return min(before_decay, round(shorter * self.mtp_start)) if self.mtp_start else before_decay

    def describe_rate(self) -> str:
        before = self.steps - self.decay_steps
        return f"the learning rate stays at its peak until step {before:,} and falls until step {self.steps:,}"

    @property
    def parallelism(self) -> ParallelOptions:
        """The options `parallel.FIELD`, checked."""
        return ParallelOptions(**self.parallel)

    def gradient_accumulation_steps(self, replicas: int = 1) -> int:
        """Micro-batches per optimizer step on each of `replicas` devices.

        Raises:
            UserError: `tokens_per_step` is not a multiple of the tokens that all replicas compute at once.
        """
        at_once = self.batch_size * self.context * replicas
        count, rest = divmod(self.tokens_per_step, at_once)
        if rest or not count:
            nearest = " or ".join(str(n * at_once) for n in (count, count + 1) if n)
            devices = f" x {replicas} devices" if replicas > 1 else ""
            raise UserError(
                f"`tokens_per_step`: {self.tokens_per_step} is no multiple of `batch_size` {self.batch_size} x "
                f"`context` {self.context}{devices} = {at_once} tokens: give {nearest}"
            )
        return count

    def micro_batches_per_replica(self, replicas: int = 1) -> int:
        """Micro-batches per optimizer step that each of `replicas` pipelines computes.

        Raises:
            UserError: the schedule needs more of them, or another multiple.
        """
        count = self.gradient_accumulation_steps()
        description = (
            f"`tokens_per_step`: {self.tokens_per_step} is {count} micro-batches of `batch_size` {self.batch_size} x "
            f"`context` {self.context}"
        )
        return self.parallelism.micro_batches_per_replica(count, replicas, self.batch_size * self.context, description)


def parse(argv: list[str]) -> TrainConfig:
    """Reads the arguments of `moonwhale train`."""
    return parse_run(TrainConfig, argv, **parser_settings(argv))


def parser_settings(argv: list[str]) -> dict:
    """The settings of `run_verb` for `moonwhale train`. The help shows the defaults of the preset in `argv`."""
    preset, defaults = preset_defaults(argv)
    return {
        "defaults": defaults,
        "usage": "%(prog)s [options]",
        "description": "Train a model on text. Options come from the preset, the --config file and the command line: a "
        f"later source wins.\nThe defaults below are those of --preset {preset}; the presets are {', '.join(PRESETS)}.",
        "examples": (
            "moonwhale train --data my_texts/ --out runs/mine",
            "moonwhale train --preset small --data tinystories --lr 1e-3 --out runs/stories",
        ),
        "epilog": "`moonwhale info PRESET --model.FIELD VALUE` counts what a model costs.",
    }


def preset_defaults(argv: list[str]) -> tuple[str, dict[str, object]]:
    """The preset that the arguments name, and the defaults, by option, that it decides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    named = parser.parse_known_args(argv)[0].preset
    name = named if named in PRESETS else TrainConfig.preset
    preset = PRESETS[name]
    model = {"max_position_embeddings": preset.train["context"]} | preset.model
    return name, {"preset": name} | preset.train | {f"model.{field}": value for field, value in model.items()}


def fitted_warmup(values: dict) -> int:
    """The warm-up of a preset in a run with the options `values`: at most a tenth of its steps, none of its decay."""
    defaults = TrainConfig.__dataclass_fields__
    names = ("warmup_steps", "steps", "schedule", "decay_fraction")
    warmup, steps, schedule, decay = (values.get(name, defaults[name].default) for name in names)
    room = steps - round(steps * decay) if schedule == "wsd" else steps
    return max(0, min(warmup, max(steps // 10, 1), room))


def build_model_config(config: TrainConfig) -> "MoonwhaleConfig":
    """Builds the model's configuration, or reads that of `config.from_`.

    `fit_to_tokenizer` adds to a new model's what only the tokenizer knows.

    Raises:
        UserError: names the `model.FIELD` whose value is impossible, or too small for the context.
    """
    from moonwhale.model.configuration_moonwhale import MoonwhaleConfig

    if config.from_:
        model = starting_model.starting_config(config)
    else:
        try:
            model = MoonwhaleConfig(**{"max_position_embeddings": config.context} | config.model)
        except ValueError as error:
            raise starting_model.as_field(error) from error
    if model.max_position_embeddings < config.context:
        raise UserError(
            f"`context`: {config.context} is longer than `model.max_position_embeddings` "
            f"{model.max_position_embeddings}: raise the one or lower the other"
        )
    return model


def _require_plain_embedding(config: TrainConfig, model: "MoonwhaleConfig") -> None:
    """Raises UserError if a tied embedding starts larger or learns faster than the head that it also is should."""
    tied = "is for the embedding alone, but with `model.tie_word_embeddings` that is the output head too"
    if (std := model.embedding_initializer_range) is not None:
        raise UserError(f"`model.embedding_initializer_range`: {std:g} {tied}: give null")
    if config.embedding_lr != 1:
        raise UserError(f"`embedding_lr`: {config.embedding_lr:g} {tied}: give 1")


def fit_to_tokenizer(model: "MoonwhaleConfig", config: TrainConfig, vocab_size: int, **token_ids: int | None) -> None:
    """Checks that the model can be trained with a tokenizer, and sets the token ids that the options leave open.

    Args:
        model: what `build_model_config` built from `config`.
        vocab_size: size of the tokenizer's vocabulary.
        token_ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`.

    Raises:
        UserError: the model's vocabulary is smaller than the tokenizer's, or a new model's embedding is tied to the
            head and has an initial size or a learning rate of its own.
    """
    if model.tie_word_embeddings and not config.from_ and not config.resume:
        _require_plain_embedding(config, model)
    if model.vocab_size < vocab_size:
        raise UserError(
            f"`model.vocab_size`: {model.vocab_size} is smaller than the tokenizer's {vocab_size}: "
            f"give at least that, e.g. `model.vocab_size` {-(-vocab_size // 64) * 64}"
        )
    for name, token_id in token_ids.items():
        setattr(model, name, config.model.get(name, token_id))
