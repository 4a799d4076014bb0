"""What every attention of the model shares: its settings, the softmax over the keys in sight, and its output."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache

from .attention import attend
from .configuration_moonwhale import MoonwhaleConfig
from .documents import Documents
from .flex import attention as flex_attention
from .flex import serves as flex_serves
from .moba import moba_attention, moba_mask
from .rope import rotation_table
from .step_statistics import Statistics, collects, keep_largest_


class Attention(Statistics):
    """The settings of one block's attention, and what QK-Clip reads after a step.

    The buffer `max_logit` (heads,) holds each head's largest scaled logit since the last optimizer step.
    `clip_qk_` of each attention reads it.
    """

    max_logit: Tensor
    o_proj: nn.Linear

    def __init__(self, config: MoonwhaleConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads = config.num_attention_heads
        self.interleaved, self.scale = config.rope_interleave, config.attention_scale()
        self.block_size = config.moba_block_size
        self.topk = config.moba_topk if config.is_moba_layer(layer_idx) else 0
        self.register_buffer("max_logit", torch.full((self.heads,), -torch.inf, dtype=torch.float32), persistent=False)

    def with_defaults(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, documents: Documents | None, cache: Cache | None
    ) -> tuple[tuple[Tensor, Tensor], Documents]:
        """Return both as given. One that is None describes rows that hold one document each: the cached tokens, then
        those of x (B, T, hidden).
        """
        batch, length, _ = x.shape
        if documents is None:
            past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
            documents = Documents.from_inputs(batch, past + length, x.device)
        if rotation is None:
            rotation = rotation_table(self.config, documents.positions[:, -length:], x.dtype)
        return rotation, documents

    def _output(
        self, out: Tensor, max_logit: Tensor, documents: Documents, collect_statistics: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """Project what the heads computed, `out` (B, heads, Tq, Dv). If `collect_statistics` says so, the largest
        scaled logit of each query, `max_logit` (B, heads, Tq), counts in the buffer of that name.

        Returns:
            (B, Tq, hidden), and the largest logit of each head (heads,), or None if not every token was a query.
        """
        out, largest = join_heads(out, max_logit, documents)
        if largest is not None and collects(collect_statistics):
            keep_largest_(self.max_logit, largest)
        return self.o_proj(out), largest


def attend_to_documents(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents, block_size: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Compute causal attention of q, k (B, H, T, D) and v (B, H, T, Dv) within documents, on the path that suits the
    device. `topk` is MoBA's; 0 is full attention.

    Returns:
        out (B, H, T, Dv), and the largest scaled logit of each query (B, H, T).
    """
    if flex_serves(q, documents):
        return flex_attention(q, k, v, scale, documents, block_size, topk)
    if topk:
        return moba_attention(q, k, v, scale, documents, block_size, topk)
    return attend(q, k, v, scale, causal=True, document_ids=documents.ids_to_mask_by)


def seen_keys(products: Tensor, documents: Documents, block_size: int, topk: int) -> Tensor:
    """Return which keys the last Tq tokens attend to, (B, heads or 1, Tq, Tk), for all q·k (B, heads, Tq, Tk)."""
    if topk:
        return moba_mask(products, documents, block_size, topk)
    return documents.visible(products.shape[-2])[:, None]


def softmax_weights(products: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the softmax of all q·k (B, heads, Tq, Tk) over the `seen` keys, in their dtype, and the largest scaled
    logit of each query (B, heads, Tq).
    """
    wide = products.to(torch.promote_types(products.dtype, torch.float32))
    logits = (wide * scale).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).to(products.dtype), logits.amax(-1)


def join_heads(out: Tensor, max_logit: Tensor, documents: Documents) -> tuple[Tensor, Tensor | None]:
    """Join the heads' outputs (B, heads, Tq, Dv) as (B, Tq, heads * Dv), with zeros for padding, whose keys depend on
    the batch's longest row.

    Returns:
        them, and each head's largest logit over the valid tokens (heads,), or None if not every token was a query.
    """
    n_queries, n_tokens = out.shape[2], documents.document_ids.shape[1]
    if documents.may_have_padding:
        padding = documents.document_ids[:, -n_queries:] < 0
        out = out.masked_fill(padding[:, None, :, None], 0.0)
    out = out.transpose(1, 2).flatten(2)
    if n_queries < n_tokens:
        return out, None
    return out, max_logit.detach().masked_fill(~documents.valid[:, None], -torch.inf).amax((0, 2))


def scale_rows_(weight: Tensor, factors: Tensor) -> None:
    """Multiply each row by its factor, `factors` (heads, rows per head). A weight or bias may be sharded over ranks."""
    factors = factors.reshape(-1, *[1] * (weight.ndim - 1))
    weight.mul_(DTensor.from_local(factors, weight.device_mesh) if isinstance(weight, DTensor) else factors)
