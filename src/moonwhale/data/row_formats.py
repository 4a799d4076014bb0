"""Turns a row of a table into a document: the columns that are read, and the spellings of a conversation."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from moonwhale.data.source import ROLES, Document, SkippedRow
from moonwhale.errors import UserError, one_line

CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text", "content")
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class BadRow(Exception):
    """Says that a row cannot be read.

    `reason` has the same words for every row with the same fault, so that they can be counted. `culprit` is the value
    that cannot be read.
    """

    def __init__(self, reason: str, culprit: object):
        super().__init__(reason)
        self.reason, self.culprit = reason, culprit


def read_rows(
    rows: Iterable[dict],
    where: str,
    columns: Sequence[str] = (),
    to_document: Callable[[dict], Document | None] | None = None,
) -> Iterator[Document | SkippedRow]:
    """Yields the document of each row, or a SkippedRow.

    Args:
        where: the name of the table, for messages.
        columns: the columns to read; by default the first of CHAT_COLUMNS and TEXT_COLUMNS that the table has.
        to_document: makes a document of a row. It returns None for a row that it filters out, and may raise BadRow.
            By default, `text_or_chat` of `columns`.

    Raises:
        UserError: a column does not exist.
    """
    for number, row in enumerate(rows, 1):
        columns = columns or [column for column in (*CHAT_COLUMNS, *TEXT_COLUMNS) if column in row][:1]
        missing = [column for column in columns if column not in row]
        if missing or not columns:
            asked = f"no column {','.join(missing)}" if columns else "no column of messages or text"
            raise UserError(f"`data_columns`: {where} has {asked}; it has {', '.join(row)}")
        try:
            document = to_document(row) if to_document else text_or_chat(row, columns)
        except BadRow as bad:
            yield SkippedRow(bad.reason, f"row {number} of {where}: {one_line(bad.culprit)[:80]}")
        else:
            yield SkippedRow() if document is None else document


def text_or_chat(row: dict, columns: Sequence[str]) -> Document:
    """Joins the texts in a row's `columns` by a blank line, or reads the messages in its only column.

    Raises BadRow if the columns hold neither.
    """
    values = [row[column] for column in columns if row[column] is not None]
    if not values:
        raise BadRow("no text", row)
    if all(isinstance(value, str) for value in values):
        return "\n\n".join(values)
    if len(columns) == 1 and isinstance(values[0], list):
        return chat(values[0])
    raise BadRow(f"a {', '.join(columns)} that is neither text nor a list of messages", values)


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
    if not isinstance(content, str):
        raise BadRow("a message without text", message)
    return {"role": role, "content": content}
