"""The options of `moonwhale compare`, added to those of training. Imports nothing heavy, since `--help` needs it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from moonwhale import options
from moonwhale.errors import UserError
from moonwhale.files import expanded
from moonwhale.lab.variants import BASE, DECIDED, Variant, check_given, read_variants, varied
from moonwhale.options import LARGEST, option, require, require_at_least_one
from moonwhale.reports import add_json
from moonwhale.train.config import TrainConfig, preset_defaults
from moonwhale.train.effects import refusal, without_effect
from moonwhale.train.outlook import steps_within, tokens_after

GROUP = "comparison"
EXAMPLES = (
    "moonwhale compare --vary model.moba_topk=1,2,4 --seeds 3 --seconds 240 --out runs/topk",
    "moonwhale compare --preset small --variants ablations.yaml --tokens 50000000 --tune lr --out runs/ablations",
)
EPILOG = """--vary changes one option at a time; the preset with your other options is the base. A file of variants
maps each name to the options that it changes; its first variant is the base. The same command goes on after a kill,
and trains only what is missing if a variant or a seed is added."""


@dataclass(frozen=True)
class Budget:
    """What each run may use: `amount` seconds of training, tokens or optimizer steps."""

    unit: str
    amount: float

    def __str__(self) -> str:
        return f"{self.amount:,.10g} {'s' if self.unit == 'seconds' else self.unit}"


@dataclass
class CompareOptions:
    """The options of a comparison.

    Raises:
        UserError: one line that names the option, its value and the fix.
    """

    out: str = option("runs/compare", "folder for all runs and the result", group=GROUP)
    variants: str | None = option(None, "YAML file of named variants; the first is the base", group=GROUP)
    seeds: int = option(3, "runs of each variant, with the seeds --seed, --seed + 1, ...", group=GROUP)
    seconds: float | None = option(None, "budget of each run: seconds of training", group=GROUP)
    tokens: int | None = option(None, "budget of each run: tokens (--steps)", group=GROUP)
    turns: int = option(16, "turns in which the runs of a seed proceed side by side", group=GROUP)
    tune: str | None = option(
        None, "lr: find each variant's learning rate on the same budget", group=GROUP, choices=("lr",)
    )

    def __post_init__(self):
        self.out = expanded(self.out)
        require_at_least_one(self, "seeds", "turns", "tokens")
        require(self, "turns", self.turns <= 1000, "give at most 1000")
        require(self, "seconds", self.seconds is None or self.seconds > 0, "it must be above 0")


@dataclass(frozen=True)
class Comparison:
    """What `moonwhale compare` was asked for.

    given, config_file: the options of training that all variants share, and the file that completes them.
    """

    options: CompareOptions
    budget: Budget
    given: dict
    config_file: str | None
    variants: tuple[Variant, ...]  # the base first
    n_rows: int | None = None  # of the text, once it has been read
    json: bool = False  # whether to print the result as JSON

    def config(self, variant: Variant, seed: int = 0, **changes) -> TrainConfig:
        """Returns the options of one run, without its folder. `seed` counts from the first seed.

        Raises:
            UserError: an option is impossible. The message names the variant.
        """
        try:
            given = options.merge(self.given, variant.changes, changes)
            of_tokens = self.budget.unit == "tokens"
            config = self._of_tokens(given) if of_tokens else TrainConfig.resolve(given, self.config_file)
        except UserError as error:
            raise UserError(f"variant {variant.name}: {error}") from error
        own = {"eval_every": 0, "save_every": 0, "sample_every": 0, "keep_checkpoints": 1, "report_to": ["none"]}
        return dataclasses.replace(config, seed=config.seed + seed, resume=False, **own)

    def _of_tokens(self, given: dict) -> TrainConfig:
        """Returns the options of a run whose steps follow from a budget of tokens.

        Until the text has been read, it is taken for a long one. On a short text the last step of each epoch is
        shorter, so the budget allows more steps. What that would allow is not refused yet.
        """
        # The preset's steps might leave no room for the warm-up, and the true number is not known yet
        run = TrainConfig.resolve(given | {"steps": LARGEST}, self.config_file)
        if self.n_rows is not None:
            return self._with_steps(given, run, self.n_rows)
        try:
            return self._with_steps(given, run, LARGEST)
        except UserError:
            return self._with_steps(given, run, run.batch_size)  # the shortest text that can be trained on

    def _with_steps(self, given: dict, run: TrainConfig, n_rows: int) -> TrainConfig:
        """Returns `run` with the steps that the budget of tokens allows on a text of `n_rows` rows."""
        steps = steps_within(self.budget.amount, run, n_rows)
        if not steps:
            raise UserError(
                f"`tokens`: {self.budget.amount:,} are less than the {tokens_after(1, run, n_rows):,} of a step: give "
                "more, or lower `tokens_per_step` or `batch_size`"
            )
        return TrainConfig.resolve(given | {"steps": steps}, self.config_file)


def parse(argv: list[str]) -> Comparison:
    """Reads the arguments of `moonwhale compare`.

    Raises:
        UserError: one line, for anything that can be known before data are read.
    """
    parser = options.Parser(
        prog="moonwhale compare",
        usage="%(prog)s [options]",
        description="Train variants of a model that differ in one thing, at equal time or tokens, and tell whether "
        "they differ.",
        examples=EXAMPLES,
        epilog=EPILOG,
    )
    options.add_options(parser, CompareOptions)
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="OPTION=VALUE,VALUE",
        help="values of one option of training, each a variant; may be repeated",
    )
    options.add_options(parser, TrainConfig, preset_defaults(argv)[1], leave_out=DECIDED)
    parser.add_argument(
        "--config", metavar="YAML", help="file with the base's options, such as the run.yaml of a run (none)"
    )
    add_json(parser)
    own, rest = options.read_argv(parser, CompareOptions, argv)
    rest.config = expanded(rest.config)
    given, _ = options.read_argv(parser, TrainConfig, argv)
    given.pop("out", None)
    check_given(given)
    chosen = CompareOptions(**own)
    if bool(rest.vary) == bool(chosen.variants):
        both = "give `vary` or `variants`, not both"
        raise UserError(both if rest.vary else "there is nothing to compare: give `vary` or `variants`")
    if chosen.variants:
        variants = read_variants(chosen.variants)
    else:
        base = Comparison(chosen, _budget(chosen, given, rest.config), given, rest.config, ())
        variants = varied(rest.vary, base.config(Variant(BASE, {})))
    return dataclasses.replace(comparison(chosen, given, variants, rest.config), json=rest.json)


def comparison(
    own: CompareOptions, given: dict, variants: Sequence[Variant], config_file: str | None = None
) -> Comparison:
    """Puts a comparison together.

    given: the options of training that all variants share. config_file completes them.
    variants: the base first.

    Raises:
        UserError: two budgets, one variant alone, equal variants, or options that are impossible or without effect.
    """
    result = Comparison(own, _budget(own, given, config_file), given, config_file, tuple(variants))
    _require_different(result)
    _require_effects(result)
    return result


def _budget(own: CompareOptions, given: dict, config_file: str | None) -> Budget:
    """Returns the budget that was asked for, or else the steps of the base. Raises UserError if there are two."""
    budgets = {"seconds": own.seconds, "tokens": own.tokens, "steps": given.get("steps")}
    asked = [unit for unit, amount in budgets.items() if amount is not None]
    if len(asked) > 1:
        raise UserError(f"`{asked[0]}` and `{asked[1]}` are two budgets: leave one out")
    unit = asked[0] if asked else "steps"
    return Budget(unit, budgets[unit] or TrainConfig.resolve(given, config_file).steps)


def _require_different(asked: Comparison) -> None:
    """Raises UserError if two variants have the same options, or one has impossible ones.

    An option that is tuned is not compared: the variants might end with the same value, and share one run.
    """
    known: dict[str, str] = {}
    but = f" but for `{asked.options.tune}`, which `tune` finds for each" if asked.options.tune else ""
    for variant in asked.variants:
        values = _flat(dataclasses.asdict(asked.config(variant)))
        values.pop(asked.options.tune, None)
        options_text = repr(sorted(values.items()))
        if options_text in known:
            raise UserError(
                f"variants {known[options_text]} and {variant.name} have the same options{but}: change or remove one"
            )
        known[options_text] = variant.name
    if len(known) < 2:
        raise UserError(f"variant {asked.variants[0].name} is alone: add another to compare it with")


def _require_effects(asked: Comparison) -> None:
    """Raises UserError for an option that changes nothing: one of a variant, or one for all that no variant uses."""
    chosen = TrainConfig.chosen(asked.given, asked.config_file)
    shared = {name: value for name, value in chosen.items() if name not in DECIDED}
    in_vain = []
    for variant in asked.variants:
        idle = dict(asked.config(variant).idle()).items()
        if own := without_effect(idle, variant.changes):
            raise UserError(f"variant {variant.name}: {refusal(own)}")
        in_vain.append(without_effect(idle, shared))
    if everywhere := {name: why for name, why in in_vain[0].items() if all(name in other for other in in_vain)}:
        raise UserError(refusal(everywhere))


def _flat(values: dict, outer: str = "") -> dict:
    """Returns a dict of options with inner ones as `model.hidden_size`."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{outer}{name}.") if isinstance(value, dict) else {outer + name: value}
    return flat
