"""Finds the source that `--data SPEC` names: files, folders, globs, hub sets, built-in sets, tasks and mixtures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moonwhale.data.builtin_sets import chitchat_file, read_chitchat, standard_library_files
from moonwhale.data.file_formats import READER, is_plain, read_files
from moonwhale.data.hub import load_hub_set
from moonwhale.data.hub_sets import HUB_SETS
from moonwhale.data.local_files import find_files
from moonwhale.data.mixture import mix, parse_mixture
from moonwhale.data.opening import OPENERS
from moonwhale.data.source import Source, digest
from moonwhale.data.tables import TABLES, table_suffix
from moonwhale.data.tasks import demonstration_source
from moonwhale.errors import UserError, did_you_mean

HUB_NAME = r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?"
# A name with one of these suffixes looks like owner/name on the hub, but is a mistyped file. Asking the hub about it
# would take long and end in a misleading error.
FILE_SUFFIXES = {*TABLES, *OPENERS, ".txt", ".md", ".py"}


@dataclass(frozen=True)
class Location:
    """Where the documents of one spec come from."""

    spec: str
    kind: Literal["files", "chitchat", "hub", "task"]
    files: Sequence[Path] = ()
    has_splits: bool = False
    held_out: Sequence[Path] = ()

    @property
    def has_columns(self) -> bool:
        """Whether the user can choose columns. Hub sets with a name have columns of their own."""
        if self.kind == "hub":
            return self.spec.partition(":")[0] not in HUB_SETS
        return any(map(table_suffix, self.files))


def load_source(
    spec: str, split: str | None = None, columns: Sequence[str] | None = None, limit: int | None = None
) -> Source:
    """Returns the source that `--data SPEC` names.

    Args:
        spec: one of
            - a file, a folder or a glob. A folder whose README.md declares configurations may be followed by
              `:configuration`. A text file is one document; each row of a table (see TABLES) is one. Both may
              be compressed (see OPENERS). A path that exists is never read as a glob.
            - "chitchat" or "python", the built-in sets.
            - a hub set: a name in HUB_SETS, or `owner/name`. Both may be followed by `:configuration`.
            - `task:SPEC`: right answers to the questions of a task (see `load_task`).
            - a mixture of these, `A=0.7,B=0.3` (see `parse_mixture`).
        split: the split of a hub set or of a folder that has splits, "train" by default. Slices of a hub set such as
            "train[:1%]" work.
        columns: text columns, which are joined by a blank line, or one column of messages. By default, the first of
            row_formats.SHAPES that exists.
        limit: the source ends after this many documents, and a hub set is streamed.

    In a mixture, `split` and `columns` apply to the parts that have any.

    Raises:
        UserError: `spec` names nothing, or has no such split or columns.
    """
    columns = [columns] if isinstance(columns, str) else list(columns or [])
    if limit is not None and limit < 1:
        raise UserError(f"`data_documents` {limit}: read at least 1")
    single_task = spec.startswith("task:") and "," not in spec  # its settings, as max_terms=3, look like weights
    weights = {} if single_task else parse_mixture(spec)
    locations = [locate(part, split) for part in weights or [spec]]
    _check_options(spec, locations, split, columns)
    sources = [_open(location, split or "train", columns, limit) for location in locations]
    return mix(spec, sources, list(weights.values()), limit) if weights else sources[0]


def locate(spec: str, split: str | None = None) -> Location:
    """Finds what `spec` names, which is no mixture. Raises UserError if it can be neither files nor a hub set."""
    if not spec:  # a path's "" is the working folder
        raise UserError("`data`: it is empty: name a file, a folder or a data set")
    if spec.partition(":")[0] in HUB_SETS:
        return Location(spec, "hub", has_splits=True)
    if spec.startswith("task:"):
        return Location(spec, "task")
    if spec == "chitchat":
        return Location(spec, "chitchat", [chitchat_file()])
    if spec == "python":
        return Location(spec, "files", standard_library_files())
    if found := find_files(spec, split):
        return Location(spec, "files", found.files, found.has_splits, found.held_out)
    path = Path(spec)
    if re.fullmatch(HUB_NAME, spec) and not path.parent.is_dir() and path.suffix.lower() not in FILE_SUFFIXES:
        return Location(spec, "hub", has_splits=True)
    near = did_you_mean(spec.partition(":")[0], ["chitchat", "python", *HUB_SETS])
    raise UserError(
        f"`data`: no such file or folder: {spec}{near} (give a file, a folder, a glob, a hub data set owner/name, "
        f"or one of chitchat, python, {', '.join(HUB_SETS)})"
    )


def _check_options(spec: str, locations: list[Location], split: str | None, columns: list[str]) -> None:
    """Raises UserError for a split or columns that apply to none of the locations."""
    if split and not any(location.has_splits for location in locations):
        raise UserError(
            f"`data_split` {split}: only hub data sets and folders with train and test files have "
            f"splits, {spec} has none"
        )
    if columns and not any(location.has_columns for location in locations):
        known = HUB_SETS.get(spec.partition(":")[0])
        if known:
            why = f"has fixed columns here (use its name on the hub, {known.id}, to choose others)"
        else:
            why = "has no columns (tables and hub sets do)"
        raise UserError(f"`data_columns` {','.join(columns)}: {spec} {why}")


def _open(location: Location, split: str, columns: list[str], limit: int | None) -> Source:
    spec, kind, files = location.spec, location.kind, location.files
    if kind == "task":
        return demonstration_source(spec, limit)
    if kind == "hub":
        return load_hub_set(spec, split, columns, limit)
    # Plain text is read as ever, so that tokens made before READER was raised stay valid.
    reader = [] if kind == "chitchat" or all(map(is_plain, files)) else [READER]
    fingerprint = digest(columns, limit, *map(_file_state, files), *reader)
    if kind == "chitchat":
        return Source(spec, fingerprint, lambda: read_chitchat(files[0]), limit, limit)
    # Only reading a table tells how many documents it has.
    n_documents = limit if any(map(table_suffix, files)) else min(len(files), limit or len(files))
    held_out = None
    if location.held_out:
        held_out = _open(Location(f"{spec}, held out", "files", location.held_out), split, columns, limit)
    return Source(spec, fingerprint, lambda: read_files(files, columns), n_documents, limit, held_out=held_out)


def _file_state(path: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns
