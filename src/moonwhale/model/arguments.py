"""Checks of what a caller gives to a forward pass: transformers' arguments are obeyed or refused."""

from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_moonwhale import MoonwhaleConfig

# Arguments of transformers' forward passes that say what position ids say already, or that only its data loaders use
REDUNDANT_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cache_position")
FALSE_ARGUMENTS = ("output_router_logits",)


def or_configured(value: bool | None, config: MoonwhaleConfig, name: str) -> bool:
    return bool(getattr(config, name, False) if value is None else value)


def refuse_unknown(arguments: dict) -> None:
    """Refuse what would have to be ignored.

    Raises:
        TypeError: an argument of another name, or a value that asks for what the model cannot do.
    """
    for name, value in arguments.items():
        if name in REDUNDANT_ARGUMENTS or value is None or (name in FALSE_ARGUMENTS and value is False):
            continue
        if name == "is_causal" and value is True:
            continue
        raise TypeError(f"{name}={str(value)[:40]}: a moonwhale model has no such argument; leave it out")


def check_labels(labels: Tensor, tokens: Tensor | None, past_key_values: Cache | None) -> None:
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError("labels need the whole sequence: leave out past_key_values")
    if tokens is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, not {tuple(tokens.shape[:2])} as the tokens")
