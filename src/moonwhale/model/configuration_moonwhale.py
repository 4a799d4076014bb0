"""`MoonwhaleConfig`: the fields of config_fields.py as a transformers configuration, with what follows from them."""

import math

from transformers import PreTrainedConfig
from transformers.utils import logging

from .config_fields import ConfigFields

log = logging.get_logger(__name__)

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "max_position_embeddings")
HEAD_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
COUNTS = ("num_hidden_layers", "num_attention_heads", "n_routed_experts", "num_experts_per_tok")
MAY_BE_ZERO = ("first_k_dense_replace", "moba_topk", "moba_key_conv", "num_nextn_predict_layers", "n_shared_experts")
BALANCE_LOSSES = ("sequence", "expert", "device", "none")
SCORING_FUNCS = ("sigmoid", "softmax")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # those whose frequencies do not depend on the length


class MoonwhaleConfig(ConfigFields, PreTrainedConfig):
    """Every dimension of a moonwhale model. `ConfigFields` declares and explains the fields.

    Raises:
        ValueError: a combination that cannot work, in one line with the field, its value and the fix.
    """

    model_type = "moonwhale"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 (the base class wants a plain dict)
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.moba_full_attention_layers = sorted(self.moba_full_attention_layers or [])
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim  # the width that transformers' RoPE functions rotate
        if isinstance(self.rope_parameters, dict) and self.rope_parameters.get("rope_type") == "yarn":
            self.rope_parameters.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        super().__post_init__(**kwargs)
        self.auto_map = getattr(self, "auto_map", None) or {}  # TRL reads it for its reference model
        self._check()

    @property
    def mtp_blocks(self) -> list[int]:
        """Number of blocks of each MTP module."""
        if isinstance(self.mtp_num_blocks, int):
            return [self.mtp_num_blocks] * self.num_nextn_predict_layers
        return list(self.mtp_num_blocks)

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks in the main model and the MTP modules together."""
        return self.num_hidden_layers + sum(self.mtp_blocks)

    @property
    def kv_cache_numbers_per_token(self) -> int:
        """Numbers cached per token and block: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moba_layer(self, layer_idx: int) -> bool:
        """Return whether a block attends to chosen key blocks only."""
        return self.moba_topk > 0 and layer_idx not in self.moba_full_attention_layers

    def attention_scale(self) -> float:
        """Return the softmax scale: 1 / sqrt(d_nope + d_rope), times mscale² with YaRN (DeepSeek-V2 §3.1.4)."""
        scale, rope = self.qk_head_dim**-0.5, self.rope_parameters
        mscale, factor = rope.get("mscale_all_dim") or 0.0, rope.get("factor") or 1.0
        if rope.get("rope_type", "default") != "default" and mscale and factor > 1:
            scale *= (0.1 * mscale * math.log(factor) + 1.0) ** 2
        return scale

    # What cannot work, topic by topic

    def _check(self) -> None:
        self._check_sizes()
        self._check_attention()
        self._check_experts()
        self._check_expert_groups()

    def _require(self, ok: bool, field: str, fix: str) -> None:
        if not ok:
            raise ValueError(f"{field}={getattr(self, field)!r} is impossible: {fix}")

    def _check_sizes(self) -> None:
        for field in SIZES + HEAD_SIZES + COUNTS:
            self._require(_is_whole(getattr(self, field), 1), field, "give a whole number, at least 1")
        for field in MAY_BE_ZERO:
            self._require(_is_whole(getattr(self, field), 0), field, "give a whole number, at least 0")
        for field in ("bias_update_speed", "aux_loss_alpha", "mtp_loss_weight"):
            value = getattr(self, field)
            self._require(isinstance(value, int | float) and value >= 0, field, "give a number, at least 0")
        self._require(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            f"it lies between 0 and vocab_size={self.vocab_size}, or is null",
        )
        self._require(self.hidden_act == "silu", "hidden_act", "the experts' activation is SwiGLU's: silu")
        self._require(
            len(self.mtp_blocks) == self.num_nextn_predict_layers and all(n >= 1 for n in self.mtp_blocks),
            "mtp_num_blocks",
            f"give one number >= 1, or one for each of the num_nextn_predict_layers={self.num_nextn_predict_layers}",
        )

    def _check_attention(self) -> None:
        self._require(
            self.q_lora_rank is None or _is_whole(self.q_lora_rank, 1),
            "q_lora_rank",
            "give a width, or null for uncompressed queries",
        )
        self._require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "RoPE rotates pairs, so it must be even")
        self._require(
            self.rope_parameters.get("rope_type") in ROPE_TYPES,
            "rope_parameters",
            f"choose a rope_type from {', '.join(ROPE_TYPES)}",
        )
        self._require(
            self.num_key_value_heads == self.num_attention_heads,
            "num_key_value_heads",
            f"latent attention has as many key heads as query heads ({self.num_attention_heads})",
        )
        self._require(self.attention_dropout == 0.0, "attention_dropout", "attention here has no dropout; set it to 0")
        self._require(
            _is_whole(self.moba_block_size, 1),
            "moba_block_size",
            "a block holds at least one key; moba_topk=0 switches MoBA off",
        )
        self._require(
            all(0 <= i < self.num_blocks for i in self.moba_full_attention_layers),
            "moba_full_attention_layers",
            f"block indices go from 0 to {self.num_blocks - 1}",
        )

    def _check_experts(self) -> None:
        has_experts = self.first_k_dense_replace < self.num_blocks
        for field in ("hidden_size", "moe_intermediate_size") if has_experts else ():
            self._require(getattr(self, field) % 8 == 0, field, "experts' grouped products want a multiple of 8")
        self._require(self.scoring_func in SCORING_FUNCS, "scoring_func", f"choose one of {', '.join(SCORING_FUNCS)}")
        self._require(self.balance_loss in BALANCE_LOSSES, "balance_loss", f"choose one of {', '.join(BALANCE_LOSSES)}")
        if has_experts and self.num_experts_per_tok == 1 and self.norm_topk_prob:
            log.warning_once(
                "num_experts_per_tok=1 with norm_topk_prob=true: every gate is 1, so the prediction loss gives the "
                "router no gradient (set norm_topk_prob to false)"
            )

    def _check_expert_groups(self) -> None:
        for field in ("n_group", "n_device_groups"):
            groups = getattr(self, field)
            self._require(
                groups >= 1 and self.n_routed_experts % groups == 0,
                field,
                f"it must divide n_routed_experts={self.n_routed_experts}",
            )
        self._require(
            1 <= self.topk_group <= self.n_group, "topk_group", f"it lies between 1 and n_group={self.n_group}"
        )
        self._require(
            self.n_group == 1 or self.n_routed_experts // self.n_group >= 2,
            "n_group",
            "a group is scored by its two best experts, so it needs at least two",
        )
        self._require(
            self.num_experts_per_tok <= self.topk_group * self.n_routed_experts // self.n_group,
            "num_experts_per_tok",
            f"topk_group={self.topk_group} of n_group={self.n_group} groups hold fewer experts than that, with "
            f"n_routed_experts={self.n_routed_experts}",
        )


def _is_whole(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
