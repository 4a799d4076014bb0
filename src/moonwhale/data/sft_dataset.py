"""Encodes conversations for fine-tuning: token ids, with labels on what the assistant wrote."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from moonwhale.data.chat import encode_answers
from moonwhale.data.packing import IGNORE_INDEX
from moonwhale.data.progress import Progress
from moonwhale.data.source import Source, warn_once
from moonwhale.data.split import document_hash, held_out_mask
from moonwhale.data.tokenizer import tokenizer_fingerprint
from moonwhale.errors import UserError
from moonwhale.files import cache_folder, cache_key, locked

FORMAT = 2  # raise it whenever the same source and tokenizer would give other rows
CONVERSATIONS_PER_BATCH = 256


def load_conversations(
    source: Source, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Returns training and held-out rows {"input_ids", "labels"}, one for each conversation.

    Conversations are encoded once and kept in the cache. The label of a token is its id where the chat template marks
    the assistant's output, end token included, and -100 elsewhere. Conversations without such a token are dropped. The
    split is that of pretraining (see `pack_split`).

    Raises:
        UserError: the source holds text instead of conversations, or fewer than two different conversations; the chat
            template has no generation marks, or refuses a conversation.
    """
    if not re.search(r"\{%-?\s*generation\b", tokenizer.chat_template or ""):
        raise UserError(
            "the tokenizer's chat template has no {% generation %} marks, which tell what the assistant wrote: put "
            "{% generation %} and {% endgeneration %} around the assistant's output in chat_template.jinja"
        )
    rows = _rows(source, tokenizer, cache_dir)
    if source.held_out:
        return tuple(part.remove_columns("hash") for part in (rows, _rows(source.held_out, tokenizer, cache_dir)))
    hashes = np.array(rows["hash"] if len(rows) else [], np.uint64)
    if len(np.unique(hashes)) < 2:
        raise UserError(f"`data`: {source.name} holds fewer than two different conversations with an answer: give more")
    held_out = held_out_mask(hashes)
    rows = rows.remove_columns("hash")
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def _rows(source: Source, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path | None) -> datasets.Dataset:
    """Returns the rows of a source, with the hash of each conversation. They are encoded once and kept in the cache."""
    key = cache_key(FORMAT, source.fingerprint, tokenizer_fingerprint(tokenizer))
    folder = cache_folder(cache_dir) / "conversations"
    try:
        with locked(folder / key):
            return datasets.Dataset.from_generator(
                lambda: _encode(source, tokenizer), cache_dir=str(folder), fingerprint=key
            )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _encode(source: Source, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict]:
    documents, n_unanswered, n_read = iter(source), 0, 0
    with Progress(f"tokenizing {source.name}", "conversations", source.n_documents) as progress:
        while batch := list(itertools.islice(documents, CONVERSATIONS_PER_BATCH)):
            if any(isinstance(document, str) for document in batch):
                raise UserError(
                    f"`data`: {source.name} holds text, not conversations: to go on training a model on text, use "
                    "moonwhale train with `from_` and `data`; or choose a column of messages by `data_columns`"
                )
            for document, (ids, is_answer) in zip(batch, encode_answers(tokenizer, batch), strict=True):
                if is_answer.any():
                    labels = np.where(is_answer, ids, IGNORE_INDEX)
                    yield {"input_ids": ids, "labels": labels, "hash": np.uint64(document_hash(document))}
                else:
                    n_unanswered += 1
            n_read += len(batch)
            progress.add(len(batch))
    if n_unanswered:
        warn_once(
            f"`data`: left out {n_unanswered:,} of {n_read:,} conversations of {source.name}, in which the assistant "
            "says nothing"
        )
    if n_unanswered == n_read:
        raise UserError(f"`data`: {source.name} holds no conversation in which the assistant says something: give some")
