"""Options that have no effect together with others. One that a user gives is supported or refused, never ignored.

`RunOptions.idle` names the options without effect. Only those that the user gave are refused: a default may be idle,
and so may an option that a preset decides.
"""

import typing
from collections.abc import Iterable, Iterator, Mapping

from moonwhale.errors import UserError

if typing.TYPE_CHECKING:
    from moonwhale.model import MoonwhaleConfig

# Fields of a model's configuration that have no effect without a mechanism
OF_LATENTS = ("q_lora_rank", "kv_lora_rank", "latent_embedding_every")
OF_MOBA = ("moba_block_size", "moba_full_attention_layers")
OF_MTP = ("mtp_num_blocks", "mtp_loss_weight")
OF_EXPERTS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group")
OF_EXPERTS += ("topk_group", "routed_scaling_factor", "scoring_func", "bias_update_speed", "balance_loss")
OF_EXPERTS += ("aux_loss_alpha", "n_device_groups")


def without_effect(idle: Iterable[tuple[str, str]], given: Mapping[str, typing.Any]) -> dict[str, str]:
    """Returns the options of `given` that change nothing, each with the reason.

    Args:
        idle: the options that have no effect, as `RunOptions.idle` yields them.
        given: the options that a user gave, those of a dict in a dict of their own. A value of 0 or none asks for
            nothing, so it is not refused.
    """
    found = {}
    for name, why in idle:
        outer, dot, key = name.partition(".")
        value = given.get(outer)
        if value and (not dot or value.get(key)):
            found[name] = why
    return found


def refusal(found: Mapping[str, str]) -> str:
    """Returns the message about the first of the options that `without_effect` found."""
    name, why = next(iter(found.items()))
    return f"`{name}`: it has no effect {why}: leave it out, or change that"


def require_effects(idle: Iterable[tuple[str, str]], given: Mapping[str, typing.Any]) -> None:
    """Raises UserError for an option of `given` that changes nothing. See `without_effect`."""
    if found := without_effect(idle, given):
        raise UserError(refusal(found))


def idle_model_fields(model: "MoonwhaleConfig") -> Iterator[tuple[str, str]]:
    """Yields each field that has no effect together with the others, as `model.FIELD`, with the reason.

    model: a configuration, or anything with its fields.
    """
    modules, each = model.num_nextn_predict_layers, model.mtp_num_blocks
    blocks = model.num_hidden_layers + (sum(each) if isinstance(each, list) else modules * each)
    for are_idle, fields, because in (
        (model.attention != "mla", OF_LATENTS, "attention"),
        (not model.moba_topk, OF_MOBA, "moba_topk"),
        (not modules, OF_MTP, "num_nextn_predict_layers"),
        (model.first_k_dense_replace >= blocks, OF_EXPERTS, "first_k_dense_replace"),
        (not model.first_k_dense_replace, ("intermediate_size",), "first_k_dense_replace"),
        (model.balance_loss == "none", ("aux_loss_alpha",), "balance_loss"),
        (model.balance_loss != "none" and not model.aux_loss_alpha, ("balance_loss",), "aux_loss_alpha"),
        (model.balance_loss != "device", ("n_device_groups",), "balance_loss"),
    ):
        if are_idle:
            for field in fields:
                yield f"model.{field}", f"with `model.{because}` {getattr(model, because)}"
