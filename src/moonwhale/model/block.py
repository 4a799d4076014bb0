"""One transformer block: attention, then experts or a dense network, each after a norm and with a residual."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from .documents import Documents
from .gqa import GroupedQueryAttention
from .mla import MultiheadLatentAttention
from .moe import MLP, DeepseekMoE
from .norm import RMSNorm
from .step_statistics import keep_largest_


class BlockStatistics(NamedTuple):
    """What a block measured in one forward pass, over the valid tokens.

    A block returns it and stores nothing, because activation checkpointing runs a forward pass twice.
    """

    max_logit: Tensor | None  # (heads,) largest scaled attention logit; None when decoding from a cache
    balance: Tensor | None  # 0-d weighted balance loss; None for a dense block
    load: Tensor | None  # (E,) tokens that chose each expert; None for a dense block
    attention: Tensor | None = None  # (B, heads, Tq, Tk) the softmax's weights; None unless asked for


class Block(GradientCheckpointingLayer):
    """Block `layer_idx` of the model. The first `first_k_dense_replace` blocks have a dense network, not experts."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        attention = MultiheadLatentAttention if config.attention == "mla" else GroupedQueryAttention
        self.self_attn = attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = MLP(config, config.intermediate_size) if dense else DeepseekMoE(config, initialise=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        documents: Documents,
        cache=None,
        output_attentions: bool = False,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Apply the block to x (B, T, hidden). See `MultiheadLatentAttention.forward` for the arguments.

        Returns:
            the new x (B, T, hidden), and the fields of `BlockStatistics`. They are not nested, since reentrant
            checkpointing loses the gradient of what is.
        """
        attended, max_logit, *weights = self.self_attn(
            self.input_layernorm(x), rotation, documents, cache, output_attentions, False, input_ids
        )
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed), *BlockStatistics(max_logit, None, None, *weights)
        out, balance, load = self.mlp(normed, documents.valid[:, -x.shape[1] :], collect_statistics=False)
        return x + out, *BlockStatistics(max_logit, balance, load, *weights)

    @torch.no_grad()
    def collect(self, statistics: BlockStatistics) -> None:
        """Add a training batch's statistics to the buffers that QK-Clip and the bias update read after the step."""
        if statistics.max_logit is not None:
            keep_largest_(self.self_attn.max_logit, statistics.max_logit)
        if statistics.load is not None:
            self.mlp.load += statistics.load
