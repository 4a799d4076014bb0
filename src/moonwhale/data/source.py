"""What a document is, and a source of them that counts what it leaves out."""

import functools
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moonwhale.errors import UserError

log = logging.getLogger(__name__)

Document = str | list[dict]  # text, or chat messages {"role": one of ROLES, "content": str}
ROLES = ("system", "user", "assistant")

MAX_BAD_SHARE = 0.05  # of a source's rows; more mean that the data, or how it is read, is wrong as a whole
ROWS_TO_JUDGE = 10_000  # after so many, a source is not read to its end to learn that


@dataclass(frozen=True)
class LeftOut:
    """Stands where a row gave no document: it cannot be read, for this reason, or (None) a filter held it back."""

    reason: str | None = None
    example: str = ""  # where the row is, and what is wrong with it


@dataclass
class Tally:
    """The rows read of one source, and which of them were left out."""

    name: str
    keeps: str = ""
    rows: int = 0
    filtered: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def count(self, row: Document | LeftOut) -> None:
        """Raises UserError once it is clear that too many rows are bad."""
        self.rows += 1
        if not isinstance(row, LeftOut):
            return
        if row.reason is None:
            self.filtered += 1
            return
        self.bad[row.reason] += 1
        self.examples.setdefault(row.reason, row.example)
        self._judge(max(self.rows, ROWS_TO_JUDGE))

    def close(self) -> None:
        """Reports what was left out, in a line for bad rows and one for filtered ones.

        Raises UserError if too many rows are bad.
        """
        self._judge(self.rows)
        if self.bad:
            reasons = "; ".join(f"{n:,} with {why} ({self.examples[why]})" for why, n in self.bad.most_common())
            say_once(f"`data`: left out {self.bad.total():,} of {self.rows:,} rows of {self.name}: {reasons}")
        if self.filtered:
            say_once(f"`data`: {self.name} keeps {self.keeps}: {self.filtered:,} of {self.rows:,} rows are not")

    def _judge(self, rows: int) -> None:
        bad = self.bad.total()
        if bad > MAX_BAD_SHARE * rows:
            ((why, _),) = self.bad.most_common(1)
            raise UserError(
                f"`data`: {bad:,} of {self.rows:,} rows of {self.name} ({bad / self.rows:.1%}) cannot be read, mostly "
                f"those with {why} ({self.examples[why]}): mend them, or read other columns or another split with "
                f"`data_columns`, `data_split` (up to {MAX_BAD_SHARE:.0%} are left out)"
            )


@dataclass(frozen=True)
class Source:
    """Documents, in a fixed order, read anew at each iteration.

    `fingerprint` changes when the documents may have changed (files: names, sizes and modification times).
    Iterating leaves out blank documents and whatever `read` marks as left out, and reports the latter at the end. It
    raises UserError when something cannot be read, too many rows are bad (see Tally), or nothing is left.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[Document | LeftOut]]
    n_documents: int | None = None  # at most, for the progress bar; None where only reading could tell
    limit: int | None = None  # documents after which it ends
    keeps: str = ""  # what a filter lets through, in words

    def __iter__(self) -> Iterator[Document]:
        tally = Tally(self.name, self.keeps)
        yield from self.documents(tally)
        tally.close()

    def documents(self, tally: Tally) -> Iterator[Document]:
        """As iterating does, but whoever asked closes the tally, so may stop earlier."""
        found = 0
        for row in self.read():
            tally.count(row)
            if isinstance(row, LeftOut) or not any(text.strip() for text in texts_of(row)):
                continue
            found += 1
            yield row
            if found == self.limit:
                return
        if not found:
            tally.close()
            reason = "none of its rows is that" if tally.filtered else "it is empty, or all its documents are"
            raise UserError(f"`data`: there is no text in {self.name} ({self.keeps and self.keeps + ': '}{reason})")

    @property
    def slug(self) -> str:
        """The name as part of a folder's name."""
        return re.sub(r"[^\w.-]+", "-", Path(self.name).name)[:40].strip("-.") or "data"


def texts_of(document: Document) -> list[str]:
    """The text or, of a chat, each message's."""
    return [document] if isinstance(document, str) else [message["content"] for message in document]


def digest(*parts: object) -> str:
    """Hex digest of values whose repr tells all of them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def say_once(line: str) -> None:
    """Logs a line that a second pass over the same data would only repeat."""
    log.warning("%s", line)
