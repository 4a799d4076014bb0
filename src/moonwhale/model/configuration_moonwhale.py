"""`MoonwhaleConfig`: the fields of config_fields.py as a transformers configuration, with what follows from them."""

import math

from transformers import PreTrainedConfig

from .config_checks import check_extra_fields, check_fit, check_rope, check_types, rope_of
from .config_fields import ConfigFields


class MoonwhaleConfig(ConfigFields, PreTrainedConfig):
    """Every dimension of a moonwhale model. `ConfigFields` declares and explains the fields.

    Raises:
        ValueError: a value or combination that cannot work, in one line with the field, its value and the fix.
    """

    model_type = "moonwhale"
    keys_to_ignore_at_inference = [  # noqa: RUF012 (a Trainer adds to it: its predictions are the logits alone)
        "past_key_values",
        "hidden_states",
        "attentions",
        "losses",
        "accuracies",
        "targets",
        "balance_loss",
    ]
    attribute_map = {  # noqa: RUF012 (the base class wants a plain dict)
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    def __post_init__(self, **kwargs):
        check_types(self)
        check_extra_fields(type(self), kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.moba_full_attention_layers = sorted(set(self.moba_full_attention_layers or []))
        for field in ("mtp_num_blocks", "eos_token_id"):
            if isinstance(getattr(self, field), tuple):
                setattr(self, field, list(getattr(self, field)))
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        # The width that transformers' RoPE functions rotate
        self.head_dim = self.qk_rope_head_dim if self.attention == "mla" else self.qk_head_dim
        kwargs = {name: value for name, value in kwargs.items() if name not in ("qk_head_dim", "head_dim")}  # as saved
        self.rope_parameters = rope_of("rope_parameters", self.rope_parameters)
        if "rope_scaling" in kwargs:
            kwargs["rope_scaling"] = rope_of("rope_scaling", kwargs["rope_scaling"])
        if self.rope_parameters.get("rope_type") == "yarn":
            self.rope_parameters.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        super().__post_init__(**kwargs)
        self.rope_parameters = rope_of("rope_parameters", self.rope_parameters)  # a rope_theta of its own joined it
        self.auto_map = getattr(self, "auto_map", None) or {}  # TRL reads it for its reference model
        check_rope(self)
        check_fit(self)

    @property
    def mtp_blocks(self) -> list[int]:
        """Number of blocks of each MTP module."""
        if isinstance(self.mtp_num_blocks, int):
            return [self.mtp_num_blocks] * self.num_nextn_predict_layers
        return list(self.mtp_num_blocks)

    @property
    def padding_row(self) -> int | None:
        """The row of the embedding that stays zero: the padding token's, unless that token begins or ends texts too."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return None if self.pad_token_id in (self.bos_token_id, *ends) else self.pad_token_id

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks in the main model and the MTP modules together."""
        return self.num_hidden_layers + sum(self.mtp_blocks)

    @property
    def kv_cache_numbers_per_token(self) -> int:
        """Numbers cached per token and block: the latent and the shared rotary key, or GQA's keys and values."""
        if self.attention == "gqa":
            return self.num_key_value_heads * (self.qk_head_dim + self.v_head_dim)
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moba_layer(self, layer_idx: int) -> bool:
        """Return whether a block attends to chosen key blocks only."""
        return self.moba_topk > 0 and layer_idx not in self.moba_full_attention_layers

    def has_latent_embedding(self, layer_idx: int) -> bool:
        """Return whether a block adds an embedding of the token to its latents. Only MLA has latents."""
        every = self.latent_embedding_every if self.attention == "mla" else 0
        return every > 0 and layer_idx < self.num_hidden_layers and (layer_idx + 1) % every == 0

    def attention_scale(self) -> float:
        """Return the softmax scale: 1 / sqrt(d_nope + d_rope), times mscale² with YaRN (DeepSeek-V2 §3.1.4)."""
        scale, rope = self.qk_head_dim**-0.5, self.rope_parameters
        mscale, factor = rope.get("mscale_all_dim") or 0.0, rope.get("factor") or 1.0
        if rope.get("rope_type", "default") != "default" and mscale and factor > 1:
            scale *= (0.1 * mscale * math.log(factor) + 1.0) ** 2
        return scale
