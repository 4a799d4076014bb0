"""Opening a checkpoint folder. transformers fills missing tensors with noise and a warning; here that is an error."""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from moonwhale.data.tokenizer import load_tokenizer
from moonwhale.errors import UserError, one_line
from moonwhale.files import checksum
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.model.config_fields import ConfigFields
from moonwhale.options import convert

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
AGAIN = "save or copy the checkpoint again"
MANIFEST = "manifest.json"
STATE = "trainer_state.json"

log = logging.getLogger(__name__)


def open_checkpoint(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[MoonwhaleForCausalLM, PreTrainedTokenizerFast]:
    """The model, on the CPU in evaluation mode with weights of `dtype`, and its tokenizer.

    Raises:
        UserError: one line for a folder that is missing, is no moonwhale checkpoint, is damaged or incomplete, or whose
            weights, configuration and tokenizer do not belong together.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(f"{folder} holds no weights ({WEIGHTS[0]}){_newest(folder)}")
    model = load_model(folder, config, dtype)
    return model, load_tokenizer_of(folder, model)


def read_config(folder: Path) -> MoonwhaleConfig:
    """The configuration in a checkpoint folder; a UserError unless it is one of a moonwhale that can be."""
    if not folder.is_dir():
        kind = "is a file, not a checkpoint folder" if folder.exists() else "is no folder"
        raise UserError(f"{folder} {kind} (give the folder that a training run wrote with `out`)")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint: it holds no config.json{_newest(folder)}")
    values = read_json(folder / "config.json")
    if values.get("model_type") != MoonwhaleConfig.model_type:
        raise UserError(f"{folder}/config.json is of a model of type {values.get('model_type')!r}, not 'moonwhale'")
    for name, kind in ConfigFields.__annotations__.items():
        if name in values:
            convert(values[name], kind, f"{folder}/config.json: {name}")
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    try:
        return MoonwhaleConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:  # an impossible value, half of a RoPE setting
        raise UserError(f"{folder}/config.json: {one_line(error)}") from error


def load_model(folder: Path, config: MoonwhaleConfig, dtype: torch.dtype) -> MoonwhaleForCausalLM:
    """The weights of a folder in a model of that configuration; a UserError unless they fit it exactly."""
    try:
        with quiet():
            model, info = MoonwhaleForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with everything else
                output_loading_info=True,
            )
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: the weights are damaged or cut short ({one_line(error)}); {AGAIN}") from error
    faults = [
        *(f"{name} is missing" for name in sorted(info["missing_keys"])),
        *(f"{name} is unknown" for name in sorted(info["unexpected_keys"])),
        *(f"{name} is {_size(there)}, not {_size(wanted)}" for name, there, wanted in sorted(info["mismatched_keys"])),
        *info["error_msgs"],
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{folder}: the weights do not fit config.json: {faults[0]}{more}; {AGAIN}")
    return model


def load_tokenizer_of(folder: Path, model: MoonwhaleForCausalLM) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder; a UserError unless there is one and it belongs to the model."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer.json: copy the one that the model was trained with there")
    try:
        tokenizer = load_tokenizer(str(folder))
    except UserError as error:
        raise UserError(str(error).removeprefix("`tokenizer`: ")) from error
    largest, size = max(tokenizer.get_vocab().values()), model.config.vocab_size
    if largest >= size:
        raise UserError(
            f"{folder}: the tokenizer is of another vocabulary, with ids up to {largest:,} where the model knows "
            f"{size:,}; copy the one that the model was trained with there"
        )
    eos = model.config.eos_token_id
    if tokenizer.eos_token_id not in (eos if isinstance(eos, list) else [eos]):
        raise UserError(
            f"{folder}: the tokenizer is of another vocabulary, with {tokenizer.eos_token_id} as its end token where "
            f"the model has {eos}; copy the one that the model was trained with there"
        )
    return tokenizer


def _newest(folder: Path) -> str:
    """A hint at the newest checkpoint of a run that has not ended, or nothing."""
    found = [path.parent for path in folder.glob("checkpoint-*/config.json") if path.parent.name[11:].isdigit()]
    if not found:
        return ""
    newest = max(found, key=lambda path: int(path.name[11:]))
    return f"; the run has not ended, its newest checkpoint is {newest} (give that)"


def read_json(path: Path) -> dict:
    """The JSON object in a file; a UserError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; {AGAIN}") from error
    if not isinstance(values, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object; {AGAIN}")
    return values


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' bars and its table of missing tensors, which our one line replaces."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _size(shape) -> str:
    return "×".join(map(str, shape))


def unfinished_folder(out: str | os.PathLike) -> Path:
    """The folder in which the next checkpoint of run `out` grows, emptied of what a killed run left there."""
    folder = Path(out) / ".unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def publish_checkpoint(written: Path, out: str | os.PathLike, keep: int | None = None) -> None:
    """Seals the complete checkpoint `written` with the sizes and SHA-256 sums of its files and moves it into run `out`,
    in one step; of the older ones, the newest `keep - 1` stay.
    """
    files = {
        path.relative_to(written).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(written.rglob("*"))
        if path.is_file()
    }
    (written / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    final = Path(out) / written.name
    for later in list_checkpoints(out):  # damaged, else this run had gone on from them: kept, but out of the way
        if step_of(later) >= step_of(final):
            shutil.rmtree(aside := later.with_name(f"damaged-{later.name}"), ignore_errors=True)
            later.rename(aside)
    written.rename(final)
    written.parent.rmdir()
    for old in list_checkpoints(out)[keep:] if keep else ():
        shutil.rmtree(old, ignore_errors=True)


def publish_model(checkpoint: Path, out: str | os.PathLike) -> None:
    """Copies a checkpoint's model and tokenizer into its run's folder, which is a plain Hugging Face checkpoint from
    the moment that `config.json`, the last file, appears.
    """
    training_only = {MANIFEST, STATE}
    model_files = [p for p in checkpoint.iterdir() if p.is_file() and p.suffix not in (".pt", ".pth")]
    files = [p for p in model_files if p.name not in training_only]
    try:
        for path in sorted(files, key=lambda p: p.name == "config.json"):
            copy = Path(out) / f".{path.name}"
            shutil.copyfile(path, copy)
            os.replace(copy, Path(out) / path.name)
    except OSError as error:
        copy.unlink(missing_ok=True)
        raise explain_full_disk(error, out) from error


def log_history(checkpoint: Path) -> list[dict]:
    """What the run logged up to a checkpoint."""
    return read_json(checkpoint / STATE)["log_history"]


def is_last_checkpoint(checkpoint: Path) -> bool:
    """Whether a checkpoint was written after its run's last step."""
    state = read_json(checkpoint / STATE)
    return state["global_step"] >= state["max_steps"]


def find_damage(checkpoint: str | os.PathLike) -> str | None:
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


def list_checkpoints(out: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [p for p in Path(out).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(out: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run; a damaged newer one is skipped with a warning."""
    for checkpoint in list_checkpoints(out):
        if (wrong := find_damage(checkpoint)) is None:
            return checkpoint
        log.warning("skipping %s: %s", checkpoint, wrong)
    return None


def explain_full_disk(error: Exception, out: str | os.PathLike) -> Exception:
    """A full disk as one line for people; any other error as it is."""
    # safetensors and torch have exceptions of their own for it, of which torch's do not say what it is.
    signs = ("No space left on device", "inline_container.cc", "iostream error")
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if not full and not any(sign in str(error) for sign in signs):
        return error
    shutil.rmtree(Path(out) / ".unfinished", ignore_errors=True)
    whole = newest_whole(out)
    kept = f"; {whole} is whole, go on from it with `resume`" if whole else ""
    return UserError(f"`out`: no space left on the disk of {out}: free some, or lower `keep_checkpoints`{kept}")
