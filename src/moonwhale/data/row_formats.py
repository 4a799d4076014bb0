"""How a row of a table becomes a document."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from moonwhale.data.source import ROLES, Document, LeftOut
from moonwhale.errors import UserError, one_line

CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text", "content")
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class BadRow(Exception):
    """A row that cannot be read: the reason, in words that are the same for all of its kind, and the culprit."""

    def __init__(self, reason: str, culprit: object):
        super().__init__(reason)
        self.reason, self.culprit = reason, culprit


def read_rows(
    rows: Iterable[dict],
    where: str,
    columns: Sequence[str] = (),
    document: Callable[[dict], Document | None] | None = None,
) -> Iterator[Document | LeftOut]:
    """A document of each row, or why there is none.

    It is what `document` makes of the row (None: filtered out; it may raise BadRow), by default `text_or_chat` of
    `columns`, by default the first of the usual ones. Raises UserError for a column that does not exist.
    """
    for number, row in enumerate(rows, 1):
        columns = columns or [column for column in (*CHAT_COLUMNS, *TEXT_COLUMNS) if column in row][:1]
        missing = [column for column in columns if column not in row]
        if missing or not columns:
            asked = f"no column {','.join(missing)}" if columns else "no column of messages or text"
            raise UserError(f"`data_columns`: {where} has {asked}; it has {', '.join(row)}")
        try:
            made = document(row) if document else text_or_chat(row, columns)
        except BadRow as bad:
            yield LeftOut(bad.reason, f"row {number} of {where}: {one_line(bad.culprit)[:80]}")
        else:
            yield LeftOut() if made is None else made


def text_or_chat(row: dict, columns: Sequence[str]) -> Document:
    """The texts in a row's `columns`, joined by a blank line, or the messages in its one column.

    Raises BadRow when they hold neither.
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
    """A list of messages as {"role", "content"}, from either spelling in use, that one or {"from", "value"}.

    The system may speak first (if it says nothing, it is left out); user and assistant follow in turn.
    Raises BadRow for anything else, and for a user or assistant who says nothing.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("no conversation", messages)
    read = [_message(message) for message in messages]
    first = 1 if read[0]["role"] == "system" else 0
    roles = [message["role"] for message in read]
    if not read[first:] or roles[first:] != [("user", "assistant")[i % 2] for i in range(len(roles) - first)]:
        raise BadRow("user and assistant not in turn", f"{', '.join(roles)}")
    if silent := [message for message in read[first:] if not message["content"].strip()]:
        raise BadRow("a blank message", silent[0])
    return read if read[0]["content"].strip() else read[1:]


def _message(message: object) -> dict:
    fields = message if isinstance(message, dict) else {}
    # A table that mixes the spellings gives every message all four fields, null where it has none.
    role = fields.get("from") if fields.get("role") is None else fields["role"]
    content = fields.get("value") if fields.get("content") is None else fields["content"]
    role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"a role other than {', '.join(ROLES)}", message)
    if not isinstance(content, str):
        raise BadRow("a message without text", message)
    return {"role": role, "content": content}
