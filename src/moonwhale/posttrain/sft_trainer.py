"""`MTPSFTTrainer`: TRL's SFTTrainer with the model's own loss, on packed rows that keep conversations apart."""

from dataclasses import dataclass
from typing import ClassVar

import datasets
import torch
from trl import SFTConfig, SFTTrainer, pack_dataset

from moonwhale.data.source import warn_once
from moonwhale.model.loss import IGNORE_INDEX
from moonwhale.train.mtp_trainer import MTPTrainerMixin
from moonwhale.train.muonclip_trainer import REFUSED, MuonClipArgumentsMixin

# Fields of SFTConfig that this trainer cannot serve, with the reason and the remedy
REFUSED_IN_SFT = {
    "loss_type": "the model's own loss has MTP and balancing; leave it at 'nll'",
    "router_aux_loss_coef": "the balance loss has its weight in the model's configuration; set aux_loss_alpha there",
    "activation_offloading": "it needs a GPU and was never run with this model; give gradient_checkpointing=True",
    "padding_free": "rows keep their documents apart by position; give packing=True",
    "pad_to_multiple_of": "rows are padded to max_length; choose a multiple as max_length",
}


@dataclass
class MTPSFTConfig(MuonClipArgumentsMixin, SFTConfig):
    """TRL's SFTConfig with the arguments of MuonClip and MTP.

    Raises:
        ValueError: a field has a value that MTPSFTTrainer cannot serve.
    """

    refused: ClassVar[dict[str, str]] = REFUSED | REFUSED_IN_SFT

    def __post_init__(self):
        super().__post_init__()
        if self.max_length is None:
            raise ValueError("max_length=None is not supported: rows are padded to it; give the longest row's length")


class MTPSFTTrainer(MTPTrainerMixin, SFTTrainer):
    """Fine-tunes on the rows of `pack`, or on conversations and texts as SFTTrainer takes them.

    The loss is the model's own, including the MTP and balance losses. It covers the labels that are not -100: what the
    assistant wrote. `MTPTrainerMixin.compute_loss` replaces SFTTrainer's, which takes the loss of the next token alone.
    """

    def __init__(self, model, args=None, data_collator=None, *more, **kwargs):
        super().__init__(model, args, data_collator, *more, **kwargs)
        if data_collator is None:
            # TRL's collator would flatten all packed rows of a batch into a single sequence, and the cost of attention
            # grows with the square of that length.
            tokenizer = self.processing_class
            padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            self.data_collator = Collator(self.args.max_length, padding)

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing. TRL would write a README.md into the run's folder with each checkpoint."""


@dataclass
class Collator:
    """Turns packed rows into tensors "input_ids", "attention_mask", "position_ids" and "labels", each (B, context).

    Position ids restart at every conversation. The mask is 0 at padding, so padding is no expert's load. A row that
    TRL packed has `seq_lengths`, the lengths of its conversations. A row without them is a single conversation, and
    every token of a row without labels is one.

    Raises:
        ValueError: a row is longer than `context`.
    """

    context: int
    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        if longest > self.context:
            raise ValueError(
                f"a row has {longest} tokens, more than max_length {self.context}: shorten it, or raise max_length"
            )
        columns = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
        for row in rows:
            n_padding = self.context - len(row["input_ids"])
            lengths = [*(row.get("seq_lengths") or [len(row["input_ids"])]), n_padding]
            columns["input_ids"].append(torch.tensor([*row["input_ids"], *[self.pad_token_id] * n_padding]))
            columns["attention_mask"].append(torch.arange(self.context).lt(len(row["input_ids"])).long())
            columns["position_ids"].append(torch.cat([torch.arange(n) for n in lengths]))
            columns["labels"].append(torch.tensor([*row.get("labels", row["input_ids"]), *[IGNORE_INDEX] * n_padding]))
        return {name: torch.stack(column) for name, column in columns.items()}


def pack(conversations: datasets.Dataset, context: int) -> tuple[datasets.Dataset, int]:
    """Packs whole conversations into rows of at most `context` tokens, by TRL's best-fit-decreasing strategy.

    Rows without a label, such as the middle of a long question, are left out: nothing could be learned from them.

    Returns:
        rows {"input_ids", "labels", "seq_lengths"}, and the number of conversations that are longer than a row and
        were split over several.
    """
    n_split = sum(len(ids) > context for ids in conversations["input_ids"])
    packed = pack_dataset(conversations, context, "bfd_split")
    labelled = [i for i, labels in enumerate(packed["labels"]) if max(labels) >= 0] if n_split else range(len(packed))
    if len(labelled) == len(packed):
        return packed, n_split
    warn_once(f"left out {len(packed) - len(labelled):,} of {len(packed):,} rows, in which the assistant says nothing")
    return packed.select(labelled), n_split
