"""Opening a checkpoint folder. transformers fills missing tensors with noise and a warning; here that is an error."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from moonwhale.data.tokenizer import load_tokenizer
from moonwhale.errors import UserError, one_line
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.options import convert

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
AGAIN = "save or copy the checkpoint again"


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
        raise UserError(f"{folder} {kind} (give the folder that a training run wrote with --out)")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint: it holds no config.json{_newest(folder)}")
    values = read_json(folder / "config.json")
    if values.get("model_type") != MoonwhaleConfig.model_type:
        raise UserError(f"{folder}/config.json is of a model of type {values.get('model_type')!r}, not 'moonwhale'")
    for name, kind in MoonwhaleConfig.__annotations__.items():
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
        raise UserError(str(error).removeprefix("--tokenizer: ")) from error
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
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _size(shape) -> str:
    return "×".join(map(str, shape))
