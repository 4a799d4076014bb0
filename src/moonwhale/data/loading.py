"""Where text comes from: files, folders, globs, hub data sets, two built-ins that every installation has, mixtures."""

import gzip
import importlib.util
import json
import logging
import lzma
import re
import sysconfig
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

from moonwhale.data.hub import load_hub
from moonwhale.data.hub_sets import SETS
from moonwhale.data.mixture import mix, parse_mixture
from moonwhale.data.row_formats import read_rows
from moonwhale.data.source import Document, LeftOut, Source, digest
from moonwhale.data.tasks import demonstrations
from moonwhale.errors import UserError, did_you_mean, one_line

log = logging.getLogger(__name__)

TABLES = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
# What is written like owner/name, but is a mistyped file: asking the hub for it would take long and tell little.
FILE_SUFFIXES = {*TABLES, *OPENERS, ".txt", ".md", ".py", ".json"}
HUB_SET = r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?"


class NotText(UserError):
    """The file is not UTF-8 text."""


def load_source(
    spec: str, split: str | None = None, columns: Sequence[str] | None = None, limit: int | None = None
) -> Source:
    """The source that `--data SPEC` names: "chitchat", "python", a file, a folder, a glob, a hub data set by its name
    in `hub_sets.SETS` or as `owner/name`, both perhaps with `:configuration`, right answers to the questions of a task
    as `task:SPEC` (see `load_task`), or a mixture (see `parse_mixture`).

    A text file (also .gz or .xz) is one document; of .jsonl, .csv, .parquet and hub sets each row is one.
    `columns` are the row's text columns, joined by a blank line, or its one column of messages; by default the first of
    messages, conversations, conversation, text and content that exists. `split` is for hub sets ("train" by default;
    slices such as "train[:1%]" work). Of a mixture, `split` and `columns` concern those parts that have any. After
    `limit` documents the source ends, and a hub set is streamed. Raises UserError when `spec` names nothing, or has no
    such split or columns.
    """
    columns = [columns] if isinstance(columns, str) else list(columns or [])
    if limit is not None and limit < 1:
        raise UserError(f"`data_documents` {limit}: read at least 1")
    one_task = spec.startswith("task:") and "," not in spec  # whose settings look like weights
    weights = {} if one_task else parse_mixture(spec)
    paths = {part: _local(part) for part in weights or [spec]}
    if split and None not in paths.values():
        raise UserError(f"`data_split` {split}: only hub data sets have splits, {spec} has none")
    if columns and not any(_has_columns(*part) for part in paths.items()):
        known = SETS.get(spec.partition(":")[0])
        why = f"is read by its own (name {known.id} to choose)" if known else "has no columns (tables and hub sets do)"
        raise UserError(f"`data_columns` {','.join(columns)}: {spec} {why}")
    sources = [
        demonstrations(part, limit)
        if part.startswith("task:")
        else load_hub(part, split or "train", columns, limit)
        if files is None
        else _files(part, files, columns, limit)
        for part, files in paths.items()
    ]
    return mix(spec, sources, list(weights.values()), limit) if weights else sources[0]


def _has_columns(spec: str, paths: list[Path] | None) -> bool:
    return spec.partition(":")[0] not in SETS if paths is None else any(map(_table_kind, paths))


def _files(spec: str, paths: list[Path], columns: list[str], limit: int | None) -> Source:
    tables = any(map(_table_kind, paths))
    read = _chitchat if spec == "chitchat" else lambda: _read_files(paths, columns)
    n_documents = limit if spec == "chitchat" or tables else min(len(paths), limit or len(paths))
    return Source(spec, digest(columns, limit, *map(_stamp, paths)), read, n_documents, limit)


def _local(spec: str) -> list[Path] | None:
    """The files `spec` stands for; None when it can only be a hub data set."""
    if spec.partition(":")[0] in SETS:
        return None
    if spec.startswith("task:"):
        return []
    if spec == "chitchat":
        return [_chitchat_file()]
    if spec == "python":
        return _standard_library()
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        found = [path / file for file in inside if not any(part.startswith(".") for part in file.parts)]
    elif re.search(r"[*?\[]", spec):
        found = [Path(file) for file in glob(str(path), recursive=True) if Path(file).is_file()]
    elif re.fullmatch(HUB_SET, spec) and not path.parent.is_dir() and path.suffix not in FILE_SUFFIXES:
        return None
    else:
        near = did_you_mean(spec.partition(":")[0], ["chitchat", "python", *SETS])
        raise UserError(
            f"`data`: no such file or folder: {spec}{near} (give a file, a folder, a glob, a hub data set owner/name, "
            f"or one of chitchat, python, {', '.join(SETS)})"
        )
    if not found:
        raise UserError(f"`data`: no files in {spec}")
    return sorted(found)


def _read_files(paths: list[Path], columns: list[str]) -> Iterator[Document | LeftOut]:
    skipped = []
    for path in paths:
        if kind := _table_kind(path):
            yield from _read_table(path, kind, columns)
            continue
        try:
            yield _read_text(path)
        except NotText:
            # One file was meant; a folder may well hold pictures beside its text.
            if len(paths) == 1:
                raise
            skipped.append(path)
    if skipped:
        log.warning("`data`: left out %d files that are not UTF-8 text, such as %s", len(skipped), skipped[0])


def _read_text(path: Path) -> str:
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"`data`: cannot read {path}: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotText(f"`data`: {path} is not UTF-8 text (byte {error.start} is not); convert it first") from error
    if "\0" in text:
        raise NotText(f"`data`: {path} is not text but binary data (it holds zero bytes)")
    return text


def _table_kind(path: Path) -> str | None:
    return TABLES.get(Path(path.stem).suffix if path.suffix in OPENERS else path.suffix)


def _read_table(path: Path, kind: str, columns: list[str]) -> Iterator[Document | LeftOut]:
    import datasets

    if not path.stat().st_size:
        return
    try:
        # Streaming, since without it `datasets` would keep a second copy.
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        yield from read_rows(rows, str(path), columns)
    except UserError:
        raise
    except Exception as error:  # each format's parser has its own
        raise UserError(f"`data`: cannot read {path} as {kind}: {one_line(error)}") from error


def _chitchat_file() -> Path:
    package = importlib.util.find_spec("chitchat_dataset")
    if package is None:
        raise UserError("`data` chitchat needs a package: pip install chitchat-dataset==0.9.0")
    return Path(package.submodule_search_locations[0]) / "dataset.json"


def _chitchat() -> Iterator[Document]:
    """Conversations of at least four turns between exactly two people, the first of whom becomes the user."""
    for conversation in json.loads(_chitchat_file().read_bytes()).values():
        turns = conversation["messages"]
        senders = list(dict.fromkeys(utterance["sender"] for turn in turns for utterance in turn))
        if len(senders) != 2 or len(turns) < 4:
            continue
        messages: list[dict] = []
        for turn in turns:
            role = ("user", "assistant")[senders.index(turn[0]["sender"])]
            text = "\n".join(utterance["text"].strip() for utterance in turn if utterance["text"].strip())
            if not text:
                continue
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += f"\n{text}"
            else:
                messages.append({"role": role, "content": text})
        yield messages


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    other = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if other.isdisjoint(path.relative_to(root).parts))


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns
