"""The model with which `moonwhale train --from CHECKPOINT` begins: its configuration, its tokenizer, its weights."""

import os
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.files import expanded, read_json
from moonwhale.presets import PRESETS
from moonwhale.train.effects import idle_model_fields, require_effects
from moonwhale.yaml_files import read_yaml_file

if typing.TYPE_CHECKING:
    from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
    from moonwhale.train.config import TrainConfig

ADAPTERS = "adapter_config.json"


def preset_of(folder: str) -> str | None:
    """The preset of the run that wrote a checkpoint, from the run.yaml there or beside it. None if it is unknown."""
    for path in (Path(folder, "run.yaml"), Path(folder).parent / "run.yaml"):
        with suppress(UserError):
            values = read_yaml_file(path)
            preset = values.get("preset") if isinstance(values, dict) else None
            return preset if isinstance(preset, str) and preset in PRESETS else None
    return None


def longest_context(folder: str) -> int | None:
    """The context of the model in a folder. None if it cannot be read, which `starting_config` will report."""
    with suppress(UserError):
        length = read_json(Path(folder, "config.json")).get("max_position_embeddings")
        return length if type(length) is int and length > 0 else None
    return None


def starting_folder(config: "TrainConfig") -> Path:
    """The folder `config.from_`, or the newest checkpoint of a resumed run, which needs nothing else.

    The folder `config.from_` may have been changed or removed since the run began.
    """
    from moonwhale.checkpoint import newest_checkpoint

    newest = newest_checkpoint(config.out) if config.resume else None
    return newest or Path(config.from_)


@contextmanager
def _naming_the_option() -> Iterator[None]:
    """Context whose UserErrors name the option `from_`, unless they name another."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith("`") else f"`from_`: {error}") from error


def starting_config(config: "TrainConfig") -> "MoonwhaleConfig":
    """Reads the checkpoint's configuration. The fields of `config.model` replace its values.

    Raises:
        UserError: there is no checkpoint, or a field has an impossible value, one that its weights contradict, or one
            without effect.
    """
    from moonwhale.checkpoint import read_config
    from moonwhale.model import MoonwhaleConfig

    folder = starting_folder(config)
    with _naming_the_option():
        if (folder / ADAPTERS).is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} holds LoRA adapters, which are no model: give the folder of their run, which holds the "
                "merged model when the run has ended"
            )
        found = read_config(folder)
    values = found.to_dict()
    changed = {name: value for name, value in config.model.items() if getattr(found, name) != value}
    try:
        model = MoonwhaleConfig.from_dict(values | changed)
    except ValueError as error:
        raise as_field(error) from error
    for name in ("initializer_range", "embedding_initializer_range", "zero_init_residual"):
        if name in changed:
            raise UserError(f"`model.{name}`: it acts on a new model alone: leave it or `from_` out")
    if changed and (shapes := _weight_shapes(found)) != _weight_shapes(model):
        name = next(n for n in changed if _changes_weights(values | {n: changed[n]}, shapes))
        raise UserError(
            f"`model.{name}`: {changed[name]!r} does not fit the weights in {folder}, which have "
            f"{getattr(found, name)!r}: leave it out, or train a new model without `from_`"
        )
    require_effects(idle_model_fields(model), {"model": changed})
    return model


def as_field(error: ValueError) -> UserError:
    """The error of an impossible configuration, which begins with FIELD=VALUE, in the command line's words."""
    field, _, why = str(error).partition("=")
    return UserError(f"`model.{field}`={why}")


def _weight_shapes(config: "MoonwhaleConfig") -> dict[str, tuple[int, ...]]:
    """The shape of each weight by name. One that is tied to another is not listed."""
    import torch

    from moonwhale.model import MoonwhaleForCausalLM

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MoonwhaleForCausalLM(config).named_parameters()}


def _changes_weights(values: dict, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a configuration with these values has weights of other shapes, or is impossible."""
    from moonwhale.model import MoonwhaleConfig

    try:
        return _weight_shapes(MoonwhaleConfig.from_dict(values)) != shapes
    except ValueError:
        return True


def load_starting_model(config: "TrainConfig", model_config: "MoonwhaleConfig") -> "MoonwhaleForCausalLM":
    """Loads the checkpoint's weights in fp32, and checks that its tokenizer belongs to them.

    Raises:
        UserError: the weights or the tokenizer are missing or damaged, or do not belong together.
    """
    import torch

    from moonwhale.checkpoint import load_model, load_tokenizer_of

    folder = starting_folder(config)
    with _naming_the_option():
        model = load_model(folder, model_config, torch.float32)
        load_tokenizer_of(folder, model)
    return model


def absolute(folder: str | None) -> str | None:
    """The folder's absolute path, by which a run is replayed and resumed from any working directory."""
    return folder and os.path.abspath(expanded(folder))
