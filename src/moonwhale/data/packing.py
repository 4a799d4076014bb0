"""Packs documents into rows of exactly `context` tokens, for training and for evaluation on held-out documents.

The documents of a split form one long stream in the source's order, and row i holds its tokens from i * context to
(i + 1) * context. Nothing is dropped or truncated: a document longer than the context spans several rows, and its
position ids restart at the beginning of each.

A row depends on its index alone, and the sampler decides the order of the indices. With the Trainer's sampler (one
permutation per epoch from `data_seed`), seed, epoch and step determine every batch, so a resumed run needs no more.
"""

import logging
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerFast

from moonwhale.data.shards import TokenShards, build_shards
from moonwhale.data.source import Source
from moonwhale.data.split import HELD_OUT_SHARE, held_out_mask
from moonwhale.data.tokenizer import byte_lengths, load_or_train_tokenizer, load_tokenizer
from moonwhale.errors import UserError

log = logging.getLogger(__name__)

IGNORE_INDEX = -100  # as `model.loss.IGNORE_INDEX`; this room does not import `model`


class PackedDataset(Dataset):
    """Rows {"input_ids", "position_ids", "labels"}, each (context,) int64.

    Position ids restart at 0 at each document. Labels are the input ids, not shifted, since the model shifts them. The
    first token of each document has no label, because nothing before it could predict it. The last row is filled up
    with the split's beginning, without labels: unlike padding, it spreads over the experts as all other text does.
    """

    def __init__(
        self,
        shards: TokenShards,
        starts: np.ndarray,
        lengths: np.ndarray,
        n_bytes: int,
        context: int,
    ):
        """Packs the documents that lie at `starts` (n,), ascending, with `lengths` (n,) in the stream of the shards.

        `n_bytes` is their length in UTF-8.
        """
        self.shards, self.context = shards, context
        self.ends = np.cumsum(lengths)  # of each document, in this split's own stream
        self.begins = self.ends - lengths
        self.offsets = starts - self.begins  # from a position in this split's stream to one in the shards'
        self.n_documents, self.n_tokens, self.n_bytes = len(lengths), int(self.ends[-1]), n_bytes

    def __len__(self) -> int:
        return -(-self.n_tokens // self.context)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        first = row * self.context
        rounds, positions = np.divmod(np.arange(first, first + self.context), self.n_tokens)
        fills = rounds > 0  # the split is over
        document = np.searchsorted(self.ends, positions, side="right")
        begins = self.begins[document]
        ids = self.shards[positions + self.offsets[document]]
        columns = {
            "input_ids": ids,
            "position_ids": positions - np.maximum(begins, np.where(fills, 0, first)),
            "labels": np.where(fills | (positions == begins), IGNORE_INDEX, ids),
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def beginning(self, document: int, n: int) -> np.ndarray:
        """Returns the first n ids (n,) of a document, or all of a shorter one but its end token."""
        start, end = self.begins[document], self.ends[document]
        return self.shards[np.arange(start, min(start + n, max(end - 1, start + 1))) + self.offsets[document]]


@dataclass(frozen=True)
class TrainingData:
    """What a pretraining run needs: the tokenizer and both splits."""

    tokenizer: PreTrainedTokenizerFast
    train: PackedDataset
    held_out: PackedDataset

    def figures(self) -> dict:
        """Returns what `describe` says, ready for JSON."""
        splits = {
            name: {"documents": s.n_documents, "tokens": s.n_tokens, "bytes": s.n_bytes, "rows": len(s)}
            for name, s in (("training", self.train), ("held_out", self.held_out))
        }
        source, folder = self.train.shards.index["source"], str(self.train.shards.folder)
        context = {"vocabulary": len(self.tokenizer), "context": self.train.context}
        return {"source": source, **context, **splits, "folder": folder}

    def describe(self) -> str:
        """Returns a summary of several lines for people to read."""
        train, held_out = self.train, self.held_out
        tokens, n_bytes = train.n_tokens + held_out.n_tokens, train.n_bytes + held_out.n_bytes
        lines = {
            "source": train.shards.index["source"],
            "vocabulary": f"{len(self.tokenizer):,} tokens",
            "text": f"{n_bytes:,} bytes, {n_bytes / tokens:.2f} per token",
        }
        for name, split in (("training", train), ("held out", held_out)):
            lines[name] = (
                f"{split.n_documents:,} documents, {split.n_tokens:,} tokens, {len(split):,} rows of {split.context}"
            )
        lines["where"] = str(train.shards.folder)
        return "\n".join(f"{name:<11}{value}" for name, value in lines.items())


def build_data(
    source: Source,
    tokenizer: str | None = None,
    *,
    vocab_size: int,
    context: int,
    cache_dir: str | Path | None = None,
    verify: bool = False,
) -> TrainingData:
    """Builds the tokenizer and both splits of a source, or reuses them from the cache.

    Args:
        tokenizer: see `load_tokenizer`. None or "train" means one of `vocab_size`, trained on the source.
        context: tokens of a row.
        cache_dir: where everything built is kept.
        verify: whether to read the checksums of large shards too.

    Raises:
        UserError: see `load_tokenizer`, `train_tokenizer` and `pack_split`.
    """
    if tokenizer in (None, "train"):
        loaded = load_or_train_tokenizer(source, vocab_size, cache_dir)
    else:
        loaded = load_tokenizer(tokenizer)
    train, held_out = pack_split(source, loaded, context, cache_dir=cache_dir, verify=verify)
    return TrainingData(loaded, train, held_out)


def pack_split(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    context: int,
    *,
    cache_dir: str | Path | None = None,
    verify: bool = False,
) -> tuple[PackedDataset, PackedDataset]:
    """Packs a source into training and held-out rows, and builds its shards if necessary (see `build_shards`).

    The documents that the source itself holds out are the second split. Without such, split.py decides which documents
    are held out. If all documents are the same, the end of the first is held out and the others are not used.

    Raises:
        UserError: the context is below 2, or the source has fewer than four tokens.
    """
    shards = _build_shards(source, tokenizer, context, cache_dir, verify)
    if source.held_out:
        aside = _build_shards(source.held_out, tokenizer, context, cache_dir, verify)
        return tuple(_pack(s, np.ones(len(s.documents), bool), context) for s in (shards, aside))
    hashes = shards.documents["hash"]
    if (hashes == hashes[0]).all():
        return _split_by_position(shards, tokenizer, context)
    held_out = held_out_mask(hashes, HELD_OUT_SHARE)
    return _pack(shards, ~held_out, context), _pack(shards, held_out, context)


def pack_all(
    source: Source, tokenizer: PreTrainedTokenizerFast, context: int, *, cache_dir: str | Path | None = None
) -> PackedDataset:
    """Packs all documents of a source, for a text on which the model was not trained. Raises as `pack_split` does."""
    if aside := source.held_out:
        source = Source(source.name, f"{source.fingerprint} and {aside.fingerprint}", partial(chain, source, aside))
    shards = _build_shards(source, tokenizer, context, cache_dir)
    return _pack(shards, np.ones(len(shards.documents), bool), context)


def choose_rows(rows: Dataset, n: int | None) -> Dataset:
    """Returns n evenly spread rows. If n is None, or there are fewer rows, it returns all."""
    if n is None or n >= len(rows):
        return rows
    return Subset(rows, torch.linspace(0, len(rows) - 1, n).long().tolist())


def _build_shards(source: Source, tokenizer, context: int, cache_dir, verify: bool = False) -> TokenShards:
    if context < 2:
        raise UserError(f"`context` {context}: a row needs at least 2 tokens, one to predict from the other")
    return build_shards(source, tokenizer, cache_dir, verify)


def _pack(shards: TokenShards, chosen: np.ndarray, context: int) -> PackedDataset:
    """Packs the documents that the mask `chosen` (n,) selects."""
    documents = shards.documents
    starts = np.cumsum(documents["tokens"]) - documents["tokens"]
    n_bytes = int(documents["bytes"][chosen].sum())
    return PackedDataset(shards, starts[chosen], documents["tokens"][chosen], n_bytes, context)


def _split_by_position(
    shards: TokenShards, tokenizer: PreTrainedTokenizerFast, context: int
) -> tuple[PackedDataset, PackedDataset]:
    """Splits the first document: its end is held out."""
    n_tokens, n_bytes = (int(shards.documents[name][0]) for name in ("tokens", "bytes"))
    if n_tokens < 4:
        raise UserError(f"`data`: {shards.index['source']} is too short: {n_tokens} tokens in all")
    log.warning("only one distinct document: its last %.0f %% is held out", 100 * HELD_OUT_SHARE)
    cut = min(max(round(n_tokens * (1 - HELD_OUT_SHARE)), 2), n_tokens - 2)  # both parts get at least two tokens
    held_out_bytes = int(byte_lengths(tokenizer)[shards[np.arange(cut, n_tokens)]].sum())
    parts = [(0, cut, n_bytes - held_out_bytes), (cut, n_tokens - cut, held_out_bytes)]
    return tuple(
        PackedDataset(shards, np.array([start]), np.array([length]), part_bytes, context)
        for start, length, part_bytes in parts
    )
