"""The options that `moonwhale train`, `sft` and `grpo` share: their defaults, their checks, and how they are read."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from moonwhale import options
from moonwhale.files import expanded
from moonwhale.options import DEVICES, option, require, require_at_least_one, require_not_negative
from moonwhale.processes import left_process_group, restarted
from moonwhale.reports import add_json, reporting
from moonwhale.train import run_folder
from moonwhale.train.effects import require_effects

if typing.TYPE_CHECKING:
    from moonwhale.train.run_result import RunResult

PRECISIONS = ("auto", "fp32", "tf32", "bf32", "bf16", "fp8-tensorwise", "fp8-rowwise", "fp8-blockwise")

OPTIMIZERS = ("muon", "adamw")


@dataclass
class RunOptions:
    """The options of every run. Learning rates are per optimizer step.

    Raises:
        UserError: an option is impossible. The message names the option, its value and the fix.
    """

    verb: typing.ClassVar[str]

    out: str | None = option(None, "the run's folder", group="run")
    resume: bool = option(False, "resume from the newest undamaged checkpoint in --out", group="run")
    seed: int = option(0, "seed of all random draws", group="run")

    optimizer: str = option(
        "muon",
        "muon: Muon for matrices and AdamW for the rest, MuonClip with --qk-clip-tau; adamw: AdamW for all",
        group="optimization",
        choices=OPTIMIZERS,
    )
    batch_size: int = option(8, "rows per micro-batch on each device", group="optimization")
    lr: float = option(2e-3, "peak learning rate, on AdamW's scale, for both Muon and AdamW", group="optimization")
    warmup_steps: int = option(100, "steps in which the learning rate rises to its peak", group="optimization")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", group="optimization")
    momentum: float = option(0.95, "momentum of Muon", group="optimization")
    grad_clip: float = option(1.0, "largest gradient norm; 0 turns clipping off", group="optimization")
    qk_clip_tau: float = option(
        100.0, "attention logit above which QK-clip scales a head down; 0 turns it off", group="optimization"
    )

    device: str = option("auto", "cpu, cuda or mps; auto takes the fastest", group="device", suggestions=DEVICES)
    precision: str = option(
        "auto", f"precision of matrix products: {', '.join(PRECISIONS)}", group="device", suggestions=PRECISIONS
    )
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time", group="device")

    eval_every: int = option(100, "steps between evaluations; 0: only at the end", group="reports and checkpoints")
    save_every: int = option(200, "steps between checkpoints; 0: only at the end", group="reports and checkpoints")
    keep_checkpoints: int = option(
        2,
        "newest checkpoints to keep, besides the best and the last before the learning rate decays",
        group="reports and checkpoints",
    )
    log_every: int = option(10, "steps between log lines", group="reports and checkpoints")
    report_to: list[str] = option(
        ["tensorboard"], "any of the Trainer's reporters, or none", group="reports and checkpoints"
    )

    def __post_init__(self):
        self.out = expanded(self.out or self.default_out(vars(self)))
        require_at_least_one(self, "batch_size", "keep_checkpoints", "log_every")
        require_not_negative(self, "seed", "warmup_steps", "weight_decay", "grad_clip", "qk_clip_tau")
        require_not_negative(self, "eval_every", "save_every")
        require(self, "lr", self.lr > 0, "it must be above 0")
        require(self, "seed", self.seed < 2**32, "NumPy takes seeds below 2^32")
        require(self, "momentum", 0 <= self.momentum < 1, "it must be in [0, 1)")

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yields each option that has no effect together with the others, and why, as "with `optimizer` adamw"."""
        if self.optimizer != "muon":
            yield "momentum", f"with `optimizer` {self.optimizer}"

    def shared_steps(self, steps: int) -> int:
        """Returns how many of its first steps this run shares with one that differs only in taking `steps` in all.

        A verb whose learning rate depends on all its steps from the first one on shares none.
        """
        return 0

    def describe_rate(self) -> str:
        """Returns what becomes of the learning rate if a run goes on with another number of steps."""
        raise NotImplementedError

    @classmethod
    def default_out(cls, given: dict) -> str | None:
        """The run's folder if `given`, options by name, has no `out`. None if they do not decide it."""
        raise NotImplementedError

    @classmethod
    def resolve(cls, given: dict, path: str | None = None) -> typing.Self:
        """Merges the options: defaults, then the YAML file at `path`, then `given`, a dict by name."""
        return cls(**options.merge(options.read_yaml(path, cls) if path else {}, given))

    @classmethod
    def chosen(cls, given: dict, path: str | None = None) -> dict:
        """Returns the options that the user chose together: `given`, a dict by name, and those of the YAML file at
        `path` if `given` overrides none of them.

        A file with every option that all runs have is the record of a run, its run.yaml. A default or a preset may have
        decided any of them.
        """
        own = {"out", "resume"}  # of each run
        in_file = options.read_yaml(path, cls) if path else {}
        is_record = in_file.keys() >= {field.name for field in dataclasses.fields(RunOptions)} - own
        return given if is_record or given.keys() - own else options.merge(in_file, given)


def with_default(name: str, default):
    """The option `name` of RunOptions with another default, to be declared again by a subclass."""
    return dataclasses.field(default=default, metadata=RunOptions.__dataclass_fields__[name].metadata)


Options = typing.TypeVar("Options", bound=RunOptions)


def parse_run(cls: type[Options], argv: list[str], **settings) -> Options:
    """Reads the arguments of the verb that has the options `cls`. See `_read`."""
    return _read(cls, argv, **settings)[0]


def run_verb(cls: type[Options], argv: list[str], run: Callable[[Options], "RunResult"], **settings) -> None:
    """Reads the arguments of a verb and calls `run` with its options, or shows them if `--show` asks for it."""
    config, arguments = _read(cls, argv, **settings)
    with reporting(arguments.json) as show, left_process_group():
        if arguments.show:
            as_yaml = run_folder.run_yaml(config).rstrip("\n")
            show({"verb": cls.verb, "options": run_folder.resolved_options(config)}, as_yaml)
        else:
            show(_as_json(cls.verb, run(config)))


def _read(
    cls: type[Options], argv: list[str], defaults: Mapping[str, object] = types.MappingProxyType({}), **parser_settings
) -> tuple[Options, argparse.Namespace]:
    """Returns the options and all arguments. A resumed run without `--config` takes its run.yaml.

    defaults: see `options.add_options`.
    parser_settings: arguments of `options.Parser`.

    Raises:
        UserError: an option is unknown, impossible or without effect.
    """
    parser = options.Parser(prog=f"moonwhale {cls.verb}", **parser_settings)
    options.add_options(parser, cls, defaults)
    parser.add_argument("--config", metavar="YAML", help="file with options; each run writes one, run.yaml (none)")
    parser.add_argument("--show", action="store_true", help="print the resolved options (YAML), and do not train")
    add_json(parser)
    given, rest = options.read_argv(parser, cls, argv)
    path = expanded(rest.config)
    if restarted():
        given["resume"] = True
    if given.get("resume") and path is None:
        path = run_folder.find_run_file(expanded(given.setdefault("out", cls.default_out(given))))
    config = cls.resolve(given, path)
    require_effects(config.idle(), cls.chosen(given, path))
    return config, rest


def _as_json(verb: str, result: "RunResult") -> dict:
    """What `--json` prints of a finished run."""
    paths = {"out": result.out, "best": result.best, "plot": result.plot}
    steps = max((entry["step"] for entry in result.history), default=0)
    return {"verb": verb, **{name: path and str(path) for name, path in paths.items()}, "steps": steps} | {
        "history": result.history
    }
