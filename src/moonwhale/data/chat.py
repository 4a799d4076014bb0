"""From a document to token ids: the chat template, and where a document begins and ends."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerFast

from moonwhale.data.source import ROLES, Document
from moonwhale.errors import UserError

ROLE_TOKENS = [f"<|{role}|>" for role in ROLES]

# Everything the assistant has to produce, its end-of-message token included, stands inside `generation`, so that
# fine-tuning can put the loss on just that.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    f"{{% if message['role'] not in {ROLES} %}}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim ~ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] | trim ~ eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PIECE = 1 << 16  # characters; pieces of a long text are encoded in parallel and in bounded memory
BATCH = 256  # pieces at a time
# Rows are cut later, so a text beyond `model_max_length` is no cause for a warning.
QUIETLY = {"verbose": False, "return_attention_mask": False}


def encode_document(tokenizer: PreTrainedTokenizerFast, document: Document) -> np.ndarray:
    """Ids (n,) uint32 of one document: bos + text + eos, or the chat template's rendering of messages.

    A control token's name inside the text or a message ("<|eos|>" in a web page) is encoded as ordinary characters.
    Raises UserError when the tokenizer's chat template refuses the messages.
    """
    return encode_documents(tokenizer, [document])[0]


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[np.ndarray]:
    """`encode_document` of each, on all cores: the tokenizer's threads, which TOKENIZERS_PARALLELISM=false stops."""
    encoded: list[np.ndarray] = []
    for is_text, group in groupby(documents, key=lambda document: isinstance(document, str)):
        encoded += (_encode_texts if is_text else _encode_chats)(tokenizer, list(group))
    return encoded


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode a text to be continued: the ids that `encode_document` gives, without the final eos.

    Raises UserError if the text is not valid UTF-8.
    """
    _check_utf8(text)
    return encode_document(tokenizer, text)[:-1].tolist()


def encode_conversation(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[int]:
    """Encode a conversation to be answered: the chat template's rendering, up to where the assistant's answer begins.

    Control tokens that a user types are encoded as ordinary characters.
    Raises UserError if a message has no text, is not valid UTF-8, or if the chat template refuses the conversation.
    """
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise UserError('a chat message needs "role" and "content", both text')
        _check_utf8(message["content"])
    (ids,) = _render(tokenizer, [messages], add_generation_prompt=True)["input_ids"]
    return ids


def _check_utf8(text: str) -> None:
    """Refuse halves of surrogate pairs: they stand for bytes that were not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 text (at character {error.start})") from error


def _encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    pieces = [list(_pieces(text)) for text in texts]
    flat = [piece for of_text in pieces for piece in of_text]
    ids: list[np.ndarray] = []
    for start in range(0, len(flat), BATCH):
        batch = tokenizer(flat[start : start + BATCH], add_special_tokens=False, split_special_tokens=True, **QUIETLY)
        ids += [np.array(piece, np.uint32) for piece in batch["input_ids"]]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    remaining = iter(ids)
    return [
        np.concatenate([bos, *(next(remaining) for _ in of_text), [tokenizer.eos_token_id]]).astype(np.uint32)
        for of_text in pieces
    ]


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text after the last line end within every PIECE characters (anywhere, if there is none)."""
    start = 0
    while len(text) - start > PIECE:
        stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def encode_answers(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each conversation its ids (n,) int64, and which of them the template's generation marks enclose (n,) bool.

    Raises UserError when the tokenizer's chat template refuses a conversation.
    """
    if _forges(tokenizer, chats):  # transformers cannot sanitize and mask in one go
        return [_encode_turns(tokenizer, chat) for chat in chats]
    batch = _render(tokenizer, chats, return_assistant_tokens_mask=True)
    both = zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    return [(np.array(ids, np.int64), np.array(mask, bool)) for ids, mask in both]


def _encode_turns(tokenizer: PreTrainedTokenizerFast, chat: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """`encode_answers` of one conversation, by what each of the assistant's turns adds to the prompt before it."""
    (ids,) = _encode_chats(tokenizer, [chat])
    mask = np.zeros(len(ids), bool)
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            (prompt,) = _render(tokenizer, [chat[:i]], add_generation_prompt=True)["input_ids"]
            (turn,) = _encode_chats(tokenizer, [chat[: i + 1]])
            mask[len(prompt) : len(turn)] = True
    return ids.astype(np.int64), mask


def _encode_chats(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> list[np.ndarray]:
    return [np.array(chat, np.uint32) for chat in _render(tokenizer, chats)["input_ids"]]


def _forges(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> bool:
    """Whether a message holds a control token's name. Sanitizing takes twice as long, and hardly any batch needs it."""
    control = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))
    return any(control.search(message["content"]) for chat in chats for message in chat)


def _render(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]], **options) -> dict:
    try:
        return tokenizer.apply_chat_template(
            chats,
            sanitize_control_tokens=_forges(tokenizer, chats),
            tokenizer_kwargs=QUIETLY,
            return_dict=True,
            **options,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses a conversation: {error}") from error
