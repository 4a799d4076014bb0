"""Encodes documents, prompts and answers as token ids. Owns the chat template and every prompt.

- `encode_documents`: texts and conversations for pretraining.
- `encode_prompt`: a text to be continued; `encode_conversation`: messages to be answered.
- `encode_answers`: conversations for fine-tuning, with a mask of what the assistant wrote.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerFast

from moonwhale.data.source import ROLES, Document
from moonwhale.errors import UserError, one_line

ROLE_TOKENS = [f"<|{role}|>" for role in ROLES]

# A long text is encoded in pieces: in parallel and in bounded memory.
PIECE_CHARACTERS = 1 << 16
PIECES_PER_BATCH = 256
# Not verbose: rows are cut later, so a text longer than `model_max_length` needs no warning.
TOKENIZER_OPTIONS = {"verbose": False, "return_attention_mask": False}


# ---- documents


def encode_document(tokenizer: PreTrainedTokenizerFast, document: Document) -> np.ndarray:
    """Returns the ids (n,) uint32 of a document: bos + text + eos, or the chat template's rendering of messages.

    The name of a control token inside a text or a message ("<|eos|>" in a web page) is encoded as ordinary characters.
    Raises UserError if the tokenizer's chat template refuses the messages.
    """
    return encode_documents(tokenizer, [document])[0]


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[np.ndarray]:
    """Encodes each document as `encode_document` does, on all cores.

    The tokenizers library starts the threads; TOKENIZERS_PARALLELISM=false in the environment prevents it.
    """
    encoded: list[np.ndarray] = []
    for is_text, group in groupby(documents, key=lambda document: isinstance(document, str)):
        encoded += (_encode_texts if is_text else _encode_chats)(tokenizer, list(group))
    return encoded


def _encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    pieces = [list(_split_pieces(text)) for text in texts]
    flat = [piece for of_text in pieces for piece in of_text]
    ids: list[np.ndarray] = []
    for start in range(0, len(flat), PIECES_PER_BATCH):
        batch = tokenizer(
            flat[start : start + PIECES_PER_BATCH],
            add_special_tokens=False,
            split_special_tokens=True,  # so that text cannot forge a control token
            **TOKENIZER_OPTIONS,
        )
        ids += [np.array(piece, np.uint32) for piece in batch["input_ids"]]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    remaining = iter(ids)
    return [
        np.concatenate([bos, *(next(remaining) for _ in of_text), [tokenizer.eos_token_id]]).astype(np.uint32)
        for of_text in pieces
    ]


def _split_pieces(text: str) -> Iterator[str]:
    """Cuts a long text after the last line end within every PIECE_CHARACTERS, or at their end if there is none."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _encode_chats(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> list[np.ndarray]:
    return [np.array(chat, np.uint32) for chat in _render(tokenizer, chats)["input_ids"]]


# ---- prompts


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encodes a text to be continued: its ids as a document, without the final eos.

    Raises UserError if the text is not valid UTF-8.
    """
    _check_utf8(text)
    return encode_document(tokenizer, text)[:-1].tolist()


def encode_conversation(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[int]:
    """Encodes a conversation to be answered: the chat template's rendering, up to where the assistant's answer begins.

    The name of a control token inside a message is encoded as ordinary characters. Raises UserError if a message has no
    text or is not valid UTF-8, or if the chat template refuses the conversation.
    """
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise UserError('a chat message needs "role" and "content", both text')
        _check_utf8(message["content"])
    (ids,) = _render(tokenizer, [messages], add_generation_prompt=True)["input_ids"]
    return ids


def _check_utf8(text: str) -> None:
    """Raises UserError for half of a surrogate pair, which stands for bytes that were not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 text (at character {error.start})") from error


# ---- answers


def encode_answers(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encodes conversations, and marks the tokens that the chat template's `generation` encloses.

    Returns:
        for each conversation, its ids (n,) int64 and the mask (n,) bool.

    Raises:
        UserError: the tokenizer's chat template refuses a conversation.
    """
    if _mentions_control_token(tokenizer, chats):  # transformers cannot sanitize and mask in one call
        return [_encode_turns(tokenizer, chat) for chat in chats]
    batch = _render(tokenizer, chats, return_assistant_tokens_mask=True)
    both = zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    return [(np.array(ids, np.int64), np.array(mask, bool)) for ids, mask in both]


def _encode_turns(tokenizer: PreTrainedTokenizerFast, chat: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes one conversation as `encode_answers` does, by comparing its prefixes before and after each answer."""
    (ids,) = _encode_chats(tokenizer, [chat])
    mask = np.zeros(len(ids), bool)
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            (before,) = _render(tokenizer, [chat[:i]], add_generation_prompt=True)["input_ids"]
            (after,) = _encode_chats(tokenizer, [chat[: i + 1]])
            mask[len(before) : len(after)] = True
    return ids.astype(np.int64), mask


# ---- the chat template


def _render(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]], **options) -> dict:
    """Applies the chat template. Raises UserError if it refuses a conversation."""
    try:
        return tokenizer.apply_chat_template(
            chats,
            sanitize_control_tokens=_mentions_control_token(tokenizer, chats),
            tokenizer_kwargs=TOKENIZER_OPTIONS,
            return_dict=True,
            **options,
        )
    except Exception as error:  # Jinja's own, and any that a template's parser raises
        raise UserError(f"the tokenizer's chat template refuses a conversation: {one_line(error)}") from error


def _mentions_control_token(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> bool:
    """Whether a message contains the name of a control token, so that the chats must be sanitized.

    Sanitizing takes twice as long, and few batches need it.
    """
    control = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))
    return any(control.search(message["content"]) for chat in chats for message in chat)
