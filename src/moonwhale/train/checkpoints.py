"""Checkpoints that are either whole or not there: written aside, sealed with a manifest, then renamed; checked before
use.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from moonwhale.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def unfinished(out: str | os.PathLike) -> Path:
    """The folder in which the next checkpoint of run `out` grows; what a killed run left there is thrown away."""
    folder = Path(out) / ".unfinished"
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def publish(written: Path, final: str | os.PathLike) -> None:
    """Seals a complete checkpoint with the sizes and SHA-256 sums of its files and gives it its name, in one step."""
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(written.iterdir()) if p.is_file()
    }
    (written / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    final = Path(final)
    if final.exists():  # a damaged one that resuming skipped: kept, out of the way
        final.rename(final.with_name(f"damaged-{final.name}"))
    written.rename(final)
    shutil.rmtree(written.parent, ignore_errors=True)


def damage(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if all its files are as they were written."""
    folder = Path(checkpoint)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} is truncated: {path.stat().st_size} of {expected['bytes']} bytes"
        if _sha256(path) != expected["sha256"]:
            return f"{name} is damaged: its checksum differs"
    return None


def all_of(out: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [p for p in Path(out).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def newest(out: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run; a damaged newer one is skipped with a warning, and kept."""
    for checkpoint in all_of(out):
        if (wrong := damage(checkpoint)) is None:
            return checkpoint
        log.warning("skipping %s: %s", checkpoint, wrong)
    return None


def explain_disk(error: OSError, out: str | os.PathLike) -> Exception:
    """A full disk as one line for people; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    shutil.rmtree(Path(out) / ".unfinished", ignore_errors=True)
    have = all_of(out)
    kept = f"; the last whole checkpoint is {have[0]}, go on from it with --resume" if have else ""
    return UserError(f"--out: no space left on the disk of {out}: free some, or lower --keep-checkpoints{kept}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
