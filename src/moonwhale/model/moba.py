"""Mixture of Block Attention (arXiv 2502.13189): each query attends to its own block of keys and to a few earlier ones.

A gate chooses the earlier blocks for each query and head. The gate of query q to a block is the product of q with the
block's mean key, so it has no parameters.

The sparse path computes only what was chosen. Own blocks are one causal batch. Queries that chose the same earlier
block are lined up in chunks, and each chunk meets its block in one product. The log-sum-exp of each part merges them.
`moba_mask` is the dense twin; decoding uses it too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import attend, attend_backward, attend_forward
from .documents import BlockTable, Documents, needs_static_shapes
from .groups import line_up

MAX_CHUNK_WIDTH = 256  # queries per chunk
CHUNK_COUNT_MULTIPLE = 16  # a CPU's kernel library compiles a product for every new shape, so keep the shapes few


def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None, block_size: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Compute sparse attention of q, k (B, H, T, D) and v (B, H, T, Dv). It can be a part of any attention.

    Work and memory are linear in T * topk * block_size. `topk` counts the query's own block; 0 is full attention.
    `scale` is the softmax's, 1 / √D as a rule. Without `documents` (None) each row is one.

    To read a long prompt in pieces, `q` may hold the last Tq tokens only, from the start of a block on. This needs
    `documents.one_per_row` and has no gradient.

    Returns:
        out (B, H, Tq, Dv), and the largest scaled logit of each query (B, H, Tq) in fp32.
    """
    if documents is None:
        documents = Documents.from_inputs(len(k), k.shape[2], k.device)
    table, length = documents.block_table(block_size), q.shape[2]
    every_block_is_chosen = topk == 0 or topk >= table.count
    if every_block_is_chosen:
        return attend(q, k, v, scale, causal=True, document_ids=documents.ids_to_mask_by)
    q, k, v = (table.to_slots(x) for x in (q, k, v))  # (B, H, S, D), S = count * block_size
    out, max_logit = _MoBA.apply(q, k, v, scale, table, topk - 1)
    return table.to_tokens(out, length), table.to_tokens(max_logit, length)


@torch.no_grad()
def choose_blocks(q: Tensor, k: Tensor, table: BlockTable, n: int) -> Tensor:
    """Return the `n` earlier blocks with the largest gates for each slot, (B, H, S, n), and -1 where there are fewer.

    q (B, H, S, D) holds all slots or the last ones; k holds all of them.
    """
    batch, heads, slots, width = q.shape
    means = k.float().view(batch, heads, table.count, table.size, width).mean(3)  # (B, H, count, D)
    with torch.autocast(q.device.type, enabled=False):  # bf16 gates would choose other blocks
        gates = q.float() @ means.transpose(-1, -2)  # (B, H, S, count)
    block = torch.arange(table.count, device=q.device)
    own = block.repeat_interleave(table.size)[-slots:, None]  # (S, 1)
    first = table.first.repeat_interleave(table.size, dim=1)[:, -slots:, None]  # (B or 1, S, 1)
    earlier_in_document = (block < own) & (block >= first)
    gates.masked_fill_(~earlier_in_document[:, None], -torch.inf)
    values, index = gates.topk(min(n, table.count), dim=-1)
    return index.masked_fill_(values == -torch.inf, -1)


@dataclass
class Chunks:
    """Queries lined up by the block they chose, in C chunks of W queries. Each chunk belongs to one block.

    Queries are numbered through all B * H * S slots, blocks through all B * H * count. "Place" is the position of a
    (query, chosen block) pair among the C * W places.
    """

    pair: Tensor  # (C, W) the index of the pair at each place, 0 where the chunk is not full
    query: Tensor  # (C, W) the query of that pair
    empty: Tensor  # (C, W) where the chunk is not full
    block: Tensor  # (C,) the block of each chunk
    place: Tensor  # (B * H * S, n) the place of each pair, 0 for a missing pair
    missing: Tensor  # (B * H * S, n) pairs that do not exist, since the query chose fewer than n blocks

    @classmethod
    def line_up(cls, chosen: Tensor, count: int, width: int, static_shapes: bool) -> "Chunks | None":
        """Line up `chosen` (B, H, S, n), the result of `choose_blocks` among `count` blocks, in as few chunks as
        possible. Return None if no query chose a block.

        With `static_shapes`, read no value: allocate the largest number of chunks that can be needed.
        """
        n = chosen.shape[3]
        missing = chosen < 0
        first_blocks = torch.arange(0, chosen.shape[0] * chosen.shape[1] * count, count, device=chosen.device)
        n_blocks = len(first_blocks) * count
        block = chosen + first_blocks.view(*chosen.shape[:2], 1, 1)
        block = block.masked_fill_(missing, n_blocks).flatten()
        pair, place, ends = line_up(block, n_blocks, width, static_shapes, CHUNK_COUNT_MULTIPLE * width)
        if not len(pair):
            return None
        first_places = torch.arange(0, len(pair), width, device=chosen.device)
        block_of_chunk = torch.searchsorted(ends, first_places, right=True).clamp_(max=n_blocks - 1)
        empty, pair = (pair < 0).view(-1, width), pair.clamp(min=0).view(-1, width)
        missing = missing.view(-1, n)
        return cls(pair, pair // n, empty, block_of_chunk, place.view(-1, n).masked_fill_(missing, 0), missing)


class _MoBA(torch.autograd.Function):
    """Merges partial attentions by their log-sum-exp: each query's own block, and the earlier blocks that it chose.

    The merge needs no gradient of its own. Given the merged output and a part's share in it, the part's gradient is
    that of plain attention (see `attend_backward`). All probabilities are kept, which is linear in the tokens.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, table, n):
        batch, heads, slots, _ = q.shape
        q, k, v = (x.contiguous() for x in (q, k, v))
        probs, shares = [] if any(ctx.needs_input_grad) else None, ()
        own = (q, k[:, :, -slots:], v[:, :, -slots:])
        own = (x.reshape(-1, table.size, x.shape[-1]) for x in own)  # (B * H * blocks, size, D)
        out, lse, max_logit = attend_forward(*own, scale, causal=True, saved_probs=probs)
        out, lse, max_logit = out.flatten(0, 1), lse.flatten(), max_logit.flatten()  # (B * H * S, …)
        chunks = _line_up(q, k, table, n) if n else None
        if chunks is not None:
            # Blocks before a query's own are full, so nothing in a chunk needs a mask.
            far_out, *far = attend_forward(*_gather(chunks, table, q, k, v), scale, causal=False, saved_probs=probs)
            far_lse, far_max = (x.view(-1)[chunks.place].masked_fill_(chunks.missing, -torch.inf) for x in far)
            max_logit = torch.maximum(max_logit, far_max.amax(-1))
            parts = torch.cat([lse.unsqueeze(-1), far_lse], dim=-1)  # (B * H * S, 1 + n)
            lse = parts.logsumexp(-1)
            weights = (parts - lse.unsqueeze(-1)).exp_().to(out.dtype)
            out *= weights[:, :1]
            out += _sum_at(chunks.place, far_out, weights[:, 1:].contiguous())
            far_share = (far[0] - lse[chunks.query]).exp_().masked_fill_(chunks.empty, 0.0)  # (C, W)
            shares = (weights[:, :1].contiguous(), far_share.unsqueeze(-1).to(out.dtype))
        ctx.save_for_backward(q, k, v, out, *shares, *(probs or ()))
        ctx.scale, ctx.table, ctx.chunks = scale, table, chunks
        max_logit = max_logit.view(batch, heads, slots)
        ctx.mark_non_differentiable(max_logit)
        return out.view(batch, heads, slots, -1), max_logit

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, _):
        q, k, v, out, *kept = ctx.saved_tensors
        table, chunks = ctx.table, ctx.chunks
        share, far_share, *probs = kept if chunks is not None else (1, 1, *kept)
        probs = iter(probs)  # the tiles of own blocks, then those of chunks
        d_out = d_out.to(v.dtype).reshape(out.shape)
        out_dot = (d_out * out).sum(-1, keepdim=True, dtype=torch.promote_types(out.dtype, torch.float32))

        own = ((x * share).view(-1, table.size, x.shape[-1]) for x in (d_out, out_dot))
        qkv = (x.view(-1, table.size, x.shape[-1]) for x in (q, k, v))
        dq, dk, dv = attend_backward(*own, probs, *qkv, ctx.scale, causal=True)
        if chunks is not None:
            query = chunks.query.flatten()
            far = (x.index_select(0, query).view(*far_share.shape[:2], -1).mul_(far_share) for x in (d_out, out_dot))
            qkv = _gather(chunks, table, q, k, v)
            far_dq, far_dk, far_dv = attend_backward(*far, probs, *qkv, ctx.scale, causal=False)
            exists = (~chunks.missing).to(dq.dtype)
            dq = dq.flatten(0, 1).add_(_sum_at(chunks.place, far_dq, exists))
            dk.index_add_(0, chunks.block, far_dk)
            dv.index_add_(0, chunks.block, far_dv)
        return *(dx.to(q.dtype).view_as(x) for dx, x in ((dq, q), (dk, k), (dv, v))), None, None, None


def _line_up(q: Tensor, k: Tensor, table: BlockTable, n: int) -> Chunks | None:
    """Choose `n` earlier blocks for every query, and line the queries up by block."""
    width = min(MAX_CHUNK_WIDTH, max(table.size, 64))  # a chunk copies its block, so let it have about as many queries
    return Chunks.line_up(choose_blocks(q, k, table, n), table.count, width, needs_static_shapes(q.device))


def _gather(chunks: Chunks, table: BlockTable, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return every chunk's queries (C, W, D), keys (C, size, D) and values (C, size, Dv)."""
    queries = q.flatten(0, 2).index_select(0, chunks.query.flatten()).view(*chunks.query.shape, -1)
    return queries, *(x.view(-1, table.size, x.shape[-1]).index_select(0, chunks.block) for x in (k, v))


def _sum_at(place: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_j weights[i, j] * rows[place[i, j]], (N, D), for rows (C, W, D), in one pass over memory."""
    return F.embedding_bag(place, rows.flatten(0, 1), per_sample_weights=weights, mode="sum")


@torch.no_grad()
def moba_gates(products: Tensor, documents: Documents, block_size: int) -> Tensor:
    """Return the gate of the last Tq of Tk tokens to each block, (B, H, Tq, count), in fp32.

    `products` (B, H, Tq, Tk) are all q·k before scaling. The mean of q·k over a block is q·mean(k), so the gates follow
    from the products, whether these were computed from keys or, absorbed, from latents. Only gates to full blocks
    before the query's own mean anything.
    """
    batch, heads, n_queries, n_keys = products.shape
    table = documents.block_table(block_size)
    block = table.block_of(n_keys).expand(batch, -1)  # (B, Tk)
    real = (documents.document_ids >= 0)[:, None, None]
    gates = products.new_zeros(batch, heads, n_queries, table.count, dtype=torch.float32)
    products = products.float().masked_fill(~real, 0.0)
    return gates.scatter_add_(3, block[:, None, None].expand_as(products), products).div_(block_size)


@torch.no_grad()
def moba_mask(products: Tensor, documents: Documents, block_size: int, topk: int) -> Tensor:
    """Return which keys the last Tq of Tk tokens attend to, (B, H, Tq, Tk), from all their q·k before scaling."""
    batch, heads, n_queries, n_keys = products.shape
    table = documents.block_table(block_size)
    block = table.block_of(n_keys).expand(batch, -1)  # (B, Tk)
    query = slice(n_keys - n_queries, n_keys)

    gates = moba_gates(products, documents, block_size)
    own = block[:, query, None]  # (B, Tq, 1)
    first = table.first.expand(batch, -1).gather(1, block)[:, query, None]
    candidates = torch.arange(table.count, device=products.device)
    earlier_in_document = (candidates < own) & (candidates >= first)  # (B, Tq, count)
    gates.masked_fill_(~earlier_in_document[:, None], -torch.inf)
    gates.scatter_(3, own[:, None].expand(-1, heads, -1, -1), torch.inf)
    best = gates.topk(min(topk, table.count), dim=-1).indices  # other blocks among them are masked by `visible`
    taken = torch.zeros_like(gates, dtype=torch.bool).scatter_(3, best, True)
    return taken.gather(3, block[:, None, None].expand_as(products)) & documents.visible(n_queries)[:, None]
