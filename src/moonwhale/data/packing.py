"""Documents packed into rows of exactly `context` tokens, for training and held out.

The documents of a split are one long stream in the source's order, and row i is its tokens from i * context up to
(i + 1) * context. So nothing is dropped or truncated: a document longer than the context spans several rows, and its
position ids restart where a row does.

An item depends on its index alone, and the order of indices is the sampler's: with Trainer's (a permutation per epoch
from `data_seed`), seed, epoch and step determine every batch, which is all a resumed run needs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from moonwhale.data.loading import load_source
from moonwhale.data.shards import Shards, build_shards
from moonwhale.data.source import Source
from moonwhale.data.tokenizer import byte_lengths, load_tokenizer, trained_tokenizer
from moonwhale.errors import UserError

log = logging.getLogger(__name__)

HELD_OUT = 0.05


class PackedDataset(Dataset):
    """Rows {"input_ids", "position_ids", "labels"}, each (context,) int64.

    Position ids restart at 0 at each document. Labels are the input ids (not shifted: the model does that), with -100
    on each document's first token, which nothing before it could predict. The last row is filled up with
    `pad_token_id`, labelled -100, as a document of its own.
    """

    def __init__(
        self, shards: Shards, starts: np.ndarray, lengths: np.ndarray, n_bytes: int, context: int, pad_token_id: int
    ):
        """`starts`, `lengths` (n,): where the split's documents lie in the shards' stream, ascending."""
        self.shards, self.context, self.pad_token_id = shards, context, pad_token_id
        self.ends = np.cumsum(lengths)  # of each document, in this split's own stream
        self.begins = self.ends - lengths
        self.offsets = starts - self.begins  # from this split's stream to the shards'
        self.n_documents, self.n_tokens, self.n_bytes = len(lengths), int(self.ends[-1]), n_bytes

    def __len__(self) -> int:
        return -(-self.n_tokens // self.context)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        first = row * self.context
        at = np.arange(first, min(first + self.context, self.n_tokens))
        document = np.searchsorted(self.ends, at, side="right")
        begins = self.begins[document]
        ids = self.shards[at + self.offsets[document]]
        labels = np.where(at == begins, -100, ids)
        padding = np.arange(self.context - len(at))
        columns = {
            "input_ids": (ids, np.full_like(padding, self.pad_token_id)),
            "position_ids": (at - np.maximum(begins, first), padding),
            "labels": (labels, np.full_like(padding, -100)),
        }
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()}

    def beginning(self, document: int, n: int) -> np.ndarray:
        """The first n ids (n,) of one of the split's documents, or of a shorter one all but its end token."""
        start, end = self.begins[document], self.ends[document]
        return self.shards[np.arange(start, min(start + n, max(end - 1, start + 1))) + self.offsets[document]]


@dataclass(frozen=True)
class DataBundle:
    """What a training run needs of the data room."""

    tokenizer: PreTrainedTokenizerFast
    train: PackedDataset
    held_out: PackedDataset

    def describe(self) -> str:
        """A summary for people, several lines."""
        train, held_out = self.train, self.held_out
        tokens, n_bytes = train.n_tokens + held_out.n_tokens, train.n_bytes + held_out.n_bytes
        lines = [
            ("source", train.shards.index["source"]),
            ("vocabulary", f"{len(self.tokenizer):,} tokens"),
            ("text", f"{n_bytes:,} bytes, {n_bytes / tokens:.2f} per token"),
            *(
                (
                    name,
                    f"{part.n_documents:,} documents, {part.n_tokens:,} tokens, {len(part):,} rows of {part.context}",
                )
                for name, part in (("training", train), ("held out", held_out))
            ),
            ("where", str(train.shards.folder)),
        ]
        return "\n".join(f"{name:<11}{value}" for name, value in lines)


def build_data(
    data: str = "chitchat",
    split: str | None = None,
    columns: Sequence[str] | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    context: int = 1024,
    cache_dir: str | Path | None = None,
    verify: bool = False,
    limit: int | None = None,
) -> DataBundle:
    """From the command line's words to datasets; everything built is kept in the cache and reused.

    `tokenizer` None or "train" means one of `vocab_size` trained on the source; `limit` is in documents. Raises
    UserError (see `load_source`, `load_tokenizer`, `train_tokenizer`, `prepare`).
    """
    source = load_source(data, split, columns, limit)
    if tokenizer in (None, "train"):
        loaded = trained_tokenizer(source, vocab_size, cache_dir)
    else:
        loaded = load_tokenizer(tokenizer)
    train, held_out = prepare(source, loaded, context, cache_dir=cache_dir, verify=verify)
    return DataBundle(loaded, train, held_out)


def prepare(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    context: int,
    *,
    cache_dir: str | Path | None = None,
    held_out: float = HELD_OUT,
    verify: bool = False,
) -> tuple[PackedDataset, PackedDataset]:
    """The source's training and held-out rows, its shards built if need be (see `build_shards`).

    A document is held out when the hash of its content falls into the lowest `held_out` of all possible ones: whatever
    the order, the tokenizer and the other documents are, and with all its copies. Each side gets at least one document;
    if there is only one, its end is held out. Raises UserError for a context below 2 and for less than four tokens.
    """
    shards = _shards(source, tokenizer, context, cache_dir, verify)
    hashes = shards.documents["hash"]
    if (hashes == hashes[0]).all():
        return _split_by_position(shards, tokenizer, context, held_out)
    aside = held_out_of(hashes, held_out)
    return tuple(_packed(shards, chosen, tokenizer, context) for chosen in (~aside, aside))


def prepare_whole(
    source: Source, tokenizer: PreTrainedTokenizerFast, context: int, *, cache_dir: str | Path | None = None
) -> PackedDataset:
    """All of the source's rows, nothing held out: for a text that no model was trained on. Raises as `prepare`."""
    shards = _shards(source, tokenizer, context, cache_dir)
    return _packed(shards, np.ones(len(shards.documents), bool), tokenizer, context)


def _shards(source: Source, tokenizer, context: int, cache_dir, verify: bool = False) -> Shards:
    if context < 2:
        raise UserError(f"`context` {context}: a row needs at least 2 tokens, one to predict from the other")
    return build_shards(source, tokenizer, cache_dir, verify)


def _packed(shards: Shards, chosen: np.ndarray, tokenizer, context: int) -> PackedDataset:
    """The documents of which `chosen` (n,) bool is true."""
    documents = shards.documents
    starts = np.cumsum(documents["tokens"]) - documents["tokens"]
    n_bytes = int(documents["bytes"][chosen].sum())
    return PackedDataset(shards, starts[chosen], documents["tokens"][chosen], n_bytes, context, tokenizer.pad_token_id)


def held_out_of(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, (n,) bool, of at least two different ones; never all, never none."""
    distinct = np.unique(hashes)
    limit = min(max(int(fraction * 2**64), int(distinct[0])), int(distinct[-2]))
    return hashes <= np.uint64(limit)


def _split_by_position(
    shards: Shards, tokenizer: PreTrainedTokenizerFast, context: int, fraction: float
) -> tuple[PackedDataset, PackedDataset]:
    n_tokens = int(shards.documents["tokens"][0])
    if n_tokens < 4:
        raise UserError(f"`data`: {shards.index['source']} is too short: {n_tokens} tokens in all")
    log.warning("only one distinct document: the last %.0f %% of it is held out", 100 * fraction)
    cut = min(max(round(n_tokens * (1 - fraction)), 2), n_tokens - 2)
    n_bytes = int(shards.documents["bytes"][0])
    aside_bytes = int(byte_lengths(tokenizer)[shards[np.arange(cut, n_tokens)]].sum())
    parts = [(0, cut, n_bytes - aside_bytes), (cut, n_tokens - cut, aside_bytes)]
    return tuple(
        PackedDataset(shards, np.array([start]), np.array([length]), part_bytes, context, tokenizer.pad_token_id)
        for start, length, part_bytes in parts
    )
