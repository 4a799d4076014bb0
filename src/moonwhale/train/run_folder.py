"""The folder of a run: what it may hold before the run starts, `run.yaml`, which replays the run, and `data.txt`."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.files import read_text, require_writable, write_whole
from moonwhale.outputs import owned
from moonwhale.processes import is_main_process
from moonwhale.yaml_files import FILE_BYTES, to_yaml

RUN_FILE = "run.yaml"
LOCK = ".lock"
DATA_FILE = "data.txt"
RECORD_BYTES = 1 << 20  # of data.txt, which holds a few lines
# A resumed run may change these options. They alter how it computes and what it reports, not what the model learns.
FREE_TO_CHANGE = {
    "out",
    "resume",
    "device",
    "gradient_checkpointing",
    "compile",
    "eval_every",
    "eval_rows",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "sample_every",
    "sample_prompt",
    "report_to",
    "parallel",
}


@contextmanager
def owned_folder(config) -> Iterator[None]:
    """Context in which this run alone owns its folder `config.out`. All its processes share it: the main one holds it.

    Raises:
        UserError: as `check_folder` does, or another process owns the folder.
    """
    if not is_main_process():
        yield
        return
    check_folder(config)  # before a file is written into it
    with owned(Path(config.out) / LOCK, config.out, "out"):
        check_folder(config)  # another run may have ended meanwhile
        yield


def check_folder(config) -> None:
    """Checks that `config.out` is a new folder, or that of the run that `config` resumes.

    Raises:
        UserError: the folder cannot be written, or holds other files, or a run that would be overwritten; or an option
            that affects training differs from that of the run to be resumed.
    """
    out, run_file = Path(config.out), Path(config.out) / RUN_FILE
    require_writable(out, "out")
    if not run_file.exists():
        if out.exists() and any(not path.name.startswith((LOCK, f".{RUN_FILE}")) for path in out.iterdir()):
            is_inside_run = (out.parent / RUN_FILE).exists()  # such as checkpoint-40
            fix = f"the run's own folder, {out.parent}" if is_inside_run else "a new or an empty folder"
            raise UserError(f"`out`: {out} holds files that are not a run's: name {fix}")
        return
    if (out / "config.json").exists() and not any(out.glob("checkpoint-*")):
        raise UserError(
            f"`out`: {out} holds a trained model without the checkpoints of its run, which therefore cannot go on, and "
            "a new run would overwrite it: name another folder"
        )
    if not config.resume:
        raise UserError(f"`out`: {out} already holds a run: go on with it by `resume`, or name another folder")
    now = options_that_affect_training(config)
    earlier = config.resolve({}, str(run_file))
    before = options_that_affect_training(earlier)
    if earlier.steps and config.steps and config.shared_steps(earlier.steps):
        del now["steps"], before["steps"]  # `resuming.find_checkpoint` finds out where the run can go on
    if name := first_difference(now, before):
        to_go_on = "leave it out, or go on from its model by `from_`" if name == "steps" else "leave it out to go on"
        raise UserError(
            f"`{name}`: {now.get(name)!r} differs from the {before.get(name)!r} that the run in {out} was started "
            f"with: {to_go_on}, or name another `out`"
        )


def first_difference(now: dict, before: dict) -> str | None:
    """The first name whose values differ, or None if all are equal. A missing value counts as None."""
    return next((name for name in now | before if now.get(name) != before.get(name)), None)


def options_that_affect_training(config, also: tuple[str, ...] = ()) -> dict:
    """The values of all options outside of `FREE_TO_CHANGE`, and of those named in `also`.

    A dict's entries are listed one by one, as FIELD.KEY.
    """
    values = {}
    for name, value in vars(config).items():
        if name in FREE_TO_CHANGE.difference(also):
            continue
        if isinstance(value, dict):
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            values[name] = value
    return values


def create(config) -> None:
    """Makes the folder `config.out` if it does not exist. The main process writes `run.yaml` into it."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if is_main_process():
        write_run_file(config, out / RUN_FILE)


def check_data_unchanged(config, what: str, contents: bytes, description: str) -> None:
    """Compares the checksum of the data with that of `data.txt` in the folder `config.out`, which a new run writes.

    Args:
        what: names the data in an error, such as "`task`: chain_sum".
        contents: bytes that differ if the data do.
        description: the lines about the data in `data.txt`.

    Raises:
        UserError: a resumed run has other data than at its start.
    """
    if not is_main_process():
        return
    record = Path(config.out) / DATA_FILE
    checksum = hashlib.sha256(contents).hexdigest()
    if not record.exists():
        write_whole(record, f"{description}\nchecksum   {checksum}\n")
        return
    fix = "bring it back, or train into another `out`"
    try:
        known = read_text(record, RECORD_BYTES)
    except UserError as error:
        raise UserError(f"{error}: {fix}") from error
    if checksum not in known:
        raise UserError(f"{what} has changed since the run in {config.out} began (see {record}): {fix}")


def write_run_file(config, path: str | os.PathLike) -> None:
    """Writes the resolved options, which `--config` replays."""
    write_whole(path, run_yaml(config))


def run_yaml(config) -> str:
    """The resolved options as YAML. The comment above them names the verb, for `verb_of` as well."""
    return to_yaml(
        resolved_options(config), f"Replay with: moonwhale {config.verb} --config THIS_FILE --out NEW_FOLDER"
    )


def verb_of(run_file: Path) -> str | None:
    """The verb whose options `run_yaml` wrote into a file, or None if the comment was removed."""
    found = re.match(r"# Replay with: moonwhale (\w+) ", read_text(run_file, FILE_BYTES))
    return found and found[1]


def resolved_options(config) -> dict:
    """All options by name. `resume` belongs to a single call and is left out."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}


def find_run_file(out: str | None) -> str | None:
    """The path of the run.yaml in the folder `out`, or None if there is none."""
    path = os.path.join(out or "", RUN_FILE)
    return path if out and os.path.exists(path) else None
