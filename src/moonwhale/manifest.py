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
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} is truncated: {path.stat().st_size} of {size} bytes"
            if checksum(path) != sha256:
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
    readable = all(name.isprintable() and isinstance(size, int) for name, (size, _) in listed.items())
    return listed if whole and readable else None


def _sum_of(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
