"""Run options from a dataclass: every field is a command line option and a YAML key, checked against its annotation.

`option(...)` makes a field with its help text. A field of type `dict` may name a dataclass whose fields are the
dictionary's keys: `--model.hidden_size 128` on the command line is `model: {hidden_size: 128}` in YAML.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping

from moonwhale.errors import UserError, did_you_mean, shown
from moonwhale.yaml_files import parse_yaml, read_yaml_file

LARGEST = 10**15  # the largest number of an option: products of two such numbers still fit fp32
DEVICES = ("auto", "cpu", "cuda", "mps")  # what tab completion offers; cuda:N is allowed too
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
    suggestions: tuple[str, ...] | None = None,
    fields: type | None = None,
):
    """Declare a dataclass field as an option.

    Args:
        default: the value if no source gives one.
        help: one line for `--help`.
        group: the heading under which `--help` lists the option. "positional" makes it an argument without dashes.
        choices: the only values allowed.
        suggestions: values for tab completion to offer, where others are allowed too.
        fields: for a dict, the dataclass whose fields are its keys.
    """
    metadata = {"help": help, "group": group, "choices": choices, "suggestions": suggestions, "fields": fields}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


HAND_OVER = "--hand-over-the-parser"  # makes a verb's parser raise ParserHandedOver


class ParserHandedOver(Exception):
    """Carries the parser that a verb built to `parser_of`."""


def parser_of(main: Callable[[list[str]], object]) -> argparse.ArgumentParser:
    """Return the parser that a verb's `main` builds. `main` stops where it would parse its arguments."""
    try:
        main([HAND_OVER])
    except ParserHandedOver as handed_over:
        return handed_over.args[0]
    raise AssertionError(f"{main} parsed no arguments")


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes no abbreviations and raises every complaint as a UserError of one line."""

    def __init__(self, *, examples: tuple[str, ...] = (), epilog: str = "", **kwargs):
        """`examples`: whole commands, which `--help` shows above the epilog."""
        self.examples = examples
        shown_examples = "examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else ""
        epilog = "\n\n".join(filter(None, [shown_examples, epilog]))
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=epilog, **kwargs
        )
        for kind in (int, float):
            self.register("type", kind, functools.partial(_number, kind))

    def error(self, message: str) -> typing.NoReturn:
        message = re.sub(r"--([a-z][\w.-]*)", lambda found: f"`{found[1].replace('-', '_')}`", message)
        raise UserError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")

    def parse_known_args(self, args=None, namespace=None):
        if args == [HAND_OVER]:
            raise ParserHandedOver(self)
        return super().parse_known_args(args and list(map(_canonical, args)), namespace)

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            kind = "unknown option" if name.startswith("-") else "unexpected argument"
            near = did_you_mean(name, self._option_string_actions)
            raise UserError(f"{kind} {name}{near}; see `{self.prog} --help`")
        return values


def _canonical(argument: str) -> str:
    """Spell an option as `--help` does: dashes for underscores, except in a dict's key."""
    if not re.match(r"--[a-z][\w.-]*(=|$)", argument):
        return argument
    name, equals, value = argument.partition("=")
    outer, dot, key = name.partition(".")
    return outer.replace("_", "-") + dot + key.replace("-", "_") + equals + value


class Option(typing.NamedTuple):
    """One option of a dataclass: a field, or a dict's key as `model.hidden_size`."""

    name: str
    field: dataclasses.Field
    kind: typing.Any  # the annotation
    group: str

    @property
    def flag(self) -> str:
        """The command line's spelling: `--batch-size`, `--model.hidden_size`, and `--from` for `from_`."""
        return "--" + (self.name if "." in self.name else self.name.rstrip("_").replace("_", "-"))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values allowed, or nothing if there are others."""
        return self.field.metadata.get("choices") or (("true", "false") if self.kind is bool else ())

    @property
    def suggestions(self) -> tuple[str, ...]:
        """The values that tab completion offers."""
        return self.choices or self.field.metadata.get("suggestions") or ()

    def help(self, default: object) -> str:
        """The help text with the default. A text that ends with its own account of what None means is left as it is."""
        text = self.field.metadata["help"]
        if isinstance(default, list):
            default = ",".join(map(str, default))
        elif isinstance(default, bool):
            default = str(default).lower()
        if default is not None:
            text += f" ({default})"
        elif self.group != "positional" and not text.endswith(")"):
            text += " (null)" if "." in self.name else " (none)"
        return text.replace("%", "%%")


def options_of(cls: type) -> Iterator[Option]:
    """Yield every option of a dataclass, a dict's keys one by one."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        group = field.metadata.get("group", "options")
        if nested := field.metadata.get("fields"):
            for inner in options_of(nested):
                yield inner._replace(name=f"{field.name}.{inner.name}", group=group)
        else:
            yield Option(field.name, field, kinds[field.name], group)


def add_options(
    parser: argparse.ArgumentParser,
    cls: type,
    defaults: Mapping[str, object] = types.MappingProxyType({}),
    show: bool = True,
    leave_out: Container[str] = (),
) -> None:
    """Add every option of the dataclass `cls` to a parser, in its groups, except the fields in `leave_out`.

    An option that is not given stays out of the namespace. `--help` shows its default: that of `defaults`, by name, or
    else the dataclass's. With `show=False` it lists none of these options.
    """
    groups = {}
    for entry in options_of(cls):
        if entry.name.partition(".")[0] in leave_out:
            continue
        field = entry.field
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = entry.help(defaults.get(entry.name, default)) if show else argparse.SUPPRESS
        keywords = {"default": argparse.SUPPRESS, "help": text}
        if entry.group == "positional":
            parser.add_argument(entry.name, nargs="?", metavar=entry.name.upper(), **keywords)
            continue
        if entry.kind is bool and "." not in entry.name:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            last_word = re.split(r"[._-]", entry.flag)[-1].upper()
            keywords["metavar"] = "{" + ",".join(entry.choices) + "}" if entry.choices else last_word
        if entry.group not in groups:
            groups[entry.group] = parser.add_argument_group(entry.group)
        action = groups[entry.group].add_argument(entry.flag, dest=entry.name, **keywords)
        action.suggestions = entry.suggestions


def read_argv(parser: argparse.ArgumentParser, cls: type, argv: list[str]) -> tuple[dict, argparse.Namespace]:
    """Read a command line. Returns the options of `cls` that it gives, typed, and all arguments as parsed.

    Raises:
        UserError: an unknown option, or a value of the wrong type.
    """
    arguments = parser.parse_args(argv)
    values: dict[str, typing.Any] = {}
    for entry in options_of(cls):
        if not hasattr(arguments, entry.name):
            continue
        text = getattr(arguments, entry.name)
        outer, dot, key = entry.name.partition(".")
        holder, key = (values.setdefault(outer, {}), key) if dot else (values, outer)
        holder[key] = _convert(text, entry.field, entry.kind, f"`{entry.name}`", from_text=True)
    return values, arguments


def read_yaml(path: str | os.PathLike, cls: type) -> dict:
    """Read the options of `cls` that a YAML file gives.

    Raises:
        UserError: no such file, not plain YAML, not a mapping, an unknown key, or a value of the wrong type.
    """
    try:
        values = read_yaml_file(path)
    except UserError as error:
        raise UserError(f"`config`: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"`config`: {path} holds no 'option: value' lines")
    return check(cls, values, str(path))


def check(cls: type, values: dict, source: str, outer: str = "") -> dict:
    """Check that `cls` has an option for every key and that every value has its option's type.

    A key that the class's `RENAMED` lists, as files of earlier versions have it, gets its new name.

    Args:
        values: option names and values, read from a file.
        source: the file, for messages.
        outer: the dict that holds these keys, as `model.`.

    Raises:
        UserError: naming the file, the key and the value.
    """
    kinds, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    checked, renamed = {}, getattr(cls, "RENAMED", {})
    for key, value in values.items():
        key = renamed.get(key, key) if isinstance(key, str) else key
        name = f"{outer}{key}"
        if key not in fields:
            known = [outer + field for field in fields]
            raise UserError(f"{source}: unknown key {shown(name)}{did_you_mean(name[:100], known)}")
        if nested := fields[key].metadata.get("fields"):
            checked[key] = check(nested, convert(value, dict, f"{source}: {name}"), source, f"{name}.")
        else:
            checked[key] = _convert(value, fields[key], kinds[key], f"{source}: {name}")
    return checked


def _convert(value: typing.Any, field: dataclasses.Field, kind: typing.Any, name: str, from_text=False) -> typing.Any:
    """Convert a field's value to its annotation and check it against the field's choices."""
    value, choices = convert(value, kind, name, from_text), field.metadata.get("choices")
    if choices and value not in choices:
        raise UserError(
            f"{name}: {shown(value)} is none of {', '.join(choices)}{did_you_mean(str(value)[:100], choices)}"
        )
    return value


def convert(value: typing.Any, kind: typing.Any, name: str, from_text: bool = False) -> typing.Any:
    """Convert `value` to the annotation `kind`; with `from_text`, parse text from a command line first.

    Raises:
        UserError: one line with the option's name, the value and the expected type.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    readings = _readings(value, kinds) if from_text and isinstance(value, str) else [value]
    for reading in readings:
        for k in kinds:
            fits, converted = _as(reading, k)
            if fits and type(converted) in (int, float) and abs(converted) > LARGEST:
                raise UserError(f"{name}: {shown(value)} is too large: give at most {LARGEST:,}")
            if fits:
                return converted
    raise UserError(f"{name}: {shown(value)} is not {' or '.join(NOUNS[k] for k in kinds)}")


def _readings(text: str, kinds: tuple) -> list:
    """List what text from a command line may mean, likeliest first: the text itself, YAML, or a list as `a,b`."""
    if str in kinds:
        return [None, text] if text == "null" and types.NoneType in kinds else [text]
    if list[str] in kinds:
        return [text.split(",")]
    readings = []
    for candidate in (text, f"[{text}]"):
        with contextlib.suppress(UserError):
            readings.append(parse_yaml(candidate, "it"))
    return readings


def _as(value: typing.Any, kind: typing.Any) -> tuple[bool, typing.Any]:
    """Return whether a value is of a type, and the value as that type."""
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_as(item, typing.get_args(kind)[0])[0] for item in value), value
    if kind is float and type(value) in (int, str):  # YAML 1.1 reads 1e-3, which has no point, as text
        with contextlib.suppress(ValueError, OverflowError):  # an int may exceed all floats
            value = float(value)
    return type(value) is kind and (kind is not float or math.isfinite(value)), value


def merge(*layers: dict) -> dict:
    """Merge dicts of options. Later ones win, key by key inside a dict of dotted options."""
    merged = {}
    for layer in layers:
        for key, value in layer.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged


def require(config: object, name: str, ok: bool, fix: str) -> None:
    """Raise a UserError about the option `name` of `config` unless its value is ok."""
    if not ok:
        raise UserError(f"`{name}`: {shown(getattr(config, name))} is impossible: {fix}")


def require_at_least_one(config: object, *names: str) -> None:
    """Raise a UserError if one of the options `names` is below 1. None passes."""
    for name in names:
        value = getattr(config, name)
        require(config, name, value is None or value >= 1, "it must be at least 1")


def require_not_negative(config: object, *names: str) -> None:
    """Raise a UserError if one of the options `names` is below 0. None passes."""
    for name in names:
        value = getattr(config, name)
        require(config, name, value is None or value >= 0, "it must not be negative")


def above_zero(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """Return an argparse `type` that reads a number of this kind above 0."""
    return functools.partial(_number, kind, positive=True)


def _number(kind: type[int] | type[float], text: str, positive: bool = False) -> int | float:
    """Read a number for argparse, whose own reading has no bound: `type=int` and `type=float` mean this."""
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {NOUNS[kind]}") from None
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"{shown(value)} is too large: give at most {LARGEST:,}")
    if positive and not value > 0:
        raise argparse.ArgumentTypeError(f"{value:g} is impossible: it must be above 0")
    return value
