"""Conversations for fine-tuning: token ids, and labels on what the assistant wrote."""

import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from moonwhale.data.chat import encode_answers
from moonwhale.data.packing import HELD_OUT, held_out_of
from moonwhale.data.shards import document_hash
from moonwhale.data.source import Source
from moonwhale.data.tokenizer import fingerprint
from moonwhale.errors import UserError
from moonwhale.files import cache_folder, locked

FORMAT = 1
BATCH = 256  # conversations that are encoded together
IGNORE_INDEX = -100  # as `model.loss.IGNORE_INDEX`; this room does not import `model`


def load_conversations(
    source: Source, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows {"input_ids", "labels"}, a conversation each, encoded once and kept in the cache.

    A label is the id itself where the chat template says that the assistant generates, its end token included, and
    -100 elsewhere; conversations without such a token are left out. A conversation is held out exactly if pretraining
    would hold it out.

    Raises:
        UserError: the source holds text instead of conversations, or fewer than two; the template has no generation
            marks or refuses a conversation.
    """
    if not re.search(r"\{%-?\s*generation\b", tokenizer.chat_template or ""):
        raise UserError(
            "the tokenizer's chat template has no {% generation %} marks, so what the assistant wrote cannot be told: "
            "put {% generation %} and {% endgeneration %} around it in chat_template.jinja"
        )
    key = hashlib.sha256(f"{FORMAT} {source.fingerprint} {fingerprint(tokenizer)}".encode()).hexdigest()[:16]
    folder = cache_folder(cache_dir) / "conversations"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / key):
            rows = datasets.Dataset.from_generator(
                lambda: _encode(source, tokenizer), cache_dir=str(folder), fingerprint=key
            )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    hashes = np.array(rows["hash"], np.uint64)
    if len(np.unique(hashes)) < 2:
        raise UserError(f"`data`: {source.name} holds fewer than two different conversations: give more")
    aside = held_out_of(hashes, HELD_OUT)
    rows = rows.remove_columns("hash")
    return rows.select(np.flatnonzero(~aside)), rows.select(np.flatnonzero(aside))


def _encode(source: Source, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict]:
    documents = iter(source)
    with tqdm(total=source.n_documents, desc="encoding", unit=" conversations", leave=False, disable=None) as bar:
        while batch := list(itertools.islice(documents, BATCH)):
            if any(isinstance(document, str) for document in batch):
                raise UserError(
                    f"`data`: {source.name} holds text, not conversations: fine-tuning needs a column of messages "
                    "(name it by `data_columns`), or train on text by `moonwhale train`"
                )
            for document, (ids, answered) in zip(batch, encode_answers(tokenizer, batch), strict=True):
                if answered.any():
                    labels = np.where(answered, ids, IGNORE_INDEX)
                    yield {"input_ids": ids, "labels": labels, "hash": np.uint64(document_hash(document))}
            bar.update(len(batch))
