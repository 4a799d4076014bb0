"""Stores a source's token ids on disk: built once, verified by checksums, memory-mapped.

A folder holds `tokens-NNNNN.bin` (raw little-endian uint16, or uint32 for large vocabularies; SHARD_TOKENS ids each),
`documents.npy` (one DOCUMENT record per document) and `index.json` (sizes and checksums). It appears in one step, when
it is complete.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from moonwhale.data.chat import encode_documents
from moonwhale.data.progress import Progress
from moonwhale.data.source import Document, Source, texts_of
from moonwhale.data.split import document_hash
from moonwhale.data.tokenizer import byte_lengths, tokenizer_fingerprint
from moonwhale.files import cache_folder, cache_key, checksum, locked, new_folder

log = logging.getLogger(__name__)

FORMAT = 2  # raise it whenever the same source and tokenizer would give other files
SHARD_TOKENS = 1 << 26
BATCH_CHARACTERS = 1 << 22
# Up to this many bytes, checksums are verified every time the shards are opened, which takes about 0.1 s.
QUICK_CHECKSUM_BYTES = 1 << 26
DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])


@dataclass(frozen=True)
class TokenShards:
    """A built folder, opened. Its files form one stream of token ids.

    Pickling keeps only the folder's path, so that every worker process maps the files itself.
    """

    folder: Path

    @cached_property
    def index(self) -> dict:
        """The content of `index.json`."""
        return json.loads((self.folder / "index.json").read_text())

    @cached_property
    def documents(self) -> np.ndarray:
        """A DOCUMENT record for each document, (n,)."""
        return np.load(self.folder / "documents.npy", mmap_mode="r")

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        names = [name for name in self.index["files"] if name.startswith("tokens")]
        return [np.memmap(self.folder / name, self.index["dtype"], mode="r") for name in names]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the ids (n,) int64 at `positions` (n,) of the stream, in any order."""
        size, ids = self.index["shard_tokens"], np.empty(len(positions), np.int64)
        if len(positions):
            for shard in range(positions.min() // size, positions.max() // size + 1):
                inside = positions // size == shard
                ids[inside] = self._maps[shard][positions[inside] % size]
        return ids

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def find_damage(self, thorough: bool = False) -> str | None:
        """Returns what is wrong with the files, or None. Reads the checksums if `thorough`, or if that is quick."""
        try:
            files = self.index["files"]
            thorough |= sum(file["size"] for file in files.values()) <= QUICK_CHECKSUM_BYTES
            for name, expected in files.items():
                path = self.folder / name
                if path.stat().st_size != expected["size"]:
                    return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
                if thorough and checksum(path) != expected["sha256"]:
                    return f"{name} does not match its checksum"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


def build_shards(
    source: Source, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path | None = None, verify: bool = False
) -> TokenShards:
    """Tokenizes a source, or reuses the shards built before if source and tokenizer have not changed.

    Damaged shards are built again; `verify` reads all checksums, also of large shards.

    Raises:
        UserError: the source cannot be read (see `load_source`), or the disk is full.
    """
    key = cache_key(FORMAT, source.fingerprint, tokenizer_fingerprint(tokenizer))
    folder = cache_folder(cache_dir) / "shards" / f"{source.slug}-{key}"
    with locked(folder):
        if folder.is_dir():
            shards = TokenShards(folder)
            damage = shards.find_damage(thorough=verify)
            if damage is None:
                return shards
            log.warning("%s is damaged (%s): building it again", folder, damage)
            shutil.rmtree(folder)
        with new_folder(folder) as building:
            _build(source, tokenizer, building)
        return TokenShards(folder)


def _build(source: Source, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    lengths = byte_lengths(tokenizer)
    dtype = np.dtype("<u2" if len(lengths) <= 1 << 16 else "<u4")
    records: list[tuple[int, int, int]] = []
    n_tokens = 0
    with Progress(f"tokenizing {source.name}", "documents", source.n_documents) as progress:
        for batch in _batches(source):
            encoded = encode_documents(tokenizer, batch)
            for document, ids in zip(batch, encoded, strict=True):
                records.append((len(ids), int(lengths[ids].sum()), document_hash(document)))
            stream = np.concatenate(encoded).astype(dtype)
            _append(folder, n_tokens, stream)
            n_tokens += len(stream)
            progress.add(len(batch), f"{n_tokens / 1e6:.1f} M tokens")
    np.save(folder / "documents.npy", np.array(records, DOCUMENT))
    index = {
        "source": source.name,
        "dtype": dtype.str,
        "shard_tokens": SHARD_TOKENS,
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": checksum(path)} for path in sorted(folder.iterdir())
        },
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1))


def _append(folder: Path, start: int, ids: np.ndarray) -> None:
    """Writes ids to the positions from `start` on, and opens another shard whenever one is full."""
    while len(ids):
        shard, used = divmod(start, SHARD_TOKENS)
        fitting = ids[: SHARD_TOKENS - used]
        with (folder / f"tokens-{shard:05}.bin").open("ab") as file:
            file.write(fitting.tobytes())
        start, ids = start + len(fitting), ids[len(fitting) :]


def _batches(source: Source) -> Iterator[list[Document]]:
    """Groups documents into batches of about BATCH_CHARACTERS."""
    batch: list[Document] = []
    characters = 0
    for document in source:
        batch.append(document)
        characters += sum(map(len, texts_of(document)))
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
