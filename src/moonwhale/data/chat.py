"""Encodes documents, prompts and answers as token ids. Owns the chat template and every prompt.

- `encode_documents`: texts and conversations for pretraining.
- `encode_prompt`: a text to be continued; `encode_conversation`: messages to be answered.
- `encode_answers`: conversations for fine-tuning, with a mask of what the assistant wrote.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _get_control_token_patterns, mark_control_tokens

from moonwhale.data.source import ROLES, Document
from moonwhale.data.templates import render_within_limits
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
    check_utf8(text)
    return encode_document(tokenizer, text)[:-1].tolist()


def encode_conversation(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[int]:
    """Encodes a conversation to be answered: the chat template's rendering, up to where the assistant's answer begins.

    The name of a control token inside a message is encoded as ordinary characters. Raises UserError if a message has no
    text or is not valid UTF-8, or if the chat template refuses the conversation.
    """
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise UserError('a chat message needs "role" and "content", both text')
        check_utf8(message["content"])
    (ids,) = _render(tokenizer, [messages], add_generation_prompt=True)["input_ids"]
    return ids


def check_utf8(text: str) -> None:
    """Raises UserError for half of a surrogate pair in a prompt, which stands for bytes that were not valid UTF-8."""
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
    control, encoded = _control_tokens(tokenizer), []
    for has_control, group in groupby(chats, key=lambda chat: _mentions(control, chat)):
        if has_control:
            encoded += [_encode_sanitized(tokenizer, chat, control) for chat in group]
            continue
        batch = _render(tokenizer, list(group), return_assistant_tokens_mask=True)
        both = zip(batch["input_ids"], batch["assistant_masks"], strict=True)
        encoded += [(np.array(ids, np.int64), np.array(mask, bool)) for ids, mask in both]
    return encoded


def _encode_sanitized(
    tokenizer: PreTrainedTokenizerFast, chat: list[dict], control: re.Pattern
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes one conversation as `encode_answers` does, with control tokens inside messages as ordinary characters.

    transformers cannot sanitize and mask in one call. Here its marks around control tokens cut the rendered text into
    pieces, and a token with a character of an answer is marked.
    """
    with _refusals():
        (text,), (answers,) = render_within_limits(
            [mark_control_tokens(chat, control)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    ids, mask = [], []
    for piece, at, is_content in _pieces(tokenizer, text):
        options = {"add_special_tokens": False, "split_special_tokens": is_content, "return_offsets_mapping": True}
        encoded = tokenizer(piece, **TOKENIZER_OPTIONS, **options)
        ids += encoded["input_ids"]
        mask += [
            any(at + first < end and begin < at + last for begin, end in answers)
            for first, last in encoded["offset_mapping"]
        ]
    return np.array(ids, np.int64), np.array(mask, bool)


def _pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> Iterator[tuple[str, int, bool]]:
    """Cuts a text at transformers' marks. Yields each piece, where it begins, and whether it is a marked token."""
    _, marks = _get_control_token_patterns(tuple(tokenizer.added_tokens_encoder))
    end = 0
    for found in marks.finditer(text):
        yield text[end : found.start()], end, False
        if found[1]:
            yield found[1], found.start(1), True
        end = found.end()
    yield text[end:], end, False


# ---- the chat template


def _render(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]], **options) -> dict:
    """Applies the chat template. Raises UserError if it refuses a conversation."""
    control = _control_tokens(tokenizer)
    with _refusals():
        return tokenizer.apply_chat_template(
            chats,
            sanitize_control_tokens=any(_mentions(control, chat) for chat in chats),
            tokenizer_kwargs=TOKENIZER_OPTIONS,
            return_dict=True,
            **options,
        )


@contextmanager
def _refusals() -> Iterator[None]:
    """Context that turns an error of the chat template into a UserError."""
    try:
        yield
    except Exception as error:  # Jinja's own, and any that a template's parser raises
        raise UserError(f"the tokenizer's chat template refuses a conversation: {one_line(error)}") from error


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern:
    """Returns a pattern of the control tokens: special ones, and those that the chat template writes."""
    with _refusals():
        return _get_control_token_patterns(tokenizer._get_control_tokens(tokenizer.get_chat_template()))[0]


def _mentions(control: re.Pattern, chat: list[dict]) -> bool:
    """Whether a message contains the name of a control token, so that the chat must be sanitized.

    Sanitizing takes twice as long, and few chats need it.
    """
    return any(control.search(message["content"]) for message in chat)
