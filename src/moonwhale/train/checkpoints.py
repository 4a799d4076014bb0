"""Checkpoints that are either whole or not there: written aside, sealed with a manifest, then renamed; checked before
use.
"""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path

from moonwhale.data.cache import checksum
from moonwhale.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"


def unfinished(out: str | os.PathLike) -> Path:
    """The folder in which the next checkpoint of run `out` grows, emptied of what a killed run left there."""
    folder = Path(out) / ".unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def publish(written: Path, out: str | os.PathLike, keep: int | None = None) -> None:
    """Seals the complete checkpoint `written` with the sizes and SHA-256 sums of its files and moves it into run `out`,
    in one step; of the older ones, the newest `keep - 1` stay.
    """
    files = {p.name: {"bytes": p.stat().st_size, "sha256": checksum(p)} for p in sorted(written.iterdir())}
    (written / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    final = Path(out) / written.name
    for later in all_of(out):  # damaged, else this run had gone on from them: kept, but out of the way
        if step_of(later) >= step_of(final):
            shutil.rmtree(aside := later.with_name(f"damaged-{later.name}"), ignore_errors=True)
            later.rename(aside)
    written.rename(final)
    written.parent.rmdir()
    for old in all_of(out)[keep:] if keep else ():
        shutil.rmtree(old, ignore_errors=True)


def finish(checkpoint: Path, out: str | os.PathLike) -> None:
    """Copies a checkpoint's model and tokenizer into its run's folder, which is a plain Hugging Face checkpoint from
    the moment that `config.json`, the last file, appears.
    """
    training_only = {MANIFEST, STATE}
    files = [p for p in checkpoint.iterdir() if p.suffix not in (".pt", ".pth") and p.name not in training_only]
    try:
        for path in sorted(files, key=lambda p: p.name == "config.json"):
            copy = Path(out) / f".{path.name}"
            shutil.copyfile(path, copy)
            os.replace(copy, Path(out) / path.name)
    except OSError as error:
        copy.unlink(missing_ok=True)
        raise explain_disk(error, out) from error


def history(checkpoint: Path) -> list[dict]:
    """What the run logged up to a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["log_history"]


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
        if checksum(path) != expected["sha256"]:
            return f"{name} is damaged: its checksum differs"
    return None


def all_of(out: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [p for p in Path(out).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest(out: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run; a damaged newer one is skipped with a warning."""
    for checkpoint in all_of(out):
        if (wrong := damage(checkpoint)) is None:
            return checkpoint
        log.warning("skipping %s: %s", checkpoint, wrong)
    return None


def explain_disk(error: Exception, out: str | os.PathLike) -> Exception:
    """A full disk as one line for people; any other error as it is."""
    # safetensors and torch have exceptions of their own for it, of which torch's do not say what it is.
    signs = ("No space left on device", "inline_container.cc", "iostream error")
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if not full and not any(sign in str(error) for sign in signs):
        return error
    shutil.rmtree(Path(out) / ".unfinished", ignore_errors=True)
    whole = newest(out)
    kept = f"; {whole} is whole, go on from it with --resume" if whole else ""
    return UserError(f"--out: no space left on the disk of {out}: free some, or lower --keep-checkpoints{kept}")
