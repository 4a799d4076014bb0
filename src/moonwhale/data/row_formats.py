"""Turns a row of a table into a document: the columns that are read, and the spellings of a conversation."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from moonwhale.data.source import ROLES, Document, SkippedRow, texts_of
from moonwhale.errors import UserError, one_line, shown
from moonwhale.files import parse_json

CHAT_COLUMNS = ("messages", "conversations", "conversation")
ALPACA = ("instruction", "input", "output")
# The columns that are read by default: the first entry of which a row has all.
SHAPES = (
    *((column,) for column in CHAT_COLUMNS),
    ALPACA,
    ("text",),
    ("content",),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
KNOWN_COLUMNS = {column for shape in SHAPES for column in shape} | {"system"}
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
SPARSE_ROWS = 100  # rows of JSON, each with fields of its own, after which a column must have occurred


class BadRow(Exception):
    """Says that a row cannot be read.

    `reason` has the same words for every row with the same fault, so that they can be counted. `culprit` is the
    beginning of the value that cannot be read.
    """

    def __init__(self, reason: str, culprit: object):
        super().__init__(reason)
        self.reason, self.culprit = reason, _readable(culprit)[:80]


def read_rows(
    rows: Iterable[dict | BadRow | None],
    where: str,
    columns: Sequence[str] = (),
    to_document: Callable[[dict], Document | None] | None = None,
    sparse: bool = False,
) -> Iterator[Document | SkippedRow]:
    """Yields the document of each row, or a SkippedRow.

    Args:
        rows: a BadRow in place of a row that cannot be parsed, and None for a blank line, which counts as a number.
        where: the name of the table, for messages.
        columns: the columns to read; by default the first of SHAPES that the row has.
        to_document: makes a document of a row. It returns None for a row that it filters out, and may raise BadRow.
            By default, `document_of` the `columns`.
        sparse: whether a row may lack columns that other rows have, as in JSON.

    Raises:
        UserError: a column does not exist.
    """
    seen: dict[str, None] = {}
    n_rows = 0
    for number, row in enumerate(rows, 1):
        if row is None:
            continue
        try:
            if isinstance(row, BadRow):
                raise row
            n_rows += 1
            seen.update(dict.fromkeys(row))
            if n_rows == (SPARSE_ROWS if sparse else 1):
                _check_columns(seen, where, columns)
            document = to_document(row) if to_document else document_of(row, columns)
            _check_unicode(document)
        except BadRow as bad:
            yield SkippedRow(bad.reason, f"row {number} of {where}: {bad.culprit}")
        else:
            yield SkippedRow() if document is None else document
    if n_rows:
        _check_columns(seen, where, columns)


def _check_columns(seen: dict[str, None], where: str, columns: Sequence[str]) -> None:
    """Raises UserError if no row so far had one of the columns."""
    missing = [column for column in columns if column not in seen]
    if missing or not (columns or columns_of(seen)):
        asked = f"no column {','.join(missing)}" if columns else "no column of messages or text"
        names = ", ".join(islice(map(str, seen), 100))
        raise UserError(f"`data_columns`: {where} has {asked}; it has {_readable(names)}")


def _check_unicode(document: Document | None) -> None:
    """Raises BadRow for half of a surrogate pair: an escape without its other half, or a byte that is not UTF-8."""
    for text in texts_of(document or ""):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(error.start - 20, 0) : error.start + 20]
            raise BadRow("text that is not valid UTF-8", ascii(around)) from None


def _readable(value: object) -> str:
    """Returns the beginning of a text, or of another value, in one line."""
    text = value[:1000] if isinstance(value, str) else shown(value)
    return one_line(text).encode("utf-8", "backslashreplace").decode()


def columns_of(row: Iterable[str]) -> tuple[str, ...]:
    """Returns the columns that are read by default: the first of SHAPES of which `row` has all, or ()."""
    return next((shape for shape in SHAPES if all(column in row for column in shape)), ())


def document_of(row: dict, columns: Sequence[str] = ()) -> Document:
    """Makes a document of a row: of `columns`, or by default of the first of SHAPES that it has.

    Raises BadRow if the columns hold neither text nor messages.
    """
    if columns:
        return text_or_chat(row, columns)
    shape = columns_of(row)
    document = text_or_chat(row, shape) if len(shape) < 2 else _exchange(row, shape)
    system = row.get("system")
    if isinstance(document, list) and isinstance(system, str) and system.strip() and document[0]["role"] != "system":
        return [{"role": "system", "content": system}, *document]
    return document


def text_or_chat(row: dict, columns: Sequence[str]) -> Document:
    """Joins the texts in a row's `columns` by a blank line, or reads the messages in its only column.

    Raises BadRow if the columns hold neither.
    """
    values = [row[column] for column in columns if row.get(column) is not None]
    if not values:
        raise BadRow("no text", row)
    if len(columns) == 1 and columns[0] in CHAT_COLUMNS and isinstance(values[0], str):
        values = [_parsed(values[0])]
    if all(isinstance(value, str) for value in values):
        return "\n\n".join(values)
    if len(columns) == 1 and isinstance(values[0], list):
        return chat(values[0])
    raise BadRow(f"a {', '.join(columns)} that is neither text nor a list of messages", values)


def _parsed(value: str) -> object:
    """Parses messages that were written as JSON into one field, as in a .csv file. Returns other text as it is.

    Raises BadRow if they hold too many values, or too many inside one another.
    """
    if not value.lstrip().startswith("[{"):
        return value
    try:
        return parse_json(value)
    except json.JSONDecodeError:
        return value
    except (ValueError, RecursionError) as error:
        raise BadRow("messages that cannot be read", f"{one_line(error)}: {value[:40]}") from error


def _exchange(row: dict, shape: tuple[str, ...]) -> list[dict]:
    """Reads a question and its answer: two texts, or two lists of messages. Alpaca's input follows the instruction."""
    *asked, answer = (row[column] for column in shape)
    if isinstance(answer, list):
        return chat([*(asked[0] if isinstance(asked[0], list) else [{"role": "user", "content": asked[0]}]), *answer])
    if len(asked) == 1 and isinstance(asked[0], list):
        return chat([*asked[0], {"role": "assistant", "content": answer}])
    texts = [text for text in asked if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"a {', '.join(shape)} that is neither text nor a list of messages", texts)
    question = "\n\n".join(text for text in texts if text.strip())
    return chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def chat(messages: object) -> list[dict]:
    """Reads a list of messages in either common spelling: {"role", "content"} or {"from", "value"}.

    The first message may be the system's; a blank one is dropped. Then user and assistant take turns, the user first.

    Returns:
        the messages as {"role", "content"}.

    Raises:
        BadRow: `messages` has another form, or a message of the user or the assistant is blank.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("no conversation", messages)
    found = [_message(message) for message in messages]
    roles = [message["role"] for message in found]
    turns = found[1:] if roles[0] == "system" else found
    alternating = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or [message["role"] for message in turns] != alternating:
        raise BadRow("user and assistant not in turn", f"{', '.join(roles)}")
    if blank := [message for message in turns if not message["content"].strip()]:
        raise BadRow("a blank message", blank[0])
    return found if found[0]["content"].strip() else turns


def _message(message: object) -> dict:
    fields = message if isinstance(message, dict) else {}
    # A table that mixes the two spellings gives every message all four fields, with null for those it lacks.
    role = fields.get("from") if fields.get("role") is None else fields["role"]
    content = fields.get("value") if fields.get("content") is None else fields["content"]
    role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"a role other than {', '.join(ROLES)}", message)
    if fields.get("tool_calls") or fields.get("function_call"):
        raise BadRow("a call of a tool", message)
    if isinstance(content, list):
        content = _joined_parts(content)
    if not isinstance(content, str):
        raise BadRow("a message without text", message)
    thought = next((fields[name] for name in THOUGHTS if isinstance(fields.get(name), str)), "")
    if role == "assistant" and thought.strip():
        content = f"<think>{thought.strip()}</think>\n{content}"
    return {"role": role, "content": content}


def _joined_parts(parts: list) -> str:
    """Joins the texts of a message that is a list of parts. Raises BadRow for an image or another part."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise BadRow("a part of a message that is not text", part)
    return "".join(part["text"] for part in parts)
