"""`MTPSFTTrainer`: TRL's SFTTrainer with the whole model's loss, on conversations packed document by document."""

from dataclasses import dataclass

import torch
from trl import SFTConfig, SFTTrainer

from moonwhale.model.loss import IGNORE
from moonwhale.train.base import MuonClipArguments
from moonwhale.train.trainer import MTPTraining


@dataclass
class MTPSFTConfig(MuonClipArguments, SFTConfig):
    """SFTConfig and what MuonClip and MTP add to it."""


class MTPSFTTrainer(MTPTraining, SFTTrainer):
    """Fine-tunes on a data set of {"input_ids", "labels"}, a conversation each, which TRL packs.

    The loss is the model's own, with MTP and balance, on the labels that are not -100: what the assistant wrote.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # TRL's collator would lay all rows of a batch end to end, whose attention costs the square of that length.
        self.data_collator = Collator(self.args.max_length, self.processing_class.pad_token_id)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL would write a README.md into the run's folder."""


@dataclass
class Collator:
    """Packed rows to tensors (B, context): position ids restart at every conversation, the last of which is padding.

    A row that TRL packed has `seq_lengths`, the lengths of its conversations; one that it did not is one conversation.
    """

    context: int
    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return {name: torch.stack(column) for name, column in self._columns(rows).items()}

    def _columns(self, rows: list[dict]) -> dict[str, list[torch.Tensor]]:
        columns = {"input_ids": [], "position_ids": [], "labels": []}
        for row in rows:
            missing = self.context - len(row["input_ids"])
            lengths = [*(row.get("seq_lengths") or [len(row["input_ids"])]), missing]
            columns["input_ids"].append(torch.tensor([*row["input_ids"], *[self.pad_token_id] * missing]))
            columns["position_ids"].append(torch.cat([torch.arange(n) for n in lengths]))
            columns["labels"].append(torch.tensor([*row["labels"], *[IGNORE] * missing]))
        return columns
