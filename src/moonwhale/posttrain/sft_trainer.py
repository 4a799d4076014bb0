"""`MTPSFTTrainer`: TRL's SFTTrainer with the whole model's loss, on conversations packed document by document."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, pack_dataset

from moonwhale.errors import UserError
from moonwhale.model.loss import IGNORE_INDEX
from moonwhale.train.mtp_trainer import MTPTrainerMixin
from moonwhale.train.muonclip_trainer import MuonClipArgumentsMixin


@dataclass
class MTPSFTConfig(MuonClipArgumentsMixin, SFTConfig):
    """SFTConfig and what MuonClip and MTP add to it."""


class MTPSFTTrainer(MTPTrainerMixin, SFTTrainer):
    """Fine-tunes on rows of `pack`. The loss is the model's own, with MTP and balance, on the labels that are not -100:
    what the assistant wrote.
    """

    def __init__(self, *args, **kwargs):
        config, tokenizer = kwargs["args"], kwargs["processing_class"]
        # TRL's collator would lay all rows of a batch end to end, whose attention costs the square of that length.
        collator = Collator(config.max_length, tokenizer.pad_token_id)
        super().__init__(*args, data_collator=collator, **kwargs)

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
            columns["labels"].append(torch.tensor([*row["labels"], *[IGNORE_INDEX] * missing]))
        return columns


def pack(conversations: datasets.Dataset, context: int) -> tuple[datasets.Dataset, int]:
    """Rows {"input_ids", "labels", "seq_lengths"} of at most `context` tokens, each with as many whole conversations as
    fit, best fit first (TRL's packing); and how many conversations were longer, and go on in another row.
    """
    cut = sum(len(ids) > context for ids in conversations["input_ids"])
    return pack_dataset(conversations, context, "bfd_split"), cut


def lora(model, rank: int, modules: Sequence[str]):
    """peft's configuration of adapters on those of the named modules that the model has."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError('`lora_rank` needs the package peft: pip install "moonwhale[rl]"') from None
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[name for name in modules if name in there])


def merge(model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the model with its adapters added in, a plain checkpoint, into `out`."""
    merged = model.merge_and_unload()
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
