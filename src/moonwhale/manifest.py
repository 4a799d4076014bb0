"""The manifest of a run's checkpoint: size and SHA-256 sum of every file, and a sum of the manifest itself.

manifest.json is {"files": {NAME: {"bytes": …, "sha256": …}}, "sha256": …}. The outer sum covers "files". Manifests of
earlier versions are the inner object alone. They have no sum, so what a checkpoint must hold is required of them here.
"""

import hashlib
import json
import os
from pathlib import Path

from moonwhale.files import checksum, read_json

MANIFEST = "manifest.json"
REQUIRED = {"trainer_state.json", "optimizer.pt", "scheduler.pt"}  # of a manifest without a sum


def write_manifest(folder: Path) -> None:
    """Lists all files that are in a folder now."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"files": files, "sha256": _sum_of(files)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def find_damage(checkpoint: str | os.PathLike) -> str | None:
    """Compares the files of a run's checkpoint with its manifest.

    Returns:
        what is wrong, in a few words, or None if all files are as they were written.
    """
    folder = Path(checkpoint)
    if not os.path.lexists(folder / MANIFEST):
        return f"{MANIFEST} is missing"
    files = _read(folder / MANIFEST)
    if files is None:
        return f"{MANIFEST} is damaged"
    for path in folder.rglob("*"):  # also those that the manifest doesn't list: opening a pipe would block
        if not (path.is_file() or path.is_dir()):
            return f"{path.relative_to(folder)} is no plain file"
    sums: dict[tuple[int, int], str] = {}  # by device and inode: many names may be links to one large file
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            status = path.stat()
            if status.st_size != size:
                return f"{name} is truncated: {status.st_size} of {size} bytes"
            file = status.st_dev, status.st_ino
            if file not in sums:
                sums[file] = checksum(path)
            if sums[file] != sha256:
                return f"{name} is damaged: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _read(path: Path) -> dict[str, tuple[int, str]] | None:
    """The size and the sum of each file that a manifest lists, by name. None if it is not as it was written."""
    try:
        values = read_json(path)
        if not isinstance(values.get("sha256"), str):
            files, whole = values, values.keys() >= REQUIRED
        else:
            files, whole = values["files"], values["sha256"] == _sum_of(values["files"])
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    possible = all(_is_inside(name) and isinstance(size, int) for name, (size, _) in listed.items())
    return listed if whole and possible else None


def _is_inside(name: str) -> bool:
    """Whether a name is one that `write_manifest` may have listed: a plain path inside the folder, spelled one way."""
    return name.isprintable() and "\\" not in name and not any(part in ("", ".", "..") for part in name.split("/"))


def _sum_of(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
