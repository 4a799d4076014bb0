"""What a caller gives to a forward pass, checked and completed: transformers' arguments are obeyed or refused."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .configuration_moonwhale import MoonwhaleConfig
from .documents import Documents, require

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "max_length_q", "max_length_k")  # flash attention's arguments
FALSE_ARGUMENTS = ("output_router_logits",)  # which ask for nothing while they are False


def chosen_hidden_states(wanted: bool | int | Iterable[int] | None, config: MoonwhaleConfig, number: int) -> set[int]:
    """Return which of `number` hidden states to return: all, none, or those of an index or of several, from either end.

    None asks for what the configuration says.
    """
    wanted = getattr(config, "output_hidden_states", False) if wanted is None else wanted
    if wanted is None or isinstance(wanted, bool):
        return set(range(number)) if wanted else set()
    indices = [wanted] if isinstance(wanted, int) else wanted
    return {i % number for i in indices if -number <= i < number}


def complete_inputs(
    model: PreTrainedModel,
    embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    use_cache: bool | None,
    documents: Documents | None,
    with_mtp: bool,
    others: dict,
) -> tuple[Cache | None, Documents, Tensor]:
    """Check and complete what `MoonwhaleModel.forward` is given, apart from the embeddings (B, T, hidden). `others` are
    its `kwargs`.

    Returns:
        the cache to extend, if any; the documents of all cached + T tokens; the position ids (B, T).

    Raises:
        ValueError, TypeError: see `MoonwhaleModel.forward`.
    """
    cache_position = others.pop("cache_position", None)
    position_ids = packed_positions(others, position_ids, embeds, cache)
    refuse_unknown(others)
    cache = cache_to_extend(cache, use_cache, model.config, model.training, model.gradient_checkpointing)
    past = int(cache.get_seq_length()) if cache is not None else 0
    if with_mtp and past:
        raise ValueError("with_mtp needs the whole sequence: leave out past_key_values")
    batch, length, _ = embeds.shape
    check_cache_position(cache_position, past, length)
    if documents is None:
        starts = None if past else position_ids
        documents = Documents.from_inputs(batch, past + length, embeds.device, attention_mask, starts)
    if position_ids is None:
        position_ids = documents.positions[:, past:]
    return cache, documents, position_ids


def refuse_unknown(arguments: dict) -> None:
    """Refuse what would have to be ignored.

    Raises:
        TypeError: an argument of another name, or a value that asks for what the model cannot do.
    """
    for name, value in arguments.items():
        if value is None or (name in FALSE_ARGUMENTS and value is False):
            continue
        if name == "is_causal" and value is True:
            continue
        raise TypeError(f"{name}={str(value)[:40]}: a moonwhale model has no such argument; leave it out")


def packed_positions(
    arguments: dict, position_ids: Tensor | None, tokens: Tensor, past_key_values: Cache | None
) -> Tensor | None:
    """Take flash attention's arguments out of `arguments`, and return position ids (B, T) that say the same.

    Args:
        arguments: may hold `cu_seq_lens_q` and `cu_seq_lens_k` (documents + 1,), where each document begins among all
            B * T tokens, and where the last one ends; and `seq_idx` (B, T), the document of each token. `max_length_q`
            and `max_length_k` add nothing to them.
        position_ids: (B, T), which are returned if they are given, or None.
        tokens: (B, T, …).

    Raises:
        ValueError: two of them contradict each other, or there is a cache. On CUDA a contradiction is a device-side
            assertion.
    """
    given = {name: arguments.pop(name) for name in PACKING if arguments.get(name) is not None}
    if not given:
        return position_ids
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError(f"{next(iter(given))} needs the whole sequence: leave out past_key_values")
    starts = {name: _first_tokens(name, value, tokens) for name, value in given.items() if "max_length" not in name}
    if position_ids is not None:
        starts["position_ids"] = _first_tokens("position_ids", position_ids, tokens)
    if not starts:
        raise ValueError(f"{next(iter(given))} says nothing about documents without cu_seq_lens_q: leave it out")
    (name, first), *others = starts.items()
    for other, also in others:
        require((first == also).all(), f"{name} and {other} begin documents at different tokens: give one of them")
    if position_ids is not None:
        return position_ids
    index = torch.arange(tokens.shape[1], device=tokens.device)
    return index - torch.where(first, index, 0).cummax(1).values


def _first_tokens(name: str, value: Tensor, tokens: Tensor) -> Tensor:
    """Return which tokens (B, T) begin a document according to the argument `name`."""
    value, shape = torch.as_tensor(value, device=tokens.device), tokens.shape[:2]
    if name.startswith("cu_seq_lens"):
        problem = f"{name} rises from 0 to the number of tokens, {shape.numel():,}"
        if value.ndim != 1 or len(value) < 2:
            raise ValueError(problem)
        require((value[0] == 0) & (value[-1] == shape.numel()) & (value.diff() >= 0).all(), problem)
        begins = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=tokens.device)
        begins = begins.index_fill_(0, value.long(), True)[:-1].view(shape)
    elif value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(shape)} as the tokens")
    else:
        step = 1 if name == "position_ids" else 0
        begins = F.pad(value[:, 1:] != value[:, :-1] + step, (1, 0))
    begins[:, 0] = True
    return begins


def cache_to_extend(
    given: Cache | None, use_cache: bool | None, config: MoonwhaleConfig, training: bool, checkpointing: bool
) -> Cache | None:
    """Return the given cache, or a new one if `use_cache` or the configuration asks for it.

    Raises:
        ValueError: a cache is given in training with gradient checkpointing, which would append to it once more when it
            recomputes a block.
    """
    if training and checkpointing:
        if given is not None:
            raise ValueError(
                "past_key_values: gradient checkpointing keeps no cache; call model.eval() before generate()"
            )
        return None
    if use_cache is None:
        use_cache = config.use_cache and not training
    return DynamicCache(config=config) if use_cache and given is None else given


def check_cache_position(position: Tensor | None, past: int, length: int) -> None:
    """Check that `cache_position` (T,), which older callers give, names the places that follow the cached tokens."""
    if position is not None:
        problem = f"cache_position is {past} … {past + length - 1} here, as the cache knows: leave it out"
        if position.shape != (length,):
            raise ValueError(problem)
        require((position == torch.arange(past, past + length, device=position.device)).all(), problem)


def check_labels(labels: Tensor, tokens: Tensor | None, past_key_values: Cache | None) -> None:
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError("labels need the whole sequence: leave out past_key_values")
    if tokens is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, not {tuple(tokens.shape[:2])} as the tokens")
