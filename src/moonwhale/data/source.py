"""Defines a document and a source of documents, and counts the rows that a source skips."""

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

Document = str | list[dict]  # a text, or a chat: messages {"role": one of ROLES, "content": str}
ROLES = ("system", "user", "assistant")

MAX_BAD_SHARE = 0.05  # a larger share of bad rows means that the data, or the way it is read, is wrong as a whole
# A long source fails early: as soon as its bad rows exceed MAX_BAD_SHARE of this many rows, or of the rows read if
# those are more. A shorter one is judged at its end.
EARLY_FAILURE_ROWS = 10_000


@dataclass(frozen=True)
class SkippedRow:
    """Takes the place of the document of a row that gives none.

    `reason` says why the row cannot be read. It is None for a row that a filter rejected.
    """

    reason: str | None = None
    example: str = ""  # where the row is, and the value that cannot be read


@dataclass
class RowCounter:
    """Counts the rows read from one source, and those among them that are filtered out or bad."""

    name: str
    keeps: str = ""
    rows: int = 0
    filtered: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def count(self, row: Document | SkippedRow) -> None:
        """Counts one row. Raises UserError as soon as too many rows of a long source are bad."""
        self.rows += 1
        if not isinstance(row, SkippedRow):
            return
        if row.reason is None:
            self.filtered += 1
            return
        self.bad[row.reason] += 1
        self.examples.setdefault(row.reason, row.example)
        self._check(max(self.rows, EARLY_FAILURE_ROWS))

    def close(self) -> None:
        """Reports the skipped rows: the bad ones in one line, the filtered ones in another.

        Raises UserError if too many rows are bad.
        """
        self._check(self.rows)
        if self.bad:
            reasons = "; ".join(f"{n:,} with {why} ({self.examples[why]})" for why, n in self.bad.most_common())
            warn_once(f"`data`: skipped {self.bad.total():,} of {self.rows:,} rows of {self.name}: {reasons}")
        if self.filtered:
            warn_once(
                f"`data`: {self.name} keeps {self.keeps}: {self.filtered:,} of {self.rows:,} rows were filtered out"
            )

    def _check(self, rows: int) -> None:
        """Raises UserError if the bad rows are more than MAX_BAD_SHARE of `rows`."""
        bad = self.bad.total()
        if bad > MAX_BAD_SHARE * rows:
            ((why, _),) = self.bad.most_common(1)
            raise UserError(
                f"`data`: {bad:,} of {self.rows:,} rows of {self.name} ({bad / self.rows:.1%}) cannot be read, mostly "
                f"those with {why} ({self.examples[why]}): fix them, or choose other columns or another split by "
                f"`data_columns`, `data_split` (up to {MAX_BAD_SHARE:.0%} bad rows are skipped)"
            )


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order, which every iteration reads anew.

    Iterating skips blank documents and every SkippedRow, and reports the skipped rows at the end. It raises UserError
    if something cannot be read, if too many rows are bad (see RowCounter), or if no document is left.
    """

    name: str
    fingerprint: str  # changes when the documents may have changed (of files: names, sizes and modification times)
    read: Callable[[], Iterator[Document | SkippedRow]]
    n_documents: int | None = None  # an upper bound for the progress bar; None if only reading can tell
    limit: int | None = None  # the source ends after this many documents
    keeps: str = ""  # describes what a filter lets through
    held_out: "Source | None" = None  # documents to evaluate on, which are not among its own

    def __iter__(self) -> Iterator[Document]:
        counter = RowCounter(self.name, self.keeps)
        yield from self.documents(counter)
        counter.close()

    def documents(self, counter: RowCounter) -> Iterator[Document]:
        """Iterates like the source itself, but leaves closing `counter` to the caller, who may stop early."""
        found = 0
        for row in self.read():
            counter.count(row)
            if isinstance(row, SkippedRow) or not any(text.strip() for text in texts_of(row)):
                continue
            found += 1
            yield row
            if found == self.limit:
                return
        if not found:
            counter.close()
            if counter.filtered:
                reason = f"it keeps only {self.keeps}, and no row is that"
            else:
                reason = "it is empty, or all its documents are blank"
            raise UserError(f"`data`: there is no text in {self.name}: {reason}")

    @property
    def slug(self) -> str:
        """The name in a form that fits into the name of a folder."""
        return re.sub(r"[^\w.-]+", "-", Path(self.name).name)[:40].strip("-.") or "data"


def texts_of(document: Document) -> list[str]:
    """Returns the text of a document, or the content of each message of a chat."""
    return [document] if isinstance(document, str) else [message["content"] for message in document]


def digest(*parts: object) -> str:
    """Returns the SHA-256 hex digest of values. The `repr` of each must describe it completely."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def warn_once(line: str) -> None:
    """Logs a warning once, although every pass over the same data repeats it."""
    log.warning("%s", line)
