"""Every verb's `--help`: its defaults, its examples, which run, and all output in any encoding and as JSON."""

import argparse
import io
import json
import re
import shlex
import sys

import pytest
import yaml

from moonwhale import cli, options
from moonwhale.errors import PrintableStream
from moonwhale.options import parser_of
from moonwhale.posttrain.grpo import GRPOOptions
from moonwhale.posttrain.sft import SFTOptions
from moonwhale.presets import PRESETS
from moonwhale.train.config import TrainConfig, parse
from printed_commands import at_toy_size, provide, resolve, status_of
from printed_commands import folder as folder
from printed_commands import inputs as inputs

WITHOUT_JSON = {"chat", "serve"}  # they hold a conversation


class Terminal:
    """Standard output and standard error of an encoding, in place of this process's."""

    def __init__(self, monkeypatch, encoding: str):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))

    def read(self, name: str = "stdout") -> str:
        """Returns what has been written, which must be in the encoding."""
        stream = getattr(sys, name)
        stream.flush()
        return stream.buffer.getvalue().decode(stream.encoding)


def parsers(verb: str) -> list[argparse.ArgumentParser]:
    """Returns a verb's parser, or those of its subcommands."""
    parser = parser_of(cli._function(verb))
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return list(inner[0].choices.values()) if inner else [parser]


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Returns the options of a parser that `--help` shows and that take a value."""
    actions = [action for action in parser._actions if action.option_strings and action.nargs != 0]
    return [action for action in actions if action.help is not argparse.SUPPRESS]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_in_any_encoding(verb, encoding, monkeypatch):
    terminal = Terminal(monkeypatch, encoding)
    assert status_of([verb, "--help"]) == 0
    assert "?" not in re.sub(r"[a-z] ?\?|\?\"", "", terminal.read()), "a character was lost"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("✓ λ Γ μ ±1 é 2² … — “a”", '+ lambda gamma mu +/-1 e 22 ... - "a"'),
        ("你好 😀", r"\u4f60\u597d \U0001f600"),
        ("bell \a half \ud800", r"bell \x07 half \ud800"),
    ],
)
def test_what_an_encoding_lacks_is_spelled(text, written):
    for encoding, expected in (("ascii", written), ("utf-16", None)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        PrintableStream(stream).write(text)
        stream.flush()
        got = stream.buffer.getvalue().decode(encoding)
        assert got == (expected or got) and (expected or text[0] == got[0])


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_run_in_any_encoding_and_as_json(verb, folder, inputs, monkeypatch):
    """The first example writes ASCII, the second code page 1252. What `--json` prints is one JSON object."""
    examples = parser_of(cli._function(verb)).examples
    assert len(examples) == 2
    for example, encoding in zip(examples, ("ascii", "cp1252"), strict=True):
        words = shlex.split(example)[1:]
        assert words[0] == verb
        provide(words, folder, inputs / "toy")
        resolve(words, 1)
        toy, terminal = at_toy_size(words), Terminal(monkeypatch, encoding)
        toy += ["--json"] if verb not in WITHOUT_JSON else []
        assert status_of(toy) == 0, terminal.read("stderr")
        if verb not in WITHOUT_JSON:
            assert isinstance(json.loads(terminal.read()), dict), terminal.read()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_json_is_offered_where_something_is_reported(verb):
    for parser in parsers(verb):
        assert ("--json" in parser._option_string_actions) == (verb not in WITHOUT_JSON)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_every_default(verb):
    for parser in parsers(verb):
        for action in options_of(parser):
            if not action.required and not isinstance(action, argparse._AppendAction):
                assert re.search(r"\([^()]+\)", action.help), f"{action.option_strings[0]}: {action.help}"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_which_options_take_a_value(verb):
    for parser in parsers(verb):
        for action in options_of(parser):
            if not isinstance(action, argparse.BooleanOptionalAction):
                assert action.choices or action.metavar != "", f"{action.option_strings[0]} reads as a flag"


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_the_defaults_of_the_preset(preset, monkeypatch):
    terminal = Terminal(monkeypatch, "utf-8")
    assert status_of(["train", "--preset", preset, "--help"]) == 0
    text = "".join(terminal.read().split())  # lines may break after a hyphen
    config = parse(["--preset", preset])
    for entry in options.options_of(TrainConfig):
        outer, _, key = entry.name.partition(".")
        given = getattr(config, outer)
        value = given.get(key, entry.field.default) if key else given
        if entry.name == "model.max_position_embeddings":
            value = config.context
        if value is not None and entry.name != "out":
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            shown = shown.lower() if isinstance(value, bool) else shown
            meaning = f"{entry.field.metadata['help']} ({shown})".replace(" ", "")
            assert entry.flag in text and meaning in text, meaning


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (
            TrainConfig,
            "train --preset small --lr 1e-3 --model.moba_topk 4 --parallel.pp 2 --batch-size 4 --report-to none",
        ),
        (SFTOptions, "sft runs/demo --steps 3 --data a=0.5,b=0.5"),
        (GRPOOptions, "grpo runs/demo --rewards accuracy,format=0.5 --beta 0.1"),
    ],
)
def test_shown_options_are_a_config_file(cls, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal = Terminal(monkeypatch, "utf-8")
    assert status_of([*words.split(), "--show"]) == 0
    shown = terminal.read()
    (tmp_path / "shown.yaml").write_text(shown)
    assert yaml.safe_load(shown)["lr"] > 0 and len(list(tmp_path.iterdir())) == 1
    terminal = Terminal(monkeypatch, "utf-8")
    assert status_of([words.split()[0], "--config", "shown.yaml", "--show"]) == 0
    assert terminal.read() == shown
    terminal = Terminal(monkeypatch, "utf-8")
    assert status_of([*words.split(), "--show", "--json"]) == 0
    as_json = json.loads(terminal.read())
    assert as_json["verb"] == words.split()[0]
    assert as_json["options"].keys() == yaml.safe_load(shown).keys() and as_json["options"]["lr"] > 0


def test_a_file_of_an_earlier_version_names_options_as_then():
    assert options.check(GRPOOptions, {"show": 3}, "run.yaml") == {"show_answers": 3}
