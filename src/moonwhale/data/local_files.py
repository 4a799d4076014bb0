"""Finds the files that a path names: a file, a glob, a folder of texts, or a folder that holds a data set.

Two kinds of folders are data sets. `datasets.save_to_disk` writes Arrow files and their metadata. A clone of a hub
set has tables, perhaps of several splits, and a README.md, which may declare the files of each split. Of both, one
split is read, and another may be held out for evaluation.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moonwhale.data.declared_splits import README, declared_splits
from moonwhale.data.globs import WILDCARD, expand, once, walk
from moonwhale.data.opening import split_suffix
from moonwhale.data.source import warn_once
from moonwhale.data.tables import table_suffix
from moonwhale.errors import UserError, did_you_mean, shown
from moonwhale.files import read_json

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval", "evaluation"},
    "test": {"test", "testing", "heldout"},
}
IGNORED_FOLDERS = {"__pycache__"}  # of a folder; a glob that names what is in them finds it


@dataclass(frozen=True)
class Found:
    """The files that a path names.

    has_splits: whether they are one of several splits.
    held_out: the files of the split to evaluate on, if there is one.
    """

    files: list[Path]
    has_splits: bool = False
    held_out: list[Path] = field(default_factory=list)


def find_files(spec: str, split: str | None = None) -> Found | None:
    """Finds the files that a path or glob names.

    A file that several links name is read once, under its first name. Hidden files and folders are left out. A line
    reports what else of a folder is left out.

    Args:
        split: the split of a folder with splits, "train" by default.

    Returns:
        None if `spec` is neither an existing path nor a glob.

    Raises:
        UserError: there are no files, or no such split.
    """
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return _files_of_folder(path, spec, split)
    if path.is_file():
        return Found([path])
    if os.path.lexists(path):
        raise UserError(f"`data`: {spec} is a broken link, or neither a file nor a folder: name a file or a folder")
    folder, _, configuration = str(path).rpartition(":")
    if folder and Path(folder, README).is_file():
        return _declared(Path(folder), configuration, spec, split)
    if not WILDCARD.search(spec):
        return None
    base = next(folder for folder in path.parents if folder.is_dir())  # `runs[1]` may well be a folder's name
    found = once(expand(base, str(path.relative_to(base))))
    if not found:
        raise UserError(f"`data`: no files in {spec}: give a folder or glob that names some")
    return Found(found)


def _declared(folder: Path, configuration: str | None, spec: str, split: str | None) -> Found | None:
    """Returns the files of one split that the folder's README.md declares, None if it declares none.

    A file of another split is never among those to train on.
    """
    splits = declared_splits(folder, configuration, spec)
    if splits is None:
        return None
    chosen = _choose(splits, split, spec)
    others = {file for name, files in splits.items() if name != chosen for file in files}
    files = [file for file in splits[chosen] if chosen != "train" or file not in others]
    if not files:
        why = "are all in another split too" if splits[chosen] else "are not here"
        raise UserError(f"`data`: the files of the split {chosen} that {folder / README} declares {why}")
    left_out = {f"files of the split {name}": len(those) for name, those in splits.items() if name != chosen}
    _report(left_out | {"files of both": len(splits[chosen]) - len(files)}, spec)
    return Found(files, True, _held_out(splits, split))


def _held_out(splits: dict[str, list[Path]], split: str | None) -> list[Path]:
    """Returns the files to evaluate on: those of validation, else of test, unless the user asked for one split."""
    if split or "train" not in splits:
        return []
    held_out = next((name for kind in ("validation", "test") for name in splits if name in SPLITS[kind]), None)
    return splits.get(held_out, [])


def _files_of_folder(folder: Path, spec: str, split: str | None) -> Found:
    if found := _declared(folder, None, spec, split):
        return found
    if (folder / "dataset_dict.json").is_file():
        splits = _splits_of(folder)
        chosen = _choose(splits, split, spec)
        _report({f"splits ({', '.join(name for name in splits if name != chosen)})": len(splits) - 1}, spec)
        rows = {name: _saved_files(folder / name) for name in splits}
        return Found(rows[chosen], True, _held_out(rows, split))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Found(_saved_files(folder))
    left_out: Counter[str] = Counter()
    found = _choose_split(_files_below(folder, left_out), folder, spec, split, left_out)
    _report(left_out, spec)
    if not found.files:
        raise UserError(f"`data`: no files in {spec}: give a folder or glob that names some")
    return found


def _saved_files(folder: Path) -> list[Path]:
    """Returns the Arrow files of a data set that `datasets.save_to_disk` wrote, in the order of their rows."""
    path = folder / "state.json"
    entries = _metadata(path, "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for name in names:
        if not isinstance(name, str) or not _is_name(name) or not (folder / name).is_file():
            raise UserError(f"`data`: {path} names {shown(name)}, which is no file of its folder: save the set again")
    return [folder / name for name in names]


def _splits_of(folder: Path) -> list[str]:
    """Returns the splits of a dictionary of data sets that `datasets.save_to_disk` wrote."""
    path = folder / "dataset_dict.json"
    splits = _metadata(path, "splits")
    for name in splits:
        if not isinstance(name, str) or not _is_name(name):
            raise UserError(f"`data`: {path} names {shown(name)}, which is no split: save the set again")
    return splits


def _is_name(name: str) -> bool:
    """Whether a name is that of something in a folder itself, not in another one."""
    return name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def _metadata(path: Path, key: str) -> list:
    try:
        values = read_json(path).get(key)
    except UserError as error:
        raise UserError(f"`data`: {error}") from error
    if not isinstance(values, list):
        raise UserError(f"`data`: {path} has no list {key}: save the set again")
    return values


def _choose(splits: Iterable[str], split: str | None, spec: str) -> str:
    """Returns the split to read: the one asked for, else train, else the only one."""
    splits = list(splits)
    chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if chosen not in splits:
        raise UserError(
            f"`data_split` {chosen}: {spec} has only {', '.join(splits) or 'no split'}{did_you_mean(chosen, splits)}"
        )
    return chosen


def _report(left_out: dict[str, int], spec: str) -> None:
    listed = "; ".join(f"{n:,} {why}" for why, n in left_out.items() if n)
    if listed:
        warn_once(f"`data`: of {spec}, these are left out: {listed}")


def _files_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Returns the files below a folder, sorted, each once. `left_out` counts what else there is."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"`data`: cannot read {error.filename}: {error.strerror}") from error

    found = []
    for here, names in walk([folder], left_out, unreadable, IGNORED_FOLDERS):
        # A saved data set inside the folder: its metadata is no text.
        is_saved = "state.json" in names and "dataset_info.json" in names
        for file in (here / name for name in names if not name.startswith(".")):
            if is_saved and file.suffix != ".arrow":
                continue
            if file.is_file():
                found.append(file)
            else:
                left_out["broken links and special files"] += 1
    files = once(sorted(found, key=lambda file: (file.is_symlink(), file)))
    left_out["files that another link names"] += len(found) - len(files)
    return sorted(files)


def _choose_split(files: list[Path], folder: Path, spec: str, split: str | None, left_out: dict[str, int]) -> Found:
    """Returns the files of one split if the folder's tables or texts have splits, otherwise all that are data.

    A folder has splits if it has a training split and a held-out one. If its tables have splits, or it has tables
    and a README.md, it is a hub set, and what is not a table is left out.
    """
    is_json = {file: table_suffix(file) == ".json" for file in files}
    tables = [file for file in files if table_suffix(file) and (not is_json[file] or split_of(file, folder))]
    by_split: dict[str | None, list[Path]] = {}
    for file in tables or [file for file in files if split_suffix(file)[0] == ".txt"]:
        by_split.setdefault(split_of(file, folder), []).append(file)
    named = [name for name in by_split if name]
    has_splits = "train" in named and len(named) > 1
    unread: set[Path] = set()
    held_out: list[Path] = []
    if has_splits:
        chosen = _choose(named, split, spec)
        held_out = _held_out(by_split, split)
        for name, others in by_split.items():
            if name != chosen:
                left_out[f"files of {f'the split {name}' if name else 'no split'}"] = len(others)
                unread.update(others)
    if tables and (has_splits or any(file.name.lower() == "readme.md" for file in files)):
        others = set(files) - set(tables)
        left_out["files that are no tables"] = len(others)
        unread |= others
    return Found([file for file in files if file not in unread], has_splits, held_out)


def split_of(file: Path, folder: Path) -> str | None:
    """Returns the split that a file's name tells (train-00000-of-00001.parquet, wiki.test.txt), or else a folder's."""
    *folders, name = file.relative_to(folder).parts
    words = [word for word in re.findall("[a-z]+", name.lower().split(split_suffix(file)[0])[0]) if word != "of"]
    # The title of a text may well contain such a word.
    told = set(words if table_suffix(file) else words[-1:])
    for words in (told, *({part.lower()} for part in reversed(folders))):
        for split, names in SPLITS.items():
            if words & names:
                return split
    return None
