"""`moonwhale train` in processes that are forked from one with everything imported."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # after the tests' own modules

from forked_processes import ForkedProcess, finish, rank_variables

__all__ = ["ForkedProcess", "finish", "start"]


def train(argv: list[str]) -> int:
    import torch

    from moonwhale import cli
    from moonwhale.optim import muonclip

    muonclip._fast_dtype = lambda device: torch.float32  # so that rounding errors stay small
    return cli.main(["train", *argv])


def start(folder: Path, *argvs: list[str]) -> list[ForkedProcess]:
    """Start the ranks of one run, each with its own list of arguments, as torchrun would."""
    variables = rank_variables(len(argvs))
    return [
        ForkedProcess(folder / f"rank{rank}.out", variables[rank], train, list(argv)) for rank, argv in enumerate(argvs)
    ]
