"""Tab completion: the script that `moonwhale --completion` prints, run in a real shell."""

import shutil
import subprocess
import sys

import pytest

from moonwhale import cli, options
from moonwhale.presets import PRESETS
from moonwhale.train.config import TrainConfig

# Completes one command line as a shell does at TAB, and prints one reply per line.
COMPLETE = """
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_moonwhale moonwhale "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script():
    result = subprocess.run([sys.executable, "-m", "moonwhale", "--completion"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=["bash", "zsh"])
def complete(request, script):
    shell = shutil.which(request.param)
    if shell is None:
        pytest.skip(f"{request.param} is not installed")
    prepare = "autoload -U compinit && compinit -D\n" if request.param == "zsh" else ""
    emulate = "emulate sh\n" if request.param == "zsh" else ""  # as bashcompinit does for the functions it calls

    def run(*words: str) -> list[str]:
        code = prepare + script + emulate + COMPLETE
        result = subprocess.run([shell, "-c", code, shell, "moonwhale", *words], capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr, result.stderr
        # bash filters the replies by the typed word inside the function, zsh after it
        return [reply for reply in result.stdout.split() if request.param == "bash" or reply.startswith(words[-1])]

    return run


@pytest.mark.parametrize(
    ("words", "replies"),
    [
        ([""], list(cli.VERBS)),
        (["tr"], ["train"]),
        (["--v"], ["--version"]),
        (["train", "--batch"], ["--batch-size"]),
        (["train", "--no-c"], ["--no-compile"]),
        (["train", "--model.moba_t"], ["--model.moba_topk"]),
        (["train", "--preset", ""], list(PRESETS)),
        (["train", "--compile", "--preset", "s"], ["small", "seed_190m"]),
        (["train", "--parallel.schedule", "d"], ["dualpipev", "dualpipe"]),
        (["train", "--precision", "fp8-r"], ["fp8-rowwise"]),
        (["train", "--out", ""], []),  # the shell completes file names
        (["train", "--compile", "--sta"], []),
        (["info", "l"], ["large"]),
        (["plan", "--gpu", "h"], ["h100", "h200"]),
        (["plan", "--gpus", "h"], []),
        (["tokenizer", ""], ["train", "show"]),
        (["tokenizer", "train", "--vo"], ["--vocab-size"]),
        (["export", "runs/demo", "--to", "g"], ["gguf"]),
        (["generate", "runs/demo", "--gr"], ["--greedy"]),
    ],
)
def test_a_command_line_is_completed(complete, words, replies):
    assert complete(*words) == replies


def test_every_option_of_a_run_is_offered(complete):
    offered = complete("train", "--")
    assert {entry.flag for entry in options.options_of(TrainConfig)} | {"--help", "--config"} <= set(offered)


def test_printing_the_script_imports_nothing_heavy():
    code = "import sys; from moonwhale.cli import main\nmain(['--completion']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
