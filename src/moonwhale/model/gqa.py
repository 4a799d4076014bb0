"""Grouped-query attention (arXiv 2305.13245) as Llama has it, full or over MoBA's blocks: the plain twin of mla.py.

Each group of query heads shares one head of keys and values; with as many of these as query heads it is multi-head
attention. The whole width of queries and keys is rotated, and the cache holds the keys and values themselves. A head is
as wide as MLA's: `qk_nope_head_dim + qk_rope_head_dim` for queries and keys, `v_head_dim` for values.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_moonwhale import MoonwhaleConfig
from .core import Attention, attend_to_documents, scale_rows_, seen_keys, softmax_weights
from .documents import Documents
from .rope import rotate


class GroupedQueryAttention(Attention):
    """The attention of one block. Parameters are named as in Llama's checkpoints."""

    def __init__(self, config: MoonwhaleConfig, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.kv_heads = config.num_key_value_heads
        hidden, bias, width, v_width = (
            config.hidden_size,
            config.attention_bias,
            config.qk_head_dim,
            config.v_head_dim,
        )
        self.q_proj = nn.Linear(hidden, self.heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * v_width, bias=bias)
        self.o_proj = nn.Linear(self.heads * v_width, hidden, bias=bias)
        self.o_proj.starts_at_zero = config.zero_init_residual

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
        collect_statistics: bool | None = None,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Attend from the newest Tq tokens to all Tk tokens.

        Arguments and results are those of `MultiheadLatentAttention.forward`, but a cache holds keys
        (B, kv_heads, Tk, D) and values (B, kv_heads, Tk, Dv), and `input_ids` has no use here.
        """
        rotation, documents = self.with_defaults(x, rotation, documents, cache)
        q = rotate(self._by_head(self.q_proj(x), self.heads), rotation, self.interleaved)
        k = rotate(self._by_head(self.k_proj(x), self.kv_heads), rotation, self.interleaved)
        v = self._by_head(self.v_proj(x), self.kv_heads)
        if cache is not None:
            n_tokens = documents.document_ids.shape[1]  # a static cache returns its unused end too
            k, v = (y[:, :, :n_tokens] for y in cache.update(k, v, self.layer_idx))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))  # (B, heads, Tk, …)

        weights, every_token_is_a_query = (), k.shape[2] == x.shape[1]
        if every_token_is_a_query and not output_attentions:
            out, max_logit = attend_to_documents(q, k, v, self.scale, documents, self.block_size, self.topk)
        else:
            products = q @ k.transpose(-1, -2)
            seen = seen_keys(products, documents, self.block_size, self.topk)
            probs, max_logit = softmax_weights(products, seen, self.scale)
            out, weights = probs @ v, (probs,) if output_attentions else ()
        return *self._output(out, max_logit, documents, collect_statistics), *weights

    def _by_head(self, x: Tensor, heads: int) -> Tensor:
        """Reshape (B, T, heads * width) to (B, heads, T, width)."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    @torch.no_grad()
    def clip_qk_(self, tau: float) -> Tensor:
        """Apply QK-Clip (Kimi K2, §2.1): shrink the heads whose `max_logit` exceeds tau.

        With γ = min(1, tau / max_logit), a head's rows of W_Q and of W_K are multiplied by √γ, so that its logits
        shrink by γ. Where several query heads share a key head, only W_Q's rows are multiplied, by γ: a smaller key
        would shrink the logits of the other heads too. Nothing happens if one of the two weights is frozen.

        Returns:
            the number of clipped heads, a 0-d tensor.
        """
        if not (self.q_proj.weight.requires_grad and self.k_proj.weight.requires_grad):
            return torch.zeros((), dtype=torch.long, device=self.max_logit.device)
        above = self.max_logit > tau
        gamma = torch.where(above, tau / self.max_logit, 1.0).to(self.q_proj.weight.dtype)[:, None]
        shared = self.kv_heads < self.heads
        for linear in (self.q_proj,) if shared else (self.q_proj, self.k_proj):
            factors = (gamma if shared else gamma.sqrt()).expand(-1, len(linear.weight) // len(gamma))
            scale_rows_(linear.weight, factors)
            if linear.bias is not None:  # its part of the logits shrinks as well
                scale_rows_(linear.bias, factors)
        return above.sum()
