"""The command line. A verb names a function, and only that function's module is imported."""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module

from moonwhale import __version__
from moonwhale.errors import PrintableStream, UserError, did_you_mean, one_line, printable, shown, with_option_names

VERBS = {
    "train": ("moonwhale.train.pretrain:main", "train a model on text"),
    "sft": ("moonwhale.posttrain.sft:main", "fine-tune a model on conversations"),
    "grpo": ("moonwhale.posttrain.grpo:main", "train a model by rewards for answers that can be checked"),
    "sample": ("moonwhale.posttrain.sample:main", "collect a model's own right answers for fine-tuning"),
    "recipe": ("moonwhale.posttrain.recipe:main", "run several stages of training from a file"),
    "generate": ("moonwhale.infer.commands:main_generate", "continue a text, or answer a message"),
    "chat": ("moonwhale.infer.commands:main_chat", "talk to a model in the terminal"),
    "serve": ("moonwhale.serve.commands:main", "serve a model over HTTP: OpenAI's API and a chat page"),
    "eval": ("moonwhale.evaluate.commands:main", "measure a model on text, tasks and multiple choice"),
    "compare": ("moonwhale.lab.commands:main", "train variants of a model at equal cost, and tell whether they differ"),
    "xray": ("moonwhale.inspect.commands:main_xray", "show what happens inside a model, as an HTML page"),
    "data": ("moonwhale.data.commands:main_data", "tokenize a data set and show it"),
    "tokenizer": ("moonwhale.data.commands:main_tokenizer", "train a tokenizer, or see how one splits a text"),
    "export": ("moonwhale.export.commands:main", "write a checkpoint in another format"),
    "info": (
        "moonwhale.inspect.commands:main_info",
        "count the parameters, FLOPs and memory of a preset or a checkpoint",
    ),
    "plan": ("moonwhale.planning.plan:main", "find the best layout of a run over many GPUs"),
    "doctor": (
        "moonwhale.inspect.commands:main_doctor",
        "report what this machine supports, and why it does not support the rest",
    ),
}

LONGEST_LINE = 2000  # characters of an error or a warning
LONG_WORD = re.compile(r"(\S{100})\S{150,}(\S{50})")
_OF_PATHS = "ENAMETOOLONG ELOOP ENOENT EEXIST ENOTDIR EISDIR EROFS EINVAL EILSEQ ENXIO ENODEV"
IMPOSSIBLE_PATHS = {getattr(errno, name) for name in _OF_PATHS.split()}  # others, such as EIO, say nothing of the path


def usage() -> str:
    """Return the text of `moonwhale --help`."""
    verbs = "\n".join(f"  {verb:<11}{summary}" for verb, (_, summary) in VERBS.items())
    return (
        "usage: moonwhale VERB [options]\n\n"
        "A small language model with MLA, MoBA, DeepSeekMoE, multi-token prediction and MuonClip.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`moonwhale VERB --help` lists a verb's options; `moonwhale --version` prints the version.\n"
        'After eval "$(moonwhale --completion)", bash and zsh complete verbs, options and their values at TAB.\n'
        "With MOONWHALE_DEBUG=1 in the environment, an error shows its traceback."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit status.

    0 is success, 2 bad input, 130 an interrupt, and 141 means that the reader has closed the output.
    """
    debug = os.environ.get("MOONWHALE_DEBUG") == "1"
    os.environ["TTY_COMPATIBLE"] = "0"  # rich, by which TRL prints answers, would colour them with control sequences
    handler = logging.StreamHandler()
    handler.format = lambda record: _line(record.getMessage())
    logging.basicConfig(handlers=[handler])
    try:
        # A model, a file or a row of data may hold a terminal's control sequences: they are shown, not obeyed.
        with redirect_stdout(PrintableStream(sys.stdout)), redirect_stderr(PrintableStream(sys.stderr, "\n\t\r")):
            return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        if debug:
            raise
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = _explain(error)
        if debug or message is None:
            raise
        return _fail(f"error: {message}", 2)


def _explain(error: Exception) -> str | None:
    """Return the message for an exception that the user's input or the disk has caused. None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if "No space left on device" in str(error):  # each library raises its own exception for a full disk
        return f"{error}: free some, or give another `out`"
    if isinstance(error, OSError) and error.filename is not None:
        path = shown(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename))
        if isinstance(error, PermissionError):
            return f"{path} is not yours to use: {error.strerror}"
        if error.errno in IMPOSSIBLE_PATHS:
            return f"{path} cannot be used: {error.strerror}: give another path"
    if isinstance(error, ImportError) and not (error.name or "").startswith("moonwhale"):
        return f"a package cannot be imported ({one_line(error)}): install it again"
    # Paths come from options, files and the environment, so what they hold is seen only when they are used.
    if isinstance(error, ValueError) and re.search("embedded null (byte|character)", str(error)):
        return "a path holds a null character, which no file's name can: leave it out"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"{shown(error.object)} holds half of a surrogate pair, which no file's name can: leave it out"
    if isinstance(error, RuntimeError) and str(error).startswith(("Symlink loop", "Could not determine home")):
        return f"{error}: give another path"  # of pathlib
    return None


def _run(argv: list[str]) -> int:
    """Run the verb, or the option in its place, that `argv` begins with."""
    verb, *rest = argv or ["--help"]
    try:
        if verb in VERBS:
            return _function(verb)(rest) or 0
        if verb in ("-h", "--help", "help"):
            print(usage())
        elif verb in ("-V", "--version"):
            print(f"moonwhale {__version__}")
        elif verb == "--completion":
            from moonwhale.completion import script

            print(script({name: _function(name) for name in VERBS}), end="")
        else:
            kind = "option" if verb.startswith("-") else "verb"
            raise UserError(f"unknown {kind} {verb!r}{did_you_mean(verb, VERBS)}; see `moonwhale --help`")
        return 0
    finally:
        sys.stdout.flush()  # a closed pipe must raise here, where `main` handles it, not at the interpreter's exit


def _function(verb: str) -> Callable[[list[str]], int | None]:
    """Import the function of a verb."""
    module, function = VERBS[verb][0].split(":")
    return getattr(import_module(module), function)


def _fail(message: str, status: int) -> int:
    """Print a message as one line and return the status."""
    print("moonwhale: " + _line(message), file=PrintableStream(sys.stderr))
    return status


def _line(message: str) -> str:
    """Return a message as one line, with fields spelled as options and control characters escaped.

    A path or another word that no one would read is shortened.
    """
    line = printable(with_option_names(message).replace("\n", " "), "")
    line = LONG_WORD.sub(r"\1…\2", line)
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " …"
