"""One transformer block: latent attention, then experts (or a dense network), each behind a norm and a residual."""

from typing import NamedTuple

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from .documents import Documents
from .mla import MultiheadLatentAttention
from .moe import MLP, DeepseekMoE
from .norm import RMSNorm


class Stats(NamedTuple):
    """What a block measured on the way. Returned, not stored, so that recomputing under activation checkpointing counts
    nothing twice.
    """

    max_logit: Tensor | None  # (heads,) largest scaled attention logit; None when decoding
    balance: Tensor | None  # 0-d weighted balance loss; None for a dense block
    load: Tensor | None  # (E,) tokens that chose each expert; None for a dense block


class Block(GradientCheckpointingLayer):
    """Block `layer_idx`; the first `first_k_dense_replace` have a dense network instead of experts."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiheadLatentAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = MLP(config, config.intermediate_size) if dense else DeepseekMoE(config)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], documents: Documents, cache=None
    ) -> tuple[Tensor, Stats]:
        """(B, T, hidden) to the same, and its statistics. See `MultiheadLatentAttention.forward` for the arguments."""
        attended, max_logit = self.self_attn(self.input_layernorm(x), table, documents, cache)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed), Stats(max_logit, None, None)
        out, balance, load = self.mlp(normed, documents.valid[:, -x.shape[1] :])
        return x + out, Stats(max_logit, balance, load)

    def collect(self, stats: Stats) -> None:
        """Adds a training batch's statistics to what QK-clip and the bias update read at the next optimizer step."""
        if stats.max_logit is not None:
            self.self_attn.max_logit.copy_(self.self_attn.max_logit.maximum(stats.max_logit))
        if stats.load is not None:
            self.mlp.load += stats.load
