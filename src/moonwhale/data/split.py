"""Decides which documents are held out for evaluation.

Pretraining (packing.py) and fine-tuning (sft_dataset.py) both ask here, so a conversation that pretraining holds out is
held out in fine-tuning too.
"""

import hashlib
import json

import numpy as np

from moonwhale.data.source import Document

HELD_OUT_SHARE = 0.05


def document_hash(document: Document) -> int:
    """Returns 64 bits of the BLAKE2b hash of a document's content."""
    text = document if isinstance(document, str) else json.dumps(document)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def held_out_mask(hashes: np.ndarray, share: float = HELD_OUT_SHARE) -> np.ndarray:
    """Marks the documents (n,) with a hash among the lowest `share` of all possible hashes.

    A document and its copies thus stay on one side, whatever the order, the tokenizer and the other documents are.
    `hashes` (n,) uint64 must contain at least two different ones; each side gets at least one document.
    """
    distinct = np.unique(hashes)
    limit = min(max(int(share * 2**64), int(distinct[0])), int(distinct[-2]))
    return hashes <= np.uint64(limit)
