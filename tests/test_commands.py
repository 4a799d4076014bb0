"""Every command that a document prints runs: at toy size, in the order of the page, in one process.

CONTRIBUTING.md gives the rule by which a command becomes small enough.
"""

import argparse
import re
import shlex
import tomllib
from functools import partial

import pytest

from forked import finish, start, train_in
from moonwhale import cli
from moonwhale.data.builtin_sets import chitchat_file
from moonwhale.errors import UserError
from moonwhale.options import parser_of, read_argv
from moonwhale.train.config import TrainConfig
from printed_commands import at_toy_processes, at_toy_size, commands, provide, resolve, status_of
from printed_commands import folder as folder
from printed_commands import inputs as inputs
from test_docs import DOCUMENTS, ROOT, prose, read


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_every_command_runs(document, folder, inputs, capsys):
    wrong = []
    for command in commands(read(document)):
        words = command.words
        if not command.is_whole or words[0].startswith("--"):
            continue
        provide(words, folder, inputs / "toy")
        try:
            resolve(words, command.processes)
            if command.processes == 1 and status_of(at_toy_size(words)):
                wrong.append(f"{shlex.join(at_toy_size(words))}: {capsys.readouterr().err}")
        except UserError as error:
            wrong.append(f"{shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def torchruns() -> dict[str, list[str]]:
    """Returns the first command of torchrun for each way to share the work, by the options that choose it."""
    found: dict[str, list[str]] = {}
    for command in (each for document in DOCUMENTS for each in commands(read(document))):
        if command.processes > 1:
            found.setdefault(" ".join(w[2:] for w in command.words if w.startswith("--parallel.")), command.words)
    return found


@pytest.mark.slow
@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", torchruns())
def test_each_kind_of_torchrun_command_runs(kind, folder, inputs):
    words, processes = at_toy_processes(torchruns()[kind])
    provide(words, folder, inputs / "toy")
    ranks = start(folder, *[words[1:]] * processes, target=partial(train_in, folder))
    finish(ranks)
    assert "done       1 step" in ranks[0].said
    assert list(folder.glob("runs/*/model.safetensors"))


@pytest.mark.parametrize(
    ("line", "processes", "reason"),
    [
        ("train --preset small --batch-size 1 --parallel.pp 4", 4, "6 blocks can't be cut into 8 stages"),
        ("train --preset small --batch-size 1 --parallel.pp 4", 6, "can't be made of 6 processes"),
        ("train --batch-size 1 --tokens-per-step 6144 --parallel.ep 3", 3, "8 experts can't be shared by 3 ranks"),
        ("grpo runs/demo --group-size 1", 1, "an answer is compared with at least one other"),
    ],
)
def test_a_command_that_cannot_run_is_detected(line, processes, reason):
    with pytest.raises(UserError, match=reason):
        resolve(line.split(), processes)


# --- what only names options -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Returns the options of each verb."""

    def of(parser) -> set[str]:
        inner = [
            action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)
        ]
        return set(parser._option_string_actions).union(*(of(sub) for subs in inner for sub in subs))

    return {verb: of(parser_of(cli._function(verb))) for verb in cli.VERBS}


def unknown_names(text: str, known: dict[str, set[str]]) -> list[str]:
    """Returns the verbs and options of a text's commands that do not exist."""
    found = []
    for command in commands(text):
        verb, *rest = command.words
        if verb != "VERB" and not verb.startswith("--"):
            options = known.get(verb, set()) | {"--model.FIELD", "--parallel.FIELD"}
            named = {word.partition("=")[0] for word in rest if word.startswith("--")}
            found += [verb] * (verb not in known) + sorted(named - options)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_verbs_and_options_exist(document, known):
    """So do options that the text names without a command."""
    text = read(document)
    assert not unknown_names(text, known)
    every = set().union(*known.values(), {"--version", "--completion", "--parallel.FIELD", "--model.FIELD"})
    for script in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")):
        every |= {*re.findall(r'"(--[a-z-]+)"', script.read_text(encoding="utf-8"))}
    assert not set(re.findall(r"`(--[a-z][\w.-]*)", prose(text))) - every


@pytest.mark.parametrize("line", ["moonwhale trian", "moonwhale train --leraning-rate 1", "moonwhale info demo --lr 1"])
def test_a_wrong_name_is_detected(line, known):
    assert unknown_names(f"```sh\n{line}  # a comment\n```\n", known)


# --- what a command costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_printed_run_repeats_the_built_in_text_for_days(document):
    built_in = chitchat_file().stat().st_size / 3  # tokens, at most
    for command in commands(read(document)):
        if (
            command.words[0] == "train"
            and command.is_whole
            and not {"--data", "--config", "--resume"} & {*command.words}
        ):
            given, _ = read_argv(parser_of(cli._function("train")), TrainConfig, command.words[1:])
            config = TrainConfig.resolve(given)
            assert config.steps * config.tokens_per_step < 10 * built_in, command.words


# --- other programs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_targets_and_extras_exist(document):
    text, project = read(document), tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert all((ROOT / name).exists() for name in re.findall(r"python ((?:docs|benchmarks)/\S+?\.py)", text))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)} <= {*targets}
    extras = {extra for names in re.findall(r'(?:moonwhale|"\.)\[([\w,]+)\]', text) for extra in names.split(",")}
    assert extras <= {*project["project"]["optional-dependencies"]}
