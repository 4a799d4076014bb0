"""The model that comes with the repository, for commands that are given no checkpoint."""

import os
import sys
from pathlib import Path

from moonwhale.errors import UserError

REPOSITORY = Path(__file__).parents[2]  # where moonwhale is installed from a clone; elsewhere no repository
MODEL = Path("models/evening")
FOLDER_HELP = f"checkpoint: the folder that a run wrote with --out (of a clone: {MODEL})"


def checkpoint_or_packaged(folder: str | None) -> str:
    """Return `folder`, or if it is None the repository's model, which is named on stderr.

    The repository is the clone that moonwhale is installed from, or else the current folder.

    Raises:
        UserError: no folder is given, and the repository's model is not there.
    """
    if folder is not None:
        return folder
    for place in (REPOSITORY, Path()):
        if (place / MODEL / "config.json").is_file():
            found = os.path.relpath(place / MODEL)
            print(f"(no checkpoint is given: this is {found})", file=sys.stderr)
            return found
    is_clone = (REPOSITORY / "pyproject.toml").is_file()
    make = "make demo trains one in minutes, as runs/demo"
    if not is_clone:
        make = "train one (moonwhale train --preset demo --out runs/demo), or run this in a clone, which has a model"
    raise UserError(f"no checkpoint is given, and there is no {MODEL}: give a checkpoint's folder; {make}")
