"""Mixture of Block Attention (arXiv 2502.13189): each query attends to its own block and to the few earlier ones its
gate chooses.

The gate of a query to a block is its product with the block's mean key, has no parameters, and chooses per head. The
fast path does only the chosen work: own blocks as one causal batch, chosen earlier blocks as chunks of the queries that
chose them, and both merged by their log-sum-exp. `moba_mask` is its dense twin, which decoding uses as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attend
from .layout import BlockTable, Layout

QUERIES = 256  # most queries of one chunk of the sparse path
STEP = 16  # chunks by which their number grows: a kernel library compiles a product for each shape it meets


def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Layout, block_size: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Sparse attention of q, k (B, H, T, D) and v (B, H, T, Dv), both work and memory linear in T * topk * block_size.

    Returns:
        out (B, H, T, Dv), and each query's largest scaled logit (B, H, T) in fp32.
    """
    table, length = layout.blocks(block_size), q.shape[2]
    if topk >= table.count:  # every block is chosen
        out, _, top = attend(q, k, v, scale, causal=True, segment=layout.packing)
        return out, top

    q, k, v = table.to_slots(q), table.to_slots(k), table.to_slots(v)
    batch, heads, slots, _ = q.shape
    count, size = table.count, table.size

    def blocked(x: Tensor) -> Tensor:
        return x.reshape(batch, heads * count, size, -1)

    out, lse, top = (
        x.reshape(batch, heads, slots, *x.shape[3:])
        for x in attend(blocked(q), blocked(k), blocked(v), scale, causal=True)
    )
    if topk > 1:
        chosen = choose_blocks(q, k, table, topk - 1)
        out, top = _merge_history(q, k, v, scale, table, chosen, out, lse, top)
    return table.to_tokens(out, length), table.to_tokens(top, length)


@torch.no_grad()
def choose_blocks(q: Tensor, k: Tensor, table: BlockTable, n: int) -> Tensor:
    """The `n` earlier blocks with the best gates, (B, H, count * size, n) by slot; -1 where there are fewer."""
    batch, heads, _, width = q.shape
    means = k.float().view(batch, heads, table.count, table.size, width).mean(3)
    gates = q.float() @ means.transpose(-1, -2)
    block = torch.arange(table.count, device=q.device)
    own = block.repeat_interleave(table.size)[:, None]
    earlier = (block < own) & (block >= table.first.repeat_interleave(table.size, dim=1)[:, :, None])
    gates.masked_fill_(~earlier[:, None], -torch.inf)
    values, index = gates.topk(min(n, table.count), dim=-1)
    return index.masked_fill_(values == -torch.inf, -1)


def _merge_history(q, k, v, scale, table, chosen, out, lse, top):
    """Adds what each query finds in its `chosen` blocks to the (out, lse, top) of its own block."""
    batch, heads, slots, n = chosen.shape
    groups = batch * heads * table.count  # one for each block of each head
    width = min(QUERIES, max(table.size, 64))  # a chunk copies its block: as many queries as keys, about

    with torch.no_grad():  # line the queries of each group up in chunks
        group = chosen + (torch.arange(batch * heads, device=q.device) * table.count).view(batch, heads, 1, 1)
        pair = (chosen >= 0).flatten().nonzero().squeeze(1)  # (query, choice) pairs
        group, order = group.flatten()[pair].sort(stable=True)
        pair = pair[order]
        sizes = torch.bincount(group, minlength=groups)
        chunks = -(-sizes // width)
        begin = (chunks.cumsum(0) - chunks) * width
        rank = torch.arange(len(pair), device=q.device) - (sizes.cumsum(0) - sizes)[group]
        place = begin[group] + rank
        total = -(-int(chunks.sum()) // STEP) * STEP
        query = torch.zeros(total * width, dtype=torch.long, device=q.device)
        query[place] = pair // n
        place_of_pair = torch.zeros(batch * heads * slots * n, dtype=torch.long, device=q.device)
        place_of_pair[pair] = place
        block = torch.arange(groups, device=q.device).repeat_interleave(chunks)
        block = F.pad(block, (0, total - len(block)))
    if total == 0:
        return out, top

    # Blocks before a query's own are full, so that nothing in a chunk needs a mask.
    far_out, far_lse, far_top = attend(
        q.flatten(0, 2).index_select(0, query).view(1, total, width, -1),
        k.reshape(groups, table.size, -1).index_select(0, block).unsqueeze(0),
        v.reshape(groups, table.size, -1).index_select(0, block).unsqueeze(0),
        scale,
        causal=False,
    )
    missing = chosen < 0
    far_out = far_out.view(total * width, -1).index_select(0, place_of_pair).view(batch, heads, slots, n, -1)
    far_lse = far_lse.flatten().index_select(0, place_of_pair).view_as(chosen).masked_fill(missing, -torch.inf)
    far_top = far_top.flatten().index_select(0, place_of_pair).view_as(chosen).masked_fill(missing, -torch.inf)

    weights = torch.cat([lse.unsqueeze(-1), far_lse], dim=-1).softmax(-1).to(out.dtype)
    out = weights[..., :1] * out + (weights[..., 1:, None] * far_out).sum(-2)
    return out, torch.maximum(top, far_top.amax(-1))


@torch.no_grad()
def moba_mask(products: Tensor, layout: Layout, block_size: int, topk: int) -> Tensor:
    """Which keys the last Tq of Tk tokens attend to, (B, H, Tq, Tk), from all products q·k (B, H, Tq, Tk) before
    scaling.

    The mean over a block of q·k is q·mean(k), so the gate needs nothing but the products, whether they were taken with
    keys or, absorbed, with latents.
    """
    batch, heads, n_queries, n_keys = products.shape
    table = layout.blocks(block_size)
    block = table.block_of(n_keys).expand(batch, -1)
    query = slice(n_keys - n_queries, n_keys)

    real = (layout.segment >= 0)[:, None, None]
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
    return taken.gather(3, scatter_index) & layout.visible(n_queries)[:, None]
