"""Variants of a training run: a name, and the options in which it differs from what all variants share."""

import typing
from dataclasses import dataclass

from moonwhale import options
from moonwhale.errors import UserError, did_you_mean, printable, shown
from moonwhale.train.config import MODEL_FIELDS, TrainConfig
from moonwhale.yaml_files import parse_yaml, read_yaml_file

BASE = "base"
MOST_VARIANTS = 50
LONGEST_NAME = 60
SAME_ROWS = "all variants read the same rows: give it for the whole comparison"
# Options that may be given for the whole comparison, but not varied
SHARED = {
    **dict.fromkeys(("data", "data_split", "data_columns", "data_documents", "tokenizer", "context"), SAME_ROWS),
    "model.vocab_size": SAME_ROWS,
    "eval_rows": SAME_ROWS,
    "preset": "presets have vocabularies and contexts of their own: vary the options that you mean",
    "seed": "each variant has the same seeds: give `seeds`",
    "steps": "all variants have the same budget",
    "device": "all variants run on the same device",
}
# Options of training that a comparison sets itself
DECIDED = (
    "out",
    "resume",
    "from_",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "sample_every",
    "sample_prompt",
    "report_to",
    "parallel",
)
WHY_DECIDED = "a comparison sets it itself"


@dataclass(frozen=True)
class Variant:
    """One contender.

    changes: options of training by name, inner ones in a dict of their own: {"lr": 1e-3, "model": {"moba_topk": 1}}.
    """

    name: str
    changes: dict


def check_given(given: dict) -> None:
    """Raises UserError for an option of training that a comparison sets itself."""
    for name in DECIDED:
        if given.get(name):
            raise UserError(f"`{name}`: {WHY_DECIDED}: leave it out")


def varied(texts: list[str], base: TrainConfig) -> list[Variant]:
    """Returns the base and a variant for each other value that `texts` name, such as "model.moba_topk=1,2,4".

    Each variant changes one option. A list's values stand in brackets: "model.moba_full_attention_layers=[1],[1,3]".

    Raises:
        UserError: an option is unknown or cannot be varied, or a value has the wrong type or is named twice.
    """
    known = {entry.name: entry for entry in options.options_of(TrainConfig)}
    variants = [Variant(BASE, {})]
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values:
            raise UserError(f"`vary`: {shown(text)} is not of the form OPTION=VALUE,VALUE")
        if name not in known:
            raise UserError(f"`vary`: there is no option {shown(name)}{did_you_mean(name[:100], known)}")
        _require_variable(name, "`vary`")
        readings = [_typed(known[name], value) for value in _split(values, known[name].kind)]
        outer, dot, key = name.partition(".")
        own = value_of(base, name)
        others = [value for value in readings if value != own]
        if not others:
            raise UserError(f"`vary`: {name}={shown(own)} is the base's own value: give another")
        for value in others:
            changes = {outer: {key: value}} if dot else {outer: value}
            variants.append(Variant(f"{key or outer}={_text(value)}", _checked(changes, "`vary`")))
    _require_names(variants, "`vary`")
    return variants


def value_of(config: TrainConfig, name: str) -> object:
    """Returns the value of an option, such as "lr" or "model.moba_topk", which the model's default may decide."""
    outer, dot, key = name.partition(".")
    value = getattr(config, outer)
    return value.get(key, getattr(MODEL_FIELDS(), key)) if dot else value


def _split(text: str, kind: object) -> list[str | list]:
    """Splits the values of an option. Those of a list are read as YAML."""
    if "list" not in str(kind):
        return text.split(",")
    values = parse_yaml(f"[{text}]", "`vary`")
    if not all(isinstance(value, list) or value is None for value in values):
        raise UserError(f"`vary`: {text} are no lists: write each in brackets, as [1],[1,3]")
    return values


def _typed(entry: options.Option, value: object) -> object:
    return options.convert(value, entry.kind, f"`vary`: {entry.name}", from_text=True)


def _text(value: object) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_variants(path: str) -> list[Variant]:
    """Reads a YAML file that maps names to options, the base first. A name alone changes nothing.

    An inner option is written as in run.yaml, `model: {moba_topk: 1}`, or as on the command line, `model.moba_topk: 1`.

    Raises:
        UserError: it is no such file, or an option is unknown, cannot be varied, or has a value of the wrong type.
    """
    try:
        values = read_yaml_file(path)
    except UserError as error:
        raise UserError(f"`variants`: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(changes, dict | None) for changes in values.values()):
        raise UserError(f"`variants`: {path} does not map each name to 'option: value' lines")
    variants = []
    for name, changes in values.items():
        nested: dict[str, typing.Any] = {}
        for key, value in (changes or {}).items():
            outer, dot, inner = str(key).partition(".")
            nested = options.merge(nested, {outer: {inner: value} if dot else value})
        variants.append(Variant(str(name), _checked(nested, f"`variants`: {path}: {shown(name)}")))
    _require_names(variants, f"`variants`: {path}")
    return variants


def _checked(changes: dict, source: str) -> dict:
    """Returns the options of a variant with their types. Raises UserError if one cannot be varied."""
    changes = options.check(TrainConfig, changes, source)
    for outer, value in changes.items():
        for name in [f"{outer}.{key}" for key in value] if isinstance(value, dict) else [outer]:
            _require_variable(name, source)
    return changes


def _require_variable(name: str, source: str) -> None:
    """Raises UserError if an option of training must be the same for all variants."""
    why = WHY_DECIDED if name.partition(".")[0] in DECIDED else SHARED.get(name)
    if why:
        raise UserError(f"{source}: {name} cannot be varied: {why}")


def _require_names(variants: list[Variant], source: str) -> None:
    """Raises UserError if there are too many variants, or names are long, unprintable or equal."""
    if len(variants) > MOST_VARIANTS:
        raise UserError(f"{source}: {len(variants)} variants are too many: give at most {MOST_VARIANTS}")
    names = [variant.name for variant in variants]
    for name in names:
        if not name or len(name) > LONGEST_NAME or name != printable(name, ""):
            raise UserError(f"{source}: {shown(name)} is no name: give 1 to {LONGEST_NAME} printable characters")
        if names.count(name) > 1:
            raise UserError(f"{source}: {name} is there twice: leave one out")
