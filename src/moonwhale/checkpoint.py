"""Checkpoint folders: opens, finds and publishes them. This is the only module that does.

A checkpoint folder holds config.json, model.safetensors and the tokenizer. A run's own, `checkpoint-STEP` in its
folder, also hold the optimizer's state and a manifest with the checksums of all files (see manifest.py).
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from moonwhale.data.tokenizer import load_tokenizer_folder
from moonwhale.errors import UserError, one_line, shown
from moonwhale.files import read_json
from moonwhale.manifest import MANIFEST, find_damage, write_manifest
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.model.config_checks import check_token_ids, refuse_attributes
from moonwhale.model.config_fields import ConfigFields
from moonwhale.options import convert
from moonwhale.outputs import sync, sync_names
from moonwhale.weights import WEIGHTS, read_weights, weight_files

STATE = "trainer_state.json"
LOADING = (  # fields by which transformers loads a model in another way
    "transformers_weights",
    "quantization_config",
    "compression_config",
    "fusion_config",
    "per_layer_config",
    "distributed_config",
    "kernel_config",
)
MOST_ROTATIONS = 1 << 30  # bytes
STATE_BYTES = 1 << 26  # it holds the log of the whole run
UNFINISHED = ".unfinished"  # folder in a run's folder in which a checkpoint is written

log = logging.getLogger(__name__)


# Open


def open_checkpoint(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[MoonwhaleForCausalLM, PreTrainedTokenizerFast]:
    """Loads the model, on the CPU in evaluation mode with weights of `dtype`, and its tokenizer.

    Raises:
        UserError: the folder is missing, is not a moonwhale checkpoint, is damaged or incomplete, or its weights,
            configuration and tokenizer do not belong together.
    """
    folder = Path(folder)
    config = read_config(folder)
    rotations = 4 * config.max_position_embeddings * max(config.head_dim, 16)
    if rotations > MOST_ROTATIONS:  # a table that is made when the model is used, whatever the weights' sizes
        raise UserError(
            f"{folder / 'config.json'}: max_position_embeddings={config.max_position_embeddings:,} needs a table of "
            f"{rotations / 2**30:,.1f} GiB: lower it to the context that is used"
        )
    if not weight_files(folder):
        raise UserError(f"{folder} holds no weights ({WEIGHTS}){_newest_checkpoint_hint(folder)}")
    model = load_model(folder, config, dtype)
    return model, load_tokenizer_of(folder, model)


def read_config(folder: Path, overrides: dict | None = None) -> MoonwhaleConfig:
    """Reads config.json. `overrides` holds values that replace the file's.

    Raises:
        UserError: there is no readable config.json, it belongs to another kind of model, or its values are impossible.
    """
    if not folder.is_dir():
        kind = "is a file, not a checkpoint folder" if folder.exists() else "is no folder"
        raise UserError(f"{folder} {kind} (give the folder that a training run wrote with `out`)")
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise UserError(f"{folder} is not a checkpoint: it holds no config.json{_newest_checkpoint_hint(folder)}")
    values = read_json(path)
    if values.get("model_type") != MoonwhaleConfig.model_type:
        raise UserError(f"{path} is of a model of type {shown(values.get('model_type'))}, not 'moonwhale'")
    for name in LOADING:
        if values.get(name) is not None:
            raise UserError(f"{path}: leave out {name}, which a moonwhale model cannot have")
    for name, kind in ConfigFields.__annotations__.items():
        if name in values:
            convert(values[name], kind, f"{path}: {name}")
    read_generation_config(folder)
    with _impossible_values(path):
        return _copyable(MoonwhaleConfig.from_dict(values | (overrides or {})))


def load_model(folder: Path, config: MoonwhaleConfig, dtype: torch.dtype) -> MoonwhaleForCausalLM:
    """Loads the weights of a folder into a model with the given configuration.

    transformers gets the tensors, not the folder: it would follow an index to files outside, load a pickle, fetch the
    base model of an adapter, and fill missing tensors with noise.

    Raises:
        UserError: the weights are damaged, a tensor is missing, unknown or of another shape, generation_config.json is
            damaged, or config.json holds a field that transformers cannot obey.
    """
    generation, weights = read_generation_config(folder), read_weights(folder, config)
    try:
        with quiet_loading():
            model = MoonwhaleForCausalLM.from_pretrained(None, config=config, dtype=dtype, state_dict=weights)
    except Exception as error:  # transformers obeys fields that moonwhale does not declare, and some it will get later
        reason = f"{type(error).__name__}: {one_line(error)}".replace("`", "'")  # no option's name
        raise UserError(f"{folder / 'config.json'} describes a model that cannot be built ({reason})") from error
    model.name_or_path = model.config.name_or_path = str(folder)  # adapters record which model they belong to
    if generation is not None:
        model.generation_config = generation
    return model


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Reads generation_config.json; None if there is none.

    Raises:
        UserError: it is damaged, or a value is impossible.
    """
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    with _impossible_values(path):
        refuse_attributes(GenerationConfig, values.keys() - vars(GenerationConfig()).keys() - {"transformers_version"})
        check_token_ids(values)
        return _copyable(GenerationConfig.from_dict(values))


@contextmanager
def _impossible_values(path: Path) -> Iterator[None]:
    """Context that turns the error for a value in a configuration into a UserError. For one whose type or depth
    transformers does not check, it may raise anything.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path}: a value is impossible ({reason}): leave it out") from error


def _copyable(config):
    """Returns a configuration after a trial of what building and saving a model do with it."""
    config.to_dict()  # raises a RecursionError for a value that is nested too deeply
    return config


def load_tokenizer_of(folder: Path, model: MoonwhaleForCausalLM) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a folder.

    Raises:
        UserError: there is none, or its vocabulary or end token is not the model's.
    """
    if not os.path.lexists(folder / "tokenizer.json"):
        raise UserError(f"{folder} holds no tokenizer.json: copy the one that the model was trained with there")
    tokenizer = load_tokenizer_folder(folder)
    largest, size = max(tokenizer.get_vocab().values()), model.config.vocab_size
    eos = model.config.eos_token_id
    if largest >= size:
        difference = f"with ids up to {largest:,} where the model knows {size:,}"
    elif tokenizer.eos_token_id not in (eos if isinstance(eos, list) else [eos]):
        difference = f"with {tokenizer.eos_token_id} as its end token where the model has {eos}"
    else:
        return tokenizer
    raise UserError(
        f"{folder}: the tokenizer is of another vocabulary, {difference}; copy the one that the model was trained "
        "with there"
    )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Turns off transformers' progress bars and its table of missing tensors, which our one-line errors replace."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


# Find


def list_checkpoints(out: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, newest first, damaged ones included."""
    found = [path for path in Path(out).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def newest_checkpoint(out: str | os.PathLike, fits: Callable[[Path], bool] = lambda checkpoint: True) -> Path | None:
    """The newest undamaged checkpoint of a run that `fits`, or None. Warns of each damaged one that is newer."""
    for checkpoint in list_checkpoints(out):
        damage = find_damage(checkpoint)
        if damage:
            log.warning("skipping %s: %s", checkpoint, damage)
        elif fits(checkpoint):
            return checkpoint
    return None


def _newest_checkpoint_hint(folder: Path) -> str:
    """The end of an error message: the newest checkpoint of a run in `folder` that can be opened, if there is one.

    The files are not verified here, since opening the checkpoint will do so.
    """
    newest = next((path for path in list_checkpoints(folder) if (path / "config.json").is_file()), None)
    return f"; the run has not ended, its newest checkpoint is {newest} (give that)" if newest else ""


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a run's checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def read_state(checkpoint: Path) -> dict:
    """The Trainer's state in a checkpoint: `global_step`, `max_steps`, `log_history` and more.

    Raises:
        UserError: it is damaged.
    """
    path = checkpoint / STATE
    state = read_json(path, STATE_BYTES)
    steps, history = [state.get("global_step"), state.get("max_steps")], state.get("log_history")
    is_list = isinstance(history, list) and all(isinstance(entry, dict) for entry in history)
    counts = [*steps, state.get("train_batch_size") or 0]
    if not is_list or not all(type(count) is int and count >= 0 for count in counts):
        raise UserError(f"cannot read {path}: it is no state of a run; delete {checkpoint.name} to go on without it")
    return state


def n_processes(checkpoint: Path) -> int:
    """The number of processes that wrote a checkpoint. Each leaves its random state."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def log_history(checkpoint: Path) -> list[dict]:
    """The Trainer's log entries up to a checkpoint."""
    return read_state(checkpoint)["log_history"]


# Publish


def clear_unfinished(out: str | os.PathLike) -> None:
    """Removes what a killed run left half written or half deleted.

    A checkpoint that `publish_checkpoint` was replacing goes back to its place.
    """
    for replaced in Path(out, UNFINISHED, "replaced").glob("checkpoint-*"):
        if not (Path(out) / replaced.name).exists():
            replaced.rename(Path(out) / replaced.name)
    shutil.rmtree(Path(out) / UNFINISHED, ignore_errors=True)


def unfinished_folder(out: str | os.PathLike) -> Path:
    """The empty folder in which the next checkpoint of the run in `out` is written."""
    clear_unfinished(out)
    return Path(out) / UNFINISHED


def publish_checkpoint(
    written: Path,
    out: str | os.PathLike,
    keep: int | None = None,
    best: str | None = None,
    spared: Container[str] = (),
) -> None:
    """Moves the complete checkpoint `written` into the run's folder `out`, in one step.

    Before that, its manifest is written, and all of it is on the disk: a power cut leaves a whole checkpoint or none.
    Afterwards the oldest checkpoints are deleted until `keep` are left. `written` and the checkpoint `best` always
    stay. Those named in `spared` stay too and do not count.
    """
    write_manifest(written)
    sync(written)
    final, replaced = Path(out) / written.name, written.parent / "replaced" / written.name
    # A run resumes from its newest whole checkpoint, so one of this or a later step is damaged: keep it, renamed. Or it
    # is whole and of an earlier call of `Trainer.train`.
    for other in list_checkpoints(out):
        if step_of(other) >= step_of(final) and find_damage(other):
            new_name = other.with_name(f"damaged-{other.name}")
            shutil.rmtree(new_name, ignore_errors=True)
            other.rename(new_name)
    if final.exists():
        replaced.parent.mkdir()
        final.rename(replaced)
    written.rename(final)
    sync_names(final.parent)
    shutil.rmtree(replaced.parent, ignore_errors=True)
    checkpoints = [path for path in list_checkpoints(out) if path.name not in spared or path.name == final.name]
    others = [path for path in checkpoints if path.name not in (final.name, best and Path(best).name)]
    n_protected = len(checkpoints) - len(others)
    for old in others[max(keep - n_protected, 0) :] if keep else ():
        old.rename(written.parent / old.name)  # no folder that is half deleted has a checkpoint's name
    shutil.rmtree(written.parent, ignore_errors=True)


def publish_model(checkpoint: Path, out: str | os.PathLike) -> None:
    """Copies the model and the tokenizer of a checkpoint into the run's folder `out`.

    `config.json` is copied last: the folder is a plain Hugging Face checkpoint from the moment that it appears.

    Raises:
        UserError: the disk is full.
    """
    training_only = {MANIFEST, STATE}
    model_files = [p for p in checkpoint.iterdir() if p.is_file() and p.suffix not in (".pt", ".pth")]
    files = [p for p in model_files if p.name not in training_only]
    try:
        for path in sorted(files, key=lambda p: p.name == "config.json"):
            copy = Path(out) / f".{path.name}"
            shutil.copyfile(path, copy)
            sync(copy)
            if path.name == "config.json":
                sync_names(Path(out))  # the other files have their names before it has
            os.replace(copy, Path(out) / path.name)
        sync_names(Path(out))
    except OSError as error:
        copy.unlink(missing_ok=True)
        if explained := explain_full_disk(error, out):
            raise explained from error
        raise


def explain_full_disk(error: Exception, out: str | os.PathLike) -> UserError | None:
    """Returns a UserError if `error` means that the disk of `out` is full, else None.

    The unfinished checkpoint is removed, which frees its space.
    """
    # safetensors and torch raise exceptions of their own for a full disk. Those of torch do not name the cause.
    signs = ("No space left on device", "inline_container.cc", "iostream error")
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if not full and not any(sign in str(error) for sign in signs):
        return None
    shutil.rmtree(Path(out) / UNFINISHED, ignore_errors=True)
    newest = newest_checkpoint(out)
    kept = f"; {newest} is whole, go on from it with `resume`" if newest else ""
    return UserError(f"`out`: no space left on the disk of {out}: free some, or lower `keep_checkpoints`{kept}")
