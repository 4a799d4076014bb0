"""The settings of a model that can be changed without training it again: top-k, and MoBA's k and block size."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.moe import Router

MAX_TOKENS = 512  # of a text that is looked into
SMALLEST_BLOCK = 4  # tokens; smaller ones would need more gates than keys


@dataclass(frozen=True)
class Settings:
    """One value for all blocks of a model, under the names of the configuration. None: the model has no such thing."""

    num_experts_per_tok: int | None = None
    moba_topk: int | None = None
    moba_block_size: int | None = None


def trained_settings(model: MoonwhaleForCausalLM) -> Settings:
    """Returns the settings that the model was trained with."""
    config = model.config
    has_experts, has_blocks = any(_routers(model)), any(_block_attentions(model))
    return Settings(
        config.num_experts_per_tok if has_experts else None,
        config.moba_topk if has_blocks else None,
        config.moba_block_size if has_blocks else None,
    )


def limits(model: MoonwhaleForCausalLM) -> dict[str, list[int]]:
    """Returns the smallest and the largest value of each setting that the model has."""
    config, trained = model.config, trained_settings(model)
    bounds = {
        "num_experts_per_tok": [1, config.n_routed_experts // config.n_group * config.topk_group],
        "moba_topk": [1, MAX_TOKENS // SMALLEST_BLOCK],
        "moba_block_size": [SMALLEST_BLOCK, MAX_TOKENS],
    }
    return {name: bounds[name] for name, value in asdict(trained).items() if value is not None}


def check(model: MoonwhaleForCausalLM, asked: dict[str, int]) -> Settings:
    """Returns the trained settings with those `asked` for in their place.

    Raises:
        UserError: the model has no such mechanism, or a value is out of bounds.
    """
    bounds = limits(model)
    for name, value in asked.items():
        if name not in bounds:
            mechanism = "experts" if name == "num_experts_per_tok" else "MoBA"
            raise UserError(f"`{name}`: this model has no {mechanism}: leave it out")
        low, high = bounds[name]
        if not low <= value <= high:
            raise UserError(f"`{name}`: {value} is out of bounds: give from {low} to {high}")
    return replace(trained_settings(model), **asked)


@contextmanager
def changed(model: MoonwhaleForCausalLM, settings: Settings) -> Iterator[None]:
    """Lets the model compute with other settings while the context is open."""
    before = [(module, "topk", module.topk) for module in (*_routers(model), *_block_attentions(model))]
    before += [(module, "block_size", module.block_size) for module in _block_attentions(model)]
    for router in _routers(model):
        router.topk = settings.num_experts_per_tok
    for attention in list(_block_attentions(model)):
        attention.topk, attention.block_size = settings.moba_topk, settings.moba_block_size
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def instructive(model: MoonwhaleForCausalLM, tokens: int) -> list[Settings]:
    """Returns settings that differ from the trained ones in one value, and that change something in such a text."""
    trained, bounds = trained_settings(model), limits(model)
    asked = []
    if k := trained.num_experts_per_tok:
        asked += [("num_experts_per_tok", 1), ("num_experts_per_tok", 2 * k)]
    if size := trained.moba_block_size:
        blocks = -(-tokens // size)
        if blocks > 1:
            asked += [("moba_topk", 1), ("moba_topk", blocks), ("moba_block_size", 2 * size)]
        if tokens > size // 2:
            asked += [("moba_block_size", size // 2)]
    found = []
    for name, value in asked:
        low, high = bounds[name]
        settings = replace(trained, **{name: min(max(value, low), high)})
        if settings != trained and settings not in found:
            found.append(settings)
    return found


def _routers(model: MoonwhaleForCausalLM) -> Iterator[Router]:
    return (module for module in model.modules() if isinstance(module, Router))


def _block_attentions(model: MoonwhaleForCausalLM) -> Iterator[MultiheadLatentAttention]:
    """Yields the attentions that use MoBA."""
    return (module for module in model.modules() if isinstance(module, MultiheadLatentAttention) and module.topk)
