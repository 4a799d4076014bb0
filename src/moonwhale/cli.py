"""The command line: a verb names a function, and only that function's module is imported."""

import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module

from moonwhale import __version__
from moonwhale.errors import UserError, did_you_mean, with_option_names

VERBS = {
    "train": ("moonwhale.train.pretrain:main", "train a model on text"),
    "sft": ("moonwhale.posttrain.sft:main", "fine-tune a model on conversations"),
    "grpo": ("moonwhale.posttrain.grpo:main", "train a model by rewards for checkable answers"),
    "sample": ("moonwhale.posttrain.sample:main", "keep a model's own right answers, to fine-tune on"),
    "recipe": ("moonwhale.posttrain.recipe:main", "carry out several stages of training, from a file"),
    "generate": ("moonwhale.infer.commands:main_generate", "continue a text, or answer one"),
    "chat": ("moonwhale.infer.commands:main_chat", "talk to a model in the terminal"),
    "serve": ("moonwhale.serve.commands:main", "answer over HTTP: OpenAI's API and a chat page"),
    "eval": ("moonwhale.evaluate.commands:main", "measure a model: text, tasks, multiple choice"),
    "xray": ("moonwhale.inspect.commands:main_xray", "draw what happened inside a model, as a page"),
    "data": ("moonwhale.data.commands:main_data", "tokenise a data set and look at it"),
    "tokenizer": ("moonwhale.data.commands:main_tokenizer", "train a tokenizer, or look at one"),
    "export": ("moonwhale.export.commands:main", "write a checkpoint in another format"),
    "info": ("moonwhale.inspect.commands:main_info", "count what a preset or a checkpoint costs"),
    "plan": ("moonwhale.planning.plan:main", "lay a run out over many GPUs, and count what it costs"),
    "doctor": ("moonwhale.inspect.commands:main_doctor", "say what this machine can do, and why not more"),
}


class _OptionNames(logging.Formatter):
    """Prints a warning as one line, its fields spelled as options."""

    def format(self, record: logging.LogRecord) -> str:
        return with_option_names(record.getMessage())


def usage() -> str:
    verbs = "\n".join(f"  {verb:<11}{summary}" for verb, (_, summary) in VERBS.items())
    return (
        "usage: moonwhale VERB [options]\n\n"
        "A small language model with MLA, MoBA, DeepSeekMoE, multi-token prediction and MuonClip.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`moonwhale VERB --help` lists a verb's options; `moonwhale --version` prints the version.\n"
        'eval "$(moonwhale --completion)" in bash or zsh completes verbs, options and their values at TAB.\n'
        "MOONWHALE_DEBUG=1 in the environment shows where an error came from."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns its exit status: 0 done, 2 bad input, 130 interrupted, 141 nobody reads the output."""
    debug = os.environ.get("MOONWHALE_DEBUG") == "1"
    handler = logging.StreamHandler()
    handler.setFormatter(_OptionNames())
    logging.basicConfig(handlers=[handler])
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        if debug:
            raise
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Writers of other libraries report a full disk as exceptions of their own, so the text decides.
        no_space = "No space left on device" in str(error)
        if debug or not (no_space or isinstance(error, UserError)):
            raise
        return _fail(f"error: {error}" + (": free some, or give another --out" if no_space else ""), 2)


def _run(argv: list[str]) -> int:
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
        sys.stdout.flush()  # a closed pipe must show here, where it is handled, not at interpreter exit


def _function(verb: str) -> Callable[[list[str]], int | None]:
    module, function = VERBS[verb][0].split(":")
    return getattr(import_module(module), function)


def _fail(message: str, status: int) -> int:
    print("moonwhale: " + with_option_names(message).replace("\n", " "), file=sys.stderr)
    return status
