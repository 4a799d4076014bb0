"""A source's token ids on disk: built once, checked, and memory-mapped.

A built folder holds `tokens-NNNNN.bin` (raw little-endian uint16, or uint32 for large vocabularies; SHARD_TOKENS ids
each), `documents.npy` (one record a document) and `index.json` (counts, sizes, checksums). It appears all at once.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from moonwhale.data.chat import encode_documents
from moonwhale.data.source import Document, Source, texts_of
from moonwhale.data.tokenizer import byte_lengths, fingerprint
from moonwhale.files import cache_folder, checksum, locked, new_folder

log = logging.getLogger(__name__)

FORMAT = 2  # changes whenever the same source and tokenizer would give other files
SHARD_TOKENS = 1 << 26
BATCH_CHARACTERS = 1 << 22
CHEAP_BYTES = 1 << 26  # checksums of up to this much are verified at every opening, in about 0.1 s
DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])


@dataclass(frozen=True)
class Shards:
    """A built folder, opened. `documents` (n,) DOCUMENT; picklable (workers map the files themselves)."""

    folder: Path

    @cached_property
    def index(self) -> dict:
        return json.loads((self.folder / "index.json").read_text())

    @cached_property
    def documents(self) -> np.ndarray:
        return np.load(self.folder / "documents.npy", mmap_mode="r")

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        names = [name for name in self.index["files"] if name.startswith("tokens")]
        return [np.memmap(self.folder / name, self.index["dtype"], mode="r") for name in names]

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        """The ids at ascending places (n,) of the whole stream, as int64."""
        size, ids = self.index["shard_tokens"], np.empty(len(at), np.int64)
        if len(at):
            for shard in range(at[0] // size, at[-1] // size + 1):
                here = at // size == shard
                ids[here] = self._maps[shard][at[here] % size]
        return ids

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def damage(self, thorough: bool = False) -> str | None:
        """What is wrong with the files, if anything is. Checksums are read if `thorough`, or if that is cheap."""
        try:
            files = self.index["files"]
            thorough |= sum(file["size"] for file in files.values()) <= CHEAP_BYTES
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
) -> Shards:
    """`source` in `tokenizer`'s ids: the folder built before if both are unchanged and it is undamaged, else a new one.

    Raises UserError for what cannot be read (see `load_source`) and when the disk is full.
    """
    key = hashlib.sha256(f"{FORMAT} {source.fingerprint} {fingerprint(tokenizer)}".encode()).hexdigest()[:16]
    folder = cache_folder(cache_dir) / "shards" / f"{source.slug}-{key}"
    with locked(folder):
        if folder.is_dir():
            shards = Shards(folder)
            damage = shards.damage(thorough=verify)
            if damage is None:
                return shards
            log.warning("%s is damaged (%s): building it again", folder, damage)
            shutil.rmtree(folder)
        with new_folder(folder) as building:
            _build(source, tokenizer, building)
        return Shards(folder)


def _build(source: Source, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    lengths = byte_lengths(tokenizer)
    dtype = np.dtype("<u2" if len(lengths) <= 1 << 16 else "<u4")
    records: list[tuple[int, int, int]] = []
    n_tokens = 0
    with tqdm(
        desc=f"tokenizing {source.name}", total=source.n_documents, unit=" documents", leave=False, disable=None
    ) as bar:
        for batch in _batches(source):
            encoded = encode_documents(tokenizer, batch)
            for document, ids in zip(batch, encoded, strict=True):
                records.append((len(ids), int(lengths[ids].sum()), document_hash(document)))
            stream = np.concatenate(encoded).astype(dtype)
            _append(folder, n_tokens, stream)
            n_tokens += len(stream)
            bar.update(len(batch))
            bar.set_postfix_str(f"{n_tokens / 1e6:.1f} M tokens")
    np.save(folder / "documents.npy", np.array(records, DOCUMENT))
    index = {
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "dtype": dtype.str,
        "shard_tokens": SHARD_TOKENS,
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": checksum(path)} for path in sorted(folder.iterdir())
        },
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1))


def _append(folder: Path, start: int, stream: np.ndarray) -> None:
    """Writes ids that take the places from `start` on, opening further shards as they fill up."""
    while len(stream):
        shard, used = divmod(start, SHARD_TOKENS)
        part = stream[: SHARD_TOKENS - used]
        with (folder / f"tokens-{shard:05}.bin").open("ab") as file:
            file.write(part.tobytes())
        start, stream = start + len(part), stream[len(part) :]


def _batches(source: Source) -> Iterator[list[Document]]:
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


def document_hash(document: Document) -> int:
    """64 bits of the document's content."""
    text = document if isinstance(document, str) else json.dumps(document)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
