"""Mixture of Block Attention (arXiv 2502.13189): each query attends to its own block and to the few earlier ones its
gate chooses.

The gate of a query to a block is its product with the block's mean key, has no parameters, and chooses per head. The
fast path does only the chosen work: own blocks as one causal batch, chosen earlier blocks as chunks of the queries that
chose them, and both merged by their log-sum-exp. `moba_mask` is its dense twin, which decoding uses as well.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import attend, attend_backward, attend_forward
from .documents import BlockTable, Documents, unseen

QUERIES = 256  # most queries of one chunk of the sparse path
STEP = 16  # chunks by which their number grows: a kernel library compiles a product for each shape it meets


def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents, block_size: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Sparse attention of q, k (B, H, T, D) and v (B, H, T, Dv), both work and memory linear in T * topk * block_size.

    If `documents.plain`, the queries may be the last tokens only, from the start of a block on. There is no gradient
    then. So a long prompt can be read in pieces.

    Returns:
        out (B, H, Tq, Dv), and each query's largest scaled logit (B, H, Tq) in fp32.
    """
    table, length = documents.blocks(block_size), q.shape[2]
    if topk >= table.count:  # every block is chosen
        return attend(q, k, v, scale, causal=True, segment=documents.packing)
    out, top = _MoBA.apply(*(table.to_slots(x) for x in (q, k, v)), scale, table, topk - 1)
    return table.to_tokens(out, length), table.to_tokens(top, length)


@torch.no_grad()
def choose_blocks(q: Tensor, k: Tensor, table: BlockTable, n: int) -> Tensor:
    """The `n` earlier blocks with the best gates, (B, H, S, n) by slot; -1 where there are fewer. q (B, H, S, D) has
    all slots, or the last ones.
    """
    batch, heads, slots, width = q.shape
    means = k.float().view(batch, heads, table.count, table.size, width).mean(3)
    with torch.autocast(q.device.type, enabled=False):  # which would round both, and choose other blocks
        gates = q.float() @ means.transpose(-1, -2)
    block = torch.arange(table.count, device=q.device)
    own = block.repeat_interleave(table.size)[-slots:, None]
    earlier = (block < own) & (block >= table.first.repeat_interleave(table.size, dim=1)[:, -slots:, None])
    gates.masked_fill_(~earlier[:, None], -torch.inf)
    values, index = gates.topk(min(n, table.count), dim=-1)
    return index.masked_fill_(values == -torch.inf, -1)


@dataclass
class Chunks:
    """The (query, chosen block) pairs, lined up by block in C chunks of W queries, each chunk with its block's keys.

    Queries are numbered through all B * H * S slots, blocks through all B * H * count.
    """

    query: Tensor  # (C, W) its query; 0 where the chunk is not full
    empty: Tensor  # (C, W) where the chunk is not full
    block: Tensor  # (C,)
    place: Tensor  # (B * H * S, n) where in the C * W a pair sits; 0 for a query that chose fewer blocks
    missing: Tensor  # (B * H * S, n) these

    @classmethod
    def of(cls, chosen: Tensor, count: int, width: int) -> "Chunks | None":
        """From `choose_blocks`' (B, H, S, n) of `count` blocks; None if it is seen that nothing was chosen."""
        heads, n, device = chosen.shape[0] * chosen.shape[1], chosen.shape[3], chosen.device
        groups, missing = heads * count, (chosen < 0).view(-1, n)
        block = chosen.view(heads, -1) + torch.arange(heads, device=device)[:, None] * count
        block, pair = block.flatten().masked_fill(missing.flatten(), groups).sort(stable=True)
        if not unseen(device):
            n_pairs = block.numel() - int(missing.sum())
            if not n_pairs:
                return None
            block, pair = block[:n_pairs], pair[:n_pairs]
        last = torch.searchsorted(block, torch.arange(groups + 1, device=device), right=True)
        sizes = last.diff(prepend=last.new_zeros(1))
        chunks = -(-sizes[:-1] // width)
        ends = chunks.cumsum(0)
        total = len(pair) // width + groups if unseen(device) else -(-int(ends[-1]) // STEP) * STEP
        begin = F.pad((ends - chunks) * width, (0, 1)) - (last - sizes)
        place = torch.arange(len(pair), device=device) + begin[block]
        query = torch.full((total * width + 1,), -1, device=device)
        query[torch.where(block < groups, place, total * width)] = pair // n
        query = query[:-1].view(total, width)
        place_of_pair = torch.zeros(chosen.numel(), dtype=torch.long, device=device)
        place_of_pair[pair] = place
        block = torch.searchsorted(ends, torch.arange(total, device=device), right=True).clamp_(max=groups - 1)
        return cls(query.clamp(min=0), query < 0, block, place_of_pair.view(-1, n).masked_fill_(missing, 0), missing)


class _MoBA(torch.autograd.Function):
    """Every query's own block and its chosen earlier ones, each a partial attention, merged by their log-sum-exp.

    With the output of the whole and its share in it, the gradient of a part is that of plain attention (see
    `attend_backward`), so that the merge needs none of its own. The probabilities are kept: they grow as the tokens.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, table, n):
        batch, heads, slots, _ = q.shape
        q, k, v = (x.contiguous() for x in (q, k, v))
        own = (q, k[:, :, -slots:], v[:, :, -slots:])
        own = (x.reshape(-1, table.size, x.shape[-1]) for x in own)
        probs, shares = [] if any(ctx.needs_input_grad) else None, ()
        out, lse, top = attend_forward(*own, scale, causal=True, kept=probs)
        out, lse, top = out.flatten(0, 1), lse.flatten(), top.flatten()
        # A chunk copies its block, so that it should have as many queries as keys, about.
        width = min(QUERIES, max(table.size, 64))
        chunks = Chunks.of(choose_blocks(q, k, table, n), table.count, width) if n else None
        if chunks is not None:
            # Blocks before a query's own are full, so that nothing in a chunk needs a mask.
            far = attend_forward(*_gather(chunks, table, q, k, v), scale, causal=False, kept=probs)
            far_lse, far_top = (x.view(-1)[chunks.place].masked_fill_(chunks.missing, -torch.inf) for x in far[1:])
            top = torch.maximum(top, far_top.amax(-1))
            parts = torch.cat([lse.unsqueeze(-1), far_lse], dim=-1)
            lse = parts.logsumexp(-1)
            weights = (parts - lse.unsqueeze(-1)).exp_().to(out.dtype)
            out *= weights[:, :1]
            out += _sum_at(chunks.place, far[0], weights[:, 1:].contiguous())
            far_share = (far[1] - lse[chunks.query]).exp_().masked_fill_(chunks.empty, 0.0)
            shares = (weights[:, :1].contiguous(), far_share.unsqueeze(-1).to(out.dtype))
        ctx.save_for_backward(q, k, v, out, *shares, *(probs or ()))
        ctx.scale, ctx.table, ctx.chunks = scale, table, chunks
        top = top.view(batch, heads, slots)
        ctx.mark_non_differentiable(top)
        return out.view(batch, heads, slots, -1), top

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, _):
        q, k, v, out, *kept = ctx.saved_tensors
        table, chunks = ctx.table, ctx.chunks
        share, far_share, *probs = kept if chunks is not None else (1, 1, *kept)
        probs = iter(probs)  # the tiles of own blocks, then those of chunks
        d_out = d_out.to(v.dtype).reshape(out.shape)
        along = (d_out * out).sum(-1, keepdim=True, dtype=torch.promote_types(out.dtype, torch.float32))

        own = ((x * share).view(-1, table.size, x.shape[-1]) for x in (d_out, along))
        parts = (x.view(-1, table.size, x.shape[-1]) for x in (q, k, v))
        dq, dk, dv = attend_backward(*own, probs, *parts, ctx.scale, causal=True)
        if chunks is not None:
            query = chunks.query.flatten()
            far = (x.index_select(0, query).view(*far_share.shape[:2], -1).mul_(far_share) for x in (d_out, along))
            parts = _gather(chunks, table, q, k, v)
            far_dq, far_dk, far_dv = attend_backward(*far, probs, *parts, ctx.scale, causal=False)
            taken = (~chunks.missing).to(dq.dtype)
            dq = dq.flatten(0, 1).add_(_sum_at(chunks.place, far_dq, taken))
            dk.index_add_(0, chunks.block, far_dk)
            dv.index_add_(0, chunks.block, far_dv)
        return *(dx.to(q.dtype).view_as(x) for dx, x in ((dq, q), (dk, k), (dv, v))), None, None, None


def _gather(chunks: Chunks, table: BlockTable, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (C, W, D) and keys and values (C, size, D or Dv) of every chunk."""
    queries = q.flatten(0, 2).index_select(0, chunks.query.flatten()).view(*chunks.query.shape, -1)
    return queries, *(x.view(-1, table.size, x.shape[-1]).index_select(0, chunks.block) for x in (k, v))


def _sum_at(place: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Σ_j weights[i, j] * rows[place[i, j]] for rows (C, W, D), (N, D): gathered, weighed and added in one pass."""
    return F.embedding_bag(place, rows.flatten(0, 1), per_sample_weights=weights, mode="sum")


@torch.no_grad()
def moba_mask(products: Tensor, documents: Documents, block_size: int, topk: int) -> Tensor:
    """Which keys the last Tq of Tk tokens attend to, (B, H, Tq, Tk), from all products q·k (B, H, Tq, Tk) before
    scaling.

    The mean over a block of q·k is q·mean(k), so the gate needs nothing but the products, whether they were taken with
    keys or, absorbed, with latents.
    """
    batch, heads, n_queries, n_keys = products.shape
    table = documents.blocks(block_size)
    block = table.block_of(n_keys).expand(batch, -1)
    query = slice(n_keys - n_queries, n_keys)

    real = (documents.segment >= 0)[:, None, None]
    scatter_index = block[:, None, None].expand_as(products)
    gates = products.new_zeros(batch, heads, n_queries, table.count, dtype=torch.float32)
    gates.scatter_add_(3, scatter_index, products.float().masked_fill(~real, 0.0)).div_(block_size)
    own = block[:, query, None]
    candidates = torch.arange(table.count, device=products.device)
    earlier = (candidates < own) & (candidates >= table.first.expand(batch, -1).gather(1, block)[:, query, None])
    gates.masked_fill_(~earlier[:, None], -torch.inf)
    gates.scatter_(3, own[:, None].expand(-1, heads, -1, -1), torch.inf)
    best = gates.topk(min(topk, table.count), dim=-1).indices  # what is not an earlier block is not visible
    taken = torch.zeros_like(gates, dtype=torch.bool).scatter_(3, best, True)
    return taken.gather(3, scatter_index) & documents.visible(n_queries)[:, None]
