"""What a model's configuration may hold: every field's type and range, RoPE's settings, and what fits together.

Each check raises a ValueError of one line: the field, its value, and what to give instead.
"""

import math
import types
import typing

import torch
from transformers.utils import logging

from .config_fields import ConfigFields

log = logging.get_logger(__name__)

ATTRIBUTES = {  # of the configuration's class, but a file may name them
    "model_type",
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "_from_model_config",
    "_attn_implementation_autoset",
    "num_labels",
    "output_attentions",
    "rope_scaling",
    "use_return_dict",
}
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # of transformers: the model has its own, "eager"
UNSUPPORTED = (  # transformers would read another model's sizes from these, or another attention
    "text_config",
    "text_encoder",
    "decoder",
    "generator",
    "layer_types",
    "sliding_window",
    "attention_chunk_size",
)
PRETRAINED_FIELDS = {"architectures": list, "id2label": dict, "label2id": dict, "problem_type": str}
PRETRAINED_FIELDS |= dict.fromkeys(("output_hidden_states", "return_dict", "is_encoder_decoder"), bool)
MOST_LABELS = 10_000  # a name is made up for each

LARGEST = 2**31 - 1  # positions and token ids are 32-bit numbers in the kernels
WIDEST, MOST_HEADS = 2**20, 10_000  # beyond every machine, but a model of this size can still be described
MOST_BLOCKS = 512  # MTP's included: building a model to compare it with a file's tensors takes seconds
RANGES = {  # the least and the largest value; other combinations are checked by name below
    "vocab_size": (1, LARGEST),
    "hidden_size": (1, WIDEST),
    "intermediate_size": (1, WIDEST),
    "num_hidden_layers": (1, MOST_BLOCKS),
    "max_position_embeddings": (1, LARGEST),
    "rms_norm_eps": (1e-30, 1),  # in fp32, less would be no protection against a division by zero
    "initializer_range": (0, 10),
    "embedding_initializer_range": (0, 10),
    "embedding_conv": (0, 1024),
    "num_attention_heads": (1, MOST_HEADS),
    "num_key_value_heads": (1, MOST_HEADS),
    "q_lora_rank": (1, WIDEST),
    "kv_lora_rank": (1, WIDEST),
    "qk_nope_head_dim": (1, WIDEST),
    "qk_rope_head_dim": (1, WIDEST),
    "v_head_dim": (1, WIDEST),
    "moba_block_size": (1, LARGEST),
    "moba_topk": (0, LARGEST),
    "moba_key_conv": (0, 1024),
    "latent_embedding_every": (0, MOST_BLOCKS),
    "n_routed_experts": (1, WIDEST),
    "n_shared_experts": (0, MOST_HEADS),
    "num_experts_per_tok": (1, WIDEST),
    "moe_intermediate_size": (1, WIDEST),
    "first_k_dense_replace": (0, LARGEST),
    "n_group": (1, WIDEST),
    "topk_group": (1, WIDEST),
    "routed_scaling_factor": (1e-6, 1e6),
    "bias_update_speed": (0, 1e6),
    "aux_loss_alpha": (0, 1e6),
    "n_device_groups": (1, WIDEST),
    "num_nextn_predict_layers": (0, MOST_BLOCKS),
    "mtp_num_blocks": (1, MOST_BLOCKS),  # of every module
    "mtp_loss_weight": (0, 1e6),
}
TOO_SMALL = {  # what to give in place of a value below the range, where a number is not all there is to say
    "q_lora_rank": "give a width, or null for uncompressed queries",
    "moba_block_size": "a block holds at least one key; moba_topk=0 switches MoBA off",
    "mtp_num_blocks": "give one number >= 1, or one for each MTP module",
}
CHOICES = {
    "attention": ("mla", "gqa"),
    "hidden_act": ("silu",),  # the experts' activation is SwiGLU's
    "scoring_func": ("sigmoid", "softmax"),
    "balance_loss": ("sequence", "expert", "device", "none"),
}
NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a name",
    dict: "a mapping",
    list: "a list",
    list[int]: "a list of whole numbers",
    types.NoneType: "null",
}

# RoPE's settings by type, those that must be given first. Their frequencies do not depend on the length.
YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
ROPE_TYPES = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (("factor", "original_max_position_embeddings"), YARN),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}
ROPE_RANGES = {
    "rope_theta": (1 + 1e-6, 1e30),
    "factor": (1, 1e9),
    "original_max_position_embeddings": (1, LARGEST),
    "attention_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e9),
    "beta_slow": (1e-6, 1e9),
    "mscale": (0, 1e6),
    "mscale_all_dim": (0, 1e6),
    "low_freq_factor": (1e-6, 1e9),
    "high_freq_factor": (1e-6, 1e9),
    "partial_rotary_factor": (1, 1),  # all of a head's rotary part is rotated
}


def refuse(field: str, value, fix: str) -> typing.NoReturn:
    """Raises the ValueError for a field's value."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        text = "(too long to print)"
    raise ValueError(f"{field}={text[:200]} is impossible: {fix}")


def refuse_attributes(cls: type, names) -> None:
    """Refuses extra fields that would replace an attribute or a method of the configuration's class."""
    for name in sorted(names, key=str):
        if not isinstance(name, str):
            refuse("a field's name", name, "it is text")
        shadows = name.startswith("_") or hasattr(cls, name)
        if shadows and name not in ATTRIBUTES and name not in getattr(cls, "attribute_map", ()):
            raise ValueError(f"{name[:100]!r} is no field of a configuration: leave it out")


def check_extra_fields(cls: type, fields: dict) -> None:
    """Checks the fields that moonwhale does not declare, but transformers obeys."""
    for name in IMPLEMENTATIONS:
        for spelling in (name, f"_{name}"):
            if fields.get(spelling) not in (None, "eager"):
                refuse(spelling, fields[spelling], "the model has its own attention and experts; leave it out")
    for name in UNSUPPORTED:
        if fields.get(name) is not None:
            refuse(name, fields[name], "a moonwhale model has none; leave it out")
    own = {f"_{name}" for name in IMPLEMENTATIONS}
    refuse_attributes(cls, fields.keys() - own)
    labels = fields.get("num_labels")
    if labels is not None and (type(labels) is not int or not 0 <= labels <= MOST_LABELS):
        refuse("num_labels", labels, f"give a whole number, at most {MOST_LABELS:,}")
    if not isinstance(fields.get("auto_map"), dict | None):
        refuse("auto_map", fields["auto_map"], "give a mapping, or leave it out")


def check_token_ids(fields: dict) -> None:
    """Checks the types of the token ids of a generation_config.json."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = fields.get(name)
        if value is not None and not _is(value, int) and not _is(value, list[int]):
            refuse(name, value, "give a whole number, a list of them, or null")


def check_types(config) -> None:
    """Checks each field's type and range alone, so that what is derived from the fields cannot fail."""
    for field, kind in typing.get_type_hints(ConfigFields).items():
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        value = getattr(config, field)
        if not any(_is(value, k) for k in kinds):
            refuse(field, value, f"give {' or '.join(NOUNS[k] for k in kinds)}")
        if field in RANGES and value is not None:
            least, most = RANGES[field]
            numbers = value if isinstance(value, list | tuple) else [value]
            noun = NOUNS[float if float in kinds else int]
            if any(number < least for number in numbers):
                refuse(field, value, TOO_SMALL.get(field, f"give {noun}, at least {least:,}"))
            if any(number > most for number in numbers):
                refuse(field, value, f"give {noun}, at most {most:,}")
        if field in CHOICES and value not in CHOICES[field]:
            refuse(field, value, f"choose one of {', '.join(CHOICES[field])}")
    dtype = getattr(torch, config.dtype, None) if isinstance(config.dtype, str) else config.dtype
    if config.dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        refuse("dtype", config.dtype, "give a floating dtype of torch, such as float32 or bfloat16")
    for field, kind in PRETRAINED_FIELDS.items():
        if not isinstance(getattr(config, field), kind | None):
            refuse(field, getattr(config, field), f"give {NOUNS[kind]}, or null")


def _is(value, kind) -> bool:
    if kind == list[int]:
        return isinstance(value, list | tuple) and all(_is(item, int) for item in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool) and _is_finite(value)
    return isinstance(value, kind)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond all floats
        return False


def _between(least: float, most: float) -> str:
    return f"it lies between {least:,} and {most:,}" if least < most else f"it is {most:,}"


def rope_of(field: str, value: dict | None) -> dict:
    """Returns a copy of RoPE's settings with numbers for text: YAML reads 1e6, which has no point, as text.

    Args:
        field: `rope_parameters`, or `rope_scaling` as older configurations name it.
    """
    if not isinstance(value, dict | None):
        refuse(field, value, "give a mapping, or null")
    settings = dict(value or {})
    for key in settings.keys() & ROPE_RANGES.keys():
        if isinstance(settings[key], str):
            try:
                number = float(settings[key])
            except ValueError:
                refuse(field, value, f"{key} is a number")
            settings[key] = int(number) if number.is_integer() and key.startswith("original") else number
    return settings


def check_rope(config) -> None:
    """Checks RoPE's settings, as completed by transformers."""
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        refuse("rope_parameters", rope, f"choose a rope_type from {', '.join(ROPE_TYPES)}")
    needed, optional = ROPE_TYPES[kind]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *needed, *optional}
    for key in rope.keys() - known:
        refuse("rope_parameters", rope, f"rope_type {kind} has no setting {key}; leave it out")
    for key in ("rope_theta", *needed):
        if rope.get(key) is None:
            refuse("rope_parameters", rope, f"rope_type {kind} needs {key}")
    for key, (least, most) in ROPE_RANGES.items():
        whole = key.startswith("original")
        value = rope.get(key)
        if value is None and not (key in rope and key == "partial_rotary_factor"):
            continue  # transformers reads null as absent, except here
        if not _is(value, int if whole else float) or not least <= value <= most:
            refuse("rope_parameters", rope, f"{key} is {NOUNS[int if whole else float]}; {_between(least, most)}")
    if rope.get("type", kind) != kind:
        refuse("rope_parameters", rope, "type is the older name of rope_type: give one of them")
    if not isinstance(rope.get("truncate", True), bool):
        refuse("rope_parameters", rope, "truncate is true or false")
    if (rope.get("beta_fast") or 32) < (rope.get("beta_slow") or 1):
        refuse("rope_parameters", rope, "beta_fast (32 unless given) is at least beta_slow (1 unless given)")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        refuse("rope_parameters", rope, "low_freq_factor is below high_freq_factor")


def check_fit(config) -> None:
    """Checks what several fields must agree on. Types and ranges are right already."""
    _require(config, not config.is_encoder_decoder, "is_encoder_decoder", "the model is a decoder; leave it out")
    _check_sizes(config)
    _check_attention(config)
    _check_experts(config)


def _require(config, ok: bool, field: str, fix: str) -> None:
    if not ok:
        refuse(field, getattr(config, field), fix)


def _check_sizes(config) -> None:
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, field)
        ids = value if isinstance(value, list) else [value]
        _require(
            config,
            value is None or (ids and all(0 <= i < config.vocab_size for i in ids)),
            field,
            f"it lies between 0 and vocab_size={config.vocab_size}, or is null",
        )
    _require(
        config,
        len(config.mtp_blocks) == config.num_nextn_predict_layers,
        "mtp_num_blocks",
        f"give one number >= 1, or one for each of the num_nextn_predict_layers={config.num_nextn_predict_layers}",
    )
    fix = f"the model would have {config.num_blocks:,} blocks, and at most {MOST_BLOCKS} are possible"
    _require(config, config.num_blocks <= MOST_BLOCKS, "num_nextn_predict_layers", fix)


def _check_attention(config) -> None:
    latent, heads, key_heads = config.attention == "mla", config.num_attention_heads, config.num_key_value_heads
    blocks = range(config.num_blocks)
    even = "RoPE rotates pairs, so it must be even" + ("" if latent else ", together with qk_nope_head_dim")
    _require(config, config.head_dim % 2 == 0, "qk_rope_head_dim", even)
    fix = f"latent attention has as many key heads as query heads ({heads})"
    _require(config, key_heads == heads or not latent, "num_key_value_heads", fix)
    _require(config, heads % key_heads == 0, "num_key_value_heads", f"it must divide num_attention_heads={heads}")
    fix = "the convolution is on the latents of attention=mla; set it to 0"
    _require(config, latent or not config.moba_key_conv, "moba_key_conv", fix)
    _require(config, config.attention_dropout == 0.0, "attention_dropout", "attention here has no dropout; set it to 0")
    _require(
        config,
        all(i in blocks for i in config.moba_full_attention_layers),
        "moba_full_attention_layers",
        f"block indices go from 0 to {blocks[-1]}",
    )


def _check_experts(config) -> None:
    has_experts = config.first_k_dense_replace < config.num_blocks
    for field in ("hidden_size", "moe_intermediate_size") if has_experts else ():
        _require(config, getattr(config, field) % 8 == 0, field, "experts' grouped products want a multiple of 8")
    if has_experts and config.num_experts_per_tok == 1 and config.norm_topk_prob:
        log.warning_once(
            "num_experts_per_tok=1 with norm_topk_prob=true: every gate is 1, so the prediction loss gives the "
            "router no gradient (set norm_topk_prob to false)"
        )
    experts, groups, groups_compared = config.n_routed_experts, config.n_group, config.n_device_groups
    for field in ("n_group", "n_device_groups"):
        _require(config, experts % getattr(config, field) == 0, field, f"it must divide n_routed_experts={experts}")
    comparable = not has_experts or config.balance_loss != "device" or groups_compared > 1
    _require(config, comparable, "balance_loss", "it compares groups of experts: give n_device_groups, at least two")
    _require(config, config.topk_group <= groups, "topk_group", f"it lies between 1 and n_group={groups}")
    _require(
        config,
        groups == 1 or experts // groups >= 2,
        "n_group",
        "a group is scored by its two best experts, so it needs at least two",
    )
    _require(
        config,
        config.num_experts_per_tok <= config.topk_group * experts // groups,
        "num_experts_per_tok",
        f"topk_group={config.topk_group} of n_group={groups} groups hold fewer experts than that, with "
        f"n_routed_experts={experts}",
    )
