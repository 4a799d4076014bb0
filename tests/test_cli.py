"""The command line itself: what it prints, how it exits, and how little it imports."""

import argparse
import errno
import json
import logging
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from moonwhale import __version__, cli
from moonwhale.errors import UserError
from moonwhale.options import parser_of
from moonwhale.planning import plan

HEAVY = {"torch", "transformers", "datasets", "tokenizers", "numpy", "matplotlib", "accelerate"}


def moonwhale(*argv: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "moonwhale", *argv], capture_output=True, text=True, **kwargs)


@pytest.fixture
def verb(monkeypatch):
    """Replaces all verbs with one, `do`, which calls the given function."""

    def make(function):
        monkeypatch.setitem(sys.modules, "stand_in", types.SimpleNamespace(main=function))
        monkeypatch.setattr(cli, "VERBS", {"do": ("stand_in:main", "")})

    return make


def test_help_and_version():
    assert moonwhale().stdout == moonwhale("--help").stdout == cli.usage() + "\n"
    for name in cli.VERBS:
        assert f"  {name} " in cli.usage()
    assert moonwhale("--version").stdout == f"moonwhale {__version__}\n"


def test_unknown_verb():
    result = moonwhale("trian")
    assert result.returncode == 2
    assert result.stderr == "moonwhale: error: unknown verb 'trian' (did you mean train?); see `moonwhale --help`\n"


@pytest.mark.parametrize("name", [None, *cli.VERBS])
def test_help_is_light(name):
    """`moonwhale [VERB] --help` succeeds without importing a heavy library."""
    code = (
        "import sys; from moonwhale.cli import main\n"
        f"try: status = main({[name, '--help'] if name else ['--help']})\n"
        "except SystemExit as leaving: status = leaving.code\n"
        f"print('HEAVY', *sorted({HEAVY} & sys.modules.keys())); sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: moonwhale" in result.stdout
    assert result.stdout.splitlines()[-1] == "HEAVY"


def test_help_is_quick():
    def once() -> float:
        start = time.perf_counter()
        moonwhale("--help", check=True)
        return time.perf_counter() - start

    assert min(once() for _ in range(3)) < 0.5


def test_arguments_and_status_pass_through(verb):
    seen = []
    verb(lambda argv: seen.append(argv))
    assert cli.main(["do", "--a", "b"]) == 0
    assert seen == [["--a", "b"]]
    verb(lambda argv: 3)
    assert cli.main(["do"]) == 3


def failing(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("`data`: no such file"), 2, "moonwhale: error: --data: no such file\n"),
        (UserError("two\nlines"), 2, "moonwhale: error: two lines\n"),
        (KeyboardInterrupt(), 130, "moonwhale: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            2,
            "moonwhale: error: [Errno 28] No space left on device: 'runs/x': free some, or give another --out\n",
        ),
        (
            ImportError("trl:\nundefined symbol", name="trl"),
            2,
            "moonwhale: error: a package cannot be imported (trl: undefined symbol): install it again\n",
        ),
    ],
)
def test_user_errors_are_one_line(verb, capsys, error, status, line):
    verb(failing(error))
    assert cli.main(["do"]) == status
    assert capsys.readouterr().err == line


ANYWHERE = {  # paths of every kind, and what one line says of them wherever they arrive
    "too long": ("x" * 300, "File name too long"),
    "too long in all": ("y" * 200 + "/y" * 4000, "File name too long"),
    "a loop": ("loop/a", "symbolic links"),
    "below a file": ("file/a", "Not a directory|is a file|File exists"),
    "where nothing can be made": ("/proc/a", "No such file or directory|not yours"),
    "null": ("a\0b", "a path holds a null character"),
    "half a pair": ("a\ud800b", "holds half of a surrogate pair"),
}


@pytest.fixture(params=ANYWHERE)
def impossible(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("the whale sings to the moon " * 9)
    return ANYWHERE[request.param]


def refused_in_one_line(argv, capsys, message=""):
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moonwhale: error: ") and len(line) < 700 and re.search(message, line), line


@pytest.mark.parametrize("use", [open, os.listdir, os.mkdir, os.stat, os.readlink], ids=lambda use: use.__name__)
def test_no_path_gives_a_traceback(use, impossible, verb, capsys):
    path, message = impossible
    verb(lambda argv: use(path))
    refused_in_one_line(["do"], capsys, message)


def test_a_path_as_bytes_is_named_too(verb, capsys):
    verb(lambda argv: os.stat(b"x" * 300))
    refused_in_one_line(["do"], capsys, r"'xxx+\.\.\.x+' cannot be used: File name too long: give another path")


@pytest.mark.parametrize(
    "argv",
    ["info PATH", "generate PATH hi", "xray PATH --prompt hi", "eval PATH --data file", "recipe PATH", "serve PATH",
     "data --data PATH", "data --data file --tokenizer PATH", "tokenizer show PATH hi", "train --config PATH",
     "train --data file --out PATH", "train --config y.yaml", "recipe y.yaml", "sample PATH --task file",
     "tokenizer train --data file --out PATH", "export PATH --to gguf --out a", "compare --config PATH --vary lr=1"],
)  # fmt: skip
def test_a_path_is_refused_in_one_line_wherever_it_arrives(argv, impossible, capsys):
    path, _ = impossible
    stage = {"data": path, "out": "out"}
    Path("y.yaml").write_text(json.dumps([{"train": stage}] if argv.startswith("recipe") else stage))
    refused_in_one_line([path if word == "PATH" else word for word in argv.split()], capsys)


def test_a_cache_that_cannot_be_is_refused_in_one_line(impossible, capsys, monkeypatch):
    path, _ = impossible
    if not {"\0", "\ud800"} & set(path):  # an environment variable holds neither
        monkeypatch.setenv("MOONWHALE_CACHE", path)
        refused_in_one_line(["data", "--data", "file", "--context", "32"], capsys)


OURS = [
    ValueError("ours"),
    OSError(errno.EIO, "I/O error"),
    OSError(errno.EIO, "no", "x"),
    ImportError("cannot import name 'x' from 'moonwhale.cli'", name="moonwhale.cli"),
]


@pytest.mark.parametrize("error", OURS)
def test_bugs_keep_their_traceback(verb, error):
    verb(failing(error))
    with pytest.raises(type(error)):
        cli.main(["do"])


@pytest.mark.parametrize("error", [UserError("x"), KeyboardInterrupt()])
def test_debug_shows_the_traceback(verb, monkeypatch, error):
    monkeypatch.setenv("MOONWHALE_DEBUG", "1")
    verb(failing(error))
    with pytest.raises(type(error)):
        cli.main(["do"])


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_a_closed_pipe_is_not_reported(argv):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "moonwhale", *argv]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.returncode in (0, 141)  # argparse itself ignores a closed pipe
    assert result.stderr == ""


def test_control_characters_are_shown_not_obeyed(capsys, monkeypatch):
    hostile = "red \x1b[31m bell \x07 title \x1b]0;x\x07 c1 \x9b2J back\rover half \udcff\tand\nlines"

    def verb(argv):
        print(hostile)
        sys.stdout.write(hostile)
        sys.stdout.writelines([hostile])
        print(hostile, file=sys.stderr)
        # Without the half: pytest keeps log records, and its workers can only send whole text.
        logging.getLogger("moonwhale").warning(hostile.replace("\udcff", ""))
        raise UserError(hostile)

    monkeypatch.delenv("MOONWHALE_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_function", lambda name: verb)
    assert cli.main(["info"]) == 2
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\udcff"}
        assert r"\x1b[31m bell \x07 title \x1b]0;x\x07 c1 \x9b2J" in text
    assert out.count("\tand\nlines") == 3 and "\r" not in out
    assert err.splitlines()[-1].startswith("moonwhale: error: red ") and r"back\rover" in err.splitlines()[-1]


def typed_options(parser) -> list:
    """The options whose values argparse reads as numbers, also those of sub-commands."""
    found = [(parser, action) for action in parser._actions if action.type]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [pair for inner in action.choices.values() for pair in typed_options(inner)]
    return found


def test_every_number_on_the_command_line_has_a_bound():
    pairs = [pair for name in cli.VERBS for pair in typed_options(parser_of(cli._function(name)))]
    assert {"context", "gpus", "top_k", "max_queue", "vocab_size"} <= {action.dest for _, action in pairs}
    for parser, action in pairs:
        assert parser._get_value(action, "7") == 7
        for text in ("9" * 40, "9" * 5000, "many"):
            with pytest.raises(argparse.ArgumentError, match=r"is too large: give at most 1,000|is not a .*number"):
                parser._get_value(action, text)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("info demo --context 1000000000000", None),
        ("info demo --context 1000000000000000 --batch 1000000000000000", None),
        ("plan --gpus 1000000000000", "--gpus: 1000000000000 is impossible: give at most 1,000,000"),
        ("plan --gpus 999983 --tokens-per-step 999999999999989 --context 1 --batch-size 1", "GPUs can't share"),
        ("plan --gpus 64 --tokens-per-step 512000000000000", None),
        ("plan --gpus 8 --batch-size 1000000 --context 1 --tokens-per-step 1000000", "--batch-size: 1000000 is imp"),
        ("data --context 1000000000000", "--context: 1000000000000 is impossible: give at most 16,777,216"),
        ("eval x --task chain_sum --problems 1000000000000", "--problems: 1,000,000,000,000 with 5 answers each"),
        ("eval x --task chain_sum --samples 1000000000000", "--problems: 100 with 1,000,000,000,001 answers each"),
        ("sample x --out a.jsonl --samples 1000000000000", "--questions: 1,000 with 1,000,000,000,000 answers each"),
        (f"generate x y --draft {'9' * 5000}", "is neither auto nor a number of tokens"),
    ],
)
def test_large_numbers_cost_no_time(argv, said, capsys):
    start = time.process_time()
    assert cli.main(argv.split()) == (0 if said is None else 2)
    out, err = capsys.readouterr()
    assert (out and not err) if said is None else (said in err and err.count("\n") == 1)
    assert time.process_time() - start < 10


def test_a_plan_of_very_many_layouts_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(plan, "MOST_LAYOUTS", 3)
    assert cli.main(["plan", "--gpus", "8"]) == 2
    assert "--batch-size: there are more than 3 layouts: give fewer rows than 8" in capsys.readouterr().err
