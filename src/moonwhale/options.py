"""Run options from a dataclass: every field is a command line option and a YAML key, checked against its annotation.

A field made by `option(...)` carries its help text. A field of type `dict` with `fields` is a set of dotted options:
`--model.hidden_size 128` on the command line is `model: {hidden_size: 128}` in YAML.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Container
from pathlib import Path

import yaml

from moonwhale.errors import UserError, did_you_mean

NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list[int]: "a list of whole numbers",
    list[str]: "a list of words",
    types.NoneType: "null",
}


def option(
    default,
    help: str,
    *,
    group: str = "options",
    choices: tuple[str, ...] | None = None,
    fields: Callable[[], dict[str, typing.Any]] | None = None,
):
    """A dataclass field that is an option. `fields()` names a dict's keys and their annotations."""
    metadata = {"help": help, "group": group, "choices": choices, "fields": fields}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose every complaint is a UserError of one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            kind = "unknown option" if name.startswith("-") else "unexpected argument"
            self.error(f"{kind} {name}{did_you_mean(name, self._option_string_actions)}")
        return values


def add_options(parser: argparse.ArgumentParser, cls: type, preset_decides: Container[str] = ()) -> None:
    """Adds an option for every field of the dataclass `cls`, in its groups; one that is not given stays out of the
    namespace. Help shows the defaults, but not of fields that every preset decides."""
    kinds, groups = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        title, choices = field.metadata["group"], field.metadata["choices"]
        if field.metadata["fields"]:
            continue
        if title == "positional":
            text = field.metadata["help"]
            parser.add_argument(field.name, nargs="?", default=argparse.SUPPRESS, metavar=field.name.upper(), help=text)
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = field.default if field.default_factory is dataclasses.MISSING else ",".join(field.default_factory())
        note = "" if default is None or default is False else f" ({default})"
        text = field.metadata["help"] + (" (the preset's)" if field.name in preset_decides else note)
        more = {"action": argparse.BooleanOptionalAction}
        if kinds[field.name] is not bool:
            more = {"metavar": "{" + ",".join(choices) + "}" if choices else field.name.split("_")[-1].upper()}
        name = "--" + field.name.replace("_", "-")
        groups[title].add_argument(name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **more)


def read_argv(parser: argparse.ArgumentParser, cls: type, argv: list[str]) -> tuple[dict, argparse.Namespace]:
    """The options of `cls` that a command line gives, typed, and the parser's other arguments.

    Raises:
        UserError: an unknown option or field, a value of the wrong type.
    """
    values, argv = take_dotted(cls, argv)
    namespace = parser.parse_args(argv)
    for field in dataclasses.fields(cls):
        if hasattr(namespace, field.name):
            values[field.name] = getattr(namespace, field.name)
            delattr(namespace, field.name)
    return check(cls, values, "--", from_text=True), namespace


def take_dotted(cls: type, argv: list[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Takes `--model.NAME VALUE` and `--model.NAME=VALUE` out of a command line.

    The other options, returned second, get dashes for underscores.
    """
    dotted = {f"--{field.name}.": field.name for field in dataclasses.fields(cls) if field.metadata["fields"]}
    taken, rest, tokens = {}, [], iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        owner = dotted.get(name[: name.find(".") + 1])
        if owner is None:
            rest.append(name.replace("_", "-") + equals + value if token.startswith("--") else token)
            continue
        if not equals and ((value := next(tokens, None)) is None or value.startswith("--")):
            raise UserError(f"{name}: expected a value after it")
        taken.setdefault(owner, {})[name.partition(".")[2].replace("-", "_")] = value
    return taken, rest


def read_yaml(path: str | os.PathLike, cls: type) -> dict:
    """The options of `cls` that a YAML file gives, checked.

    Raises:
        UserError: no such file, not YAML, not a mapping, an unknown key, a value of the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: can't read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where, why = (f", line {mark.line + 1}", error.problem) if mark else ("", "it is not text")
        raise UserError(f"--config: {path}{where} is not YAML: {why}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config: {path} holds no `option: value` lines")
    return check(cls, values, f"{path}: ")


def check(cls: type, values: dict, where: str, from_text: bool = False) -> dict:
    """`values`, every key known to `cls` and every value of its field's type; `from_text` reads them first."""
    kinds, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    checked = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}unknown key {key!r}{did_you_mean(str(key), fields)}")
        metadata = fields[key].metadata
        name = where + (key.replace("_", "-") if from_text else key)
        if not metadata["fields"]:
            checked[key] = convert(value, kinds[key], name, from_text)
            if metadata["choices"] and checked[key] not in metadata["choices"]:
                near = did_you_mean(str(value), metadata["choices"])
                raise UserError(f"{name}: {value!r} is none of {', '.join(metadata['choices'])}{near}")
            continue
        known, checked[key] = metadata["fields"](), {}
        for inner, inner_value in convert(value, dict, name).items():
            if inner not in known:
                raise UserError(f"{name}.{inner}: there is no such field{did_you_mean(str(inner), known)}")
            checked[key][inner] = convert(inner_value, known[inner], f"{name}.{inner}", from_text)
    return checked


def convert(value: typing.Any, kind: typing.Any, name: str, from_text: bool = False) -> typing.Any:
    """`value` as the annotation `kind` wants it.

    Raises:
        UserError: one line naming the option, the value and what is expected.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    readings = _readings(value, kinds) if from_text and isinstance(value, str) else [value]
    for reading in readings:
        for k in kinds:
            fits, converted = _as(reading, k)
            if fits:
                return converted
    raise UserError(f"{name}: {value!r} is not {' or '.join(NOUNS[k] for k in kinds)}")


def _readings(text: str, kinds: tuple) -> list:
    """What text from a command line may mean, likeliest first: YAML, unless text is wanted, or a list as `a,b`."""
    if str in kinds:
        return [None, text] if text == "null" and types.NoneType in kinds else [text]
    if list[str] in kinds:
        return [text.split(",")]
    readings = []
    for candidate in (text, f"[{text}]"):
        with contextlib.suppress(yaml.YAMLError):
            readings.append(yaml.safe_load(candidate))
    return readings


def _as(value: typing.Any, kind: typing.Any) -> tuple[bool, typing.Any]:
    """Whether a value is of a kind, and the value as that kind."""
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_as(item, typing.get_args(kind)[0])[0] for item in value), value
    if kind is float and type(value) in (int, str):  # YAML 1.1 takes 1e-3, which has no point, for text
        with contextlib.suppress(ValueError):
            value = float(value)
    return type(value) is kind and (kind is not float or math.isfinite(value)), value


def merge(*layers: dict) -> dict:
    """One dict from several, later ones winning, key by key inside a dict of dotted options."""
    merged = {}
    for layer in layers:
        for key, value in layer.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged


def write_yaml(path: str | os.PathLike, values: dict, comment: str) -> None:
    """Writes a mapping as YAML, atomically."""
    write_whole(path, f"# {comment}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def require(config: object, name: str, ok: bool, fix: str) -> None:
    """Raises a UserError about the option `name` of `config` unless its value is ok."""
    if not ok:
        raise UserError(f"`{name}`: {getattr(config, name)!r} is impossible: {fix}")


def positive(text: str, name: str) -> int:
    """Reads the value of the option `name` as a whole number of at least 1, or raises a UserError."""
    value = convert(text, int, name, from_text=True)
    if value < 1:
        raise UserError(f"{name}: {value} is impossible: it must be at least 1")
    return value
