"""Walks folders and expands globs, in bounded time: links are followed, but each folder is entered once."""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from moonwhale.errors import UserError, shown

WILDCARD = re.compile(r"[*?\[]")
MOST_NESTED = 100  # folders below the one that is walked
MOST_PARTS, MOST_CHARACTERS = 100, 4096  # of a glob; Linux allows a path 4,096 characters


def walk(
    folders: Iterable[Path],
    left_out: Counter[str],
    onerror: Callable[[OSError], None] | None = None,
    ignored: Collection[str] = (),
) -> Iterator[tuple[Path, list[str]]]:
    """Yields `folders` and all folders below them, each with the names of what else it holds.

    Hidden folders are left out. A folder itself comes before links to it, so that its files keep their own names.

    Args:
        left_out: counts the folders that another link names.
        ignored: names of folders that are left out, too.
        onerror: is called with the error if a folder cannot be read. By default, it is left out.

    Raises:
        UserError: folders are nested too deeply.
    """
    entered: set[Path] = set()

    def is_new(folder: Path) -> bool:
        real = folder.resolve()
        new = real not in entered
        entered.add(real)
        if not new:
            left_out["folders that another link names"] += 1
        return new

    for top in folders:
        if not is_new(top):
            continue
        for name, directories, names in os.walk(top, followlinks=True, onerror=onerror):
            here = Path(name)
            if len(here.parts) - len(top.parts) > MOST_NESTED:
                raise UserError(f"`data`: {top} has more than {MOST_NESTED} folders inside one another: move them up")
            kept = [d for d in sorted(directories) if not d.startswith(".") and d not in ignored]
            kept.sort(key=lambda directory: (here / directory).is_symlink())
            directories[:] = [directory for directory in kept if is_new(here / directory)]
            yield here, names


def expand(base: Path, pattern: str) -> list[Path]:
    """Returns the files below a folder that a glob names, sorted. `**` stands for any folders, or for none.

    As in a shell, only a part that begins with a period names hidden files.

    Raises:
        UserError: the pattern is too long, or as `walk` does.
    """
    parts = Path(pattern).parts or ("",)
    if len(parts) > MOST_PARTS or len(pattern) > MOST_CHARACTERS:
        limits = f"more than {MOST_PARTS} parts or {MOST_CHARACTERS:,} characters"
        raise UserError(f"`data`: the pattern {shown(pattern)} has {limits}: shorten it")
    folders = [base]
    for part in parts[:-1]:
        folders = once(path for path in _inside(folders, part) if os.path.isdir(path))
    last = _inside(folders, parts[-1])
    if parts[-1] == "**":
        last = _inside(last, "*")
    return sorted({path for path in last if os.path.isfile(path)})


def _inside(folders: Iterable[Path], part: str) -> list[Path]:
    """Returns the paths that one part of a glob names in each of `folders`, if they exist."""
    if part == "**":
        return [folder for folder, _ in walk(folders, Counter())]
    if not WILDCARD.search(part):
        return [folder / part for folder in folders]
    found = []
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue  # as the standard library's glob does
        visible = [name for name in names if part.startswith(".") or not name.startswith(".")]
        found += [folder / name for name in fnmatch.filter(visible, part)]
    return found


def once(paths: Iterable[Path]) -> list[Path]:
    """Leaves out paths that another link has named already."""
    return list({path.resolve(): path for path in reversed(list(paths))}.values())[::-1]
