"""What `train`, `sft` and `grpo` return to a Python program or a notebook."""

import typing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

if typing.TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moonwhale.model import MoonwhaleForCausalLM


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    out: its folder, which holds the model of the last step.
    history: the entries of the Trainer's log.
    """

    out: Path
    history: list[dict]

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, newest first."""
        from moonwhale.checkpoint import list_checkpoints

        return list_checkpoints(self.out)

    @property
    def best(self) -> Path | None:
        """The folder of the best checkpoint on held-out data."""
        from moonwhale.train.milestones import best_checkpoint

        return best_checkpoint(self.history, self.out)

    @property
    def plot(self) -> Path:
        """The picture of its curves."""
        return self.out / ("rewards.png" if any("reward" in entry for entry in self.history) else "loss.png")

    @cached_property
    def model(self) -> "MoonwhaleForCausalLM":
        """The model of the last step, opened from `out` in evaluation mode, on the CPU."""
        return self._opened[0]

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The model's tokenizer."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> "tuple[MoonwhaleForCausalLM, PreTrainedTokenizerFast]":
        from moonwhale.checkpoint import open_checkpoint

        return open_checkpoint(self.out)
