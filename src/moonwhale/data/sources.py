"""Where text comes from: files, folders, globs, hub data sets, and two built-ins that every installation has."""

import gzip
import hashlib
import importlib.util
import json
import logging
import lzma
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from moonwhale.errors import UserError, one_line

log = logging.getLogger(__name__)

Document = str | list[dict]  # text, or chat messages {"role": one of ROLES, "content": str}
ROLES = ("system", "user", "assistant")

TABLES = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
# What is written like owner/name, but is a mistyped file: asking the hub for it would take long and tell little.
FILE_SUFFIXES = {*TABLES, *OPENERS, ".txt", ".md", ".py", ".json"}
HUB_SET = r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?"
CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text", "content")
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def texts_of(document: Document) -> list[str]:
    """The text or, of a chat, each message's."""
    return [document] if isinstance(document, str) else [message["content"] for message in document]


class NotText(UserError):
    """The file is not UTF-8 text."""


@dataclass(frozen=True)
class Source:
    """Documents, in a fixed order, read anew at each iteration.

    `fingerprint` changes when the documents may have changed (files: names, sizes and modification times).
    Iterating raises UserError when something cannot be read or there is no text at all; blank documents are left out.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[Document]]
    n_documents: int | None = None  # for the progress bar, blank ones included; None where only reading could tell

    def __iter__(self) -> Iterator[Document]:
        empty = True
        for document in self.read():
            if any(text.strip() for text in texts_of(document)):
                empty = False
                yield document
        if empty:
            raise UserError(f"--data: there is no text in {self.name} (it is empty, or all its documents are)")

    @property
    def slug(self) -> str:
        """The name as part of a folder's name."""
        return re.sub(r"[^\w.-]+", "-", Path(self.name).name)[:40].strip("-.") or "data"


def load_source(spec: str, split: str | None = None, columns: Sequence[str] | None = None) -> Source:
    """The source that `--data SPEC` names: "chitchat", "python", a file, a folder, a glob, or a hub data set
    `owner/name[:configuration]`.

    A text file (also .gz or .xz) is one document; of .jsonl, .csv, .parquet and hub sets each row is one.
    `columns` are the row's text columns, joined by a blank line, or its one column of messages; by default the first of
    messages, conversations, conversation, text and content that exists. `split` is for hub sets ("train" by default;
    slices such as "train[:1%]" work). Raises UserError when `spec` names nothing, or has no such split or columns.
    """
    columns = [columns] if isinstance(columns, str) else list(columns or [])
    paths = _local(spec)
    if paths is None:
        return _hub(spec, split or "train", columns)
    if split:
        raise UserError(f"--data-split {split}: only hub data sets have splits, {spec} has none")
    if columns and not any(map(_table_kind, paths)):
        raise UserError(f"--data-columns {','.join(columns)}: {spec} has no columns (.jsonl, .csv, .parquet have)")
    read = _chitchat if spec == "chitchat" else lambda: _read_files(paths, columns)
    n_documents = None if spec == "chitchat" or any(map(_table_kind, paths)) else len(paths)
    return Source(spec, _digest(columns, *map(_stamp, paths)), read, n_documents)


def _local(spec: str) -> list[Path] | None:
    """The files `spec` stands for; None when it can only be a hub data set."""
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
        raise UserError(
            f'--data: no such file or folder: {spec} (give a file, folder, glob, "chitchat", "python" or a hub '
            "data set owner/name)"
        )
    if not found:
        raise UserError(f"--data: no files in {spec}")
    return sorted(found)


def _read_files(paths: list[Path], columns: list[str]) -> Iterator[Document]:
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
        log.warning("--data: left out %d files that are not UTF-8 text, such as %s", len(skipped), skipped[0])


def _read_text(path: Path) -> str:
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"--data: cannot read {path}: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotText(f"--data: {path} is not UTF-8 text (byte {error.start} is not); convert it first") from error
    if "\0" in text:
        raise NotText(f"--data: {path} is not text but binary data (it holds zero bytes)")
    return text


def _table_kind(path: Path) -> str | None:
    return TABLES.get(Path(path.stem).suffix if path.suffix in OPENERS else path.suffix)


def _read_table(path: Path, kind: str, columns: list[str]) -> Iterator[Document]:
    import datasets

    if not path.stat().st_size:
        return
    try:
        # Streaming, since without it `datasets` would keep a second copy.
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        yield from _documents(rows, columns, str(path))
    except UserError:
        raise
    except Exception as error:  # each format's parser has its own
        raise UserError(f"--data: cannot read {path} as {kind}: {one_line(error)}") from error


def _hub(spec: str, split: str, columns: list[str]) -> Source:
    import datasets

    name, _, configuration = spec.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # not there, gated, offline, no such split or configuration: each is another class
        raise UserError(hub_reason(spec, name, one_line(error))) from error
    return Source(spec, _digest(columns, rows._fingerprint), lambda: _documents(rows, columns, spec), rows.num_rows)


def hub_reason(spec: str, name: str, message: str) -> str:
    if "scripts are no longer supported" in message:
        instead = "wikimedia/wikipedia:20231101.en" if "wikicorpus" in name else "a copy of it in Parquet"
        return f"--data: {spec} is a loading script, which the datasets library no longer runs (use {instead})"
    if "gated" in message:
        return (
            f"--data: {spec} is gated: ask for access at https://huggingface.co/datasets/{name}, "
            "then run `hf auth login` or set HF_TOKEN"
        )
    if "doesn't exist on the Hub" in message:
        return f"--data: no such file, folder or hub data set: {spec} (a private one needs `hf auth login`)"
    if "Unknown split" in message:
        return f"--data-split: {spec}: {message}"
    return f"--data: {spec} is no file or folder here, and cannot be loaded from the hub: {message}"


def _documents(rows: Iterable[dict], columns: list[str], where: str) -> Iterator[Document]:
    for row in rows:
        if not columns:
            columns = [column for column in (*CHAT_COLUMNS, *TEXT_COLUMNS) if column in row][:1]
        if not columns or not row.keys() >= set(columns):
            asked = f"no column {','.join(columns)}" if columns else "no column of messages or text"
            raise UserError(f"--data-columns: {where} has {asked}; it has {', '.join(row)}")
        values = [row[column] for column in columns if row[column] is not None]
        if all(isinstance(value, str) for value in values):
            yield "\n\n".join(values)
        elif len(columns) == 1 and isinstance(values[0], list):
            yield [_message(message, where) for message in values[0]]
        else:
            raise UserError(f"--data-columns: {','.join(columns)} of {where} is neither text nor a list of messages")


def _message(message: object, where: str) -> dict:
    """Both spellings in use: {"role", "content"} and {"from", "value"}."""
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
    role = ROLE_NAMES.get(role, role)
    if role not in ROLES or not isinstance(content, str):
        expected = f"a role ({', '.join(ROLES)}) with a text"
        raise UserError(f"--data: {where} holds a message that is not {expected}: {one_line(message)}")
    return {"role": role, "content": content}


def _chitchat_file() -> Path:
    package = importlib.util.find_spec("chitchat_dataset")
    if package is None:
        raise UserError("--data chitchat needs a package: pip install chitchat-dataset==0.9.0")
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


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
