"""Run `moonwhale train` in forked processes. They inherit the imports of their parent, so they start fast."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

# At the end of the path, so that the tests' own modules take precedence.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from forked_processes import ForkedProcess, finish, rank_variables

__all__ = ["ForkedProcess", "finish", "rank_variables", "start"]


def train(argv: list[str]) -> int:
    import torch

    from moonwhale import cli
    from moonwhale.optim import muonclip

    muonclip._fast_dtype = lambda device: torch.float32  # keeps rounding errors small
    return cli.main(["train", *argv])


def train_in(folder: Path, argv: list[str]) -> int:
    os.chdir(folder)
    return train(argv)


def start(folder: Path, *argvs: list[str], target: Callable[[list[str]], int] = train) -> list[ForkedProcess]:
    """Start the ranks of one run, each with its own list of arguments, as torchrun would."""
    variables = rank_variables(len(argvs))
    return [
        ForkedProcess(folder / f"rank{rank}.out", variables[rank], target, list(argv))
        for rank, argv in enumerate(argvs)
    ]
