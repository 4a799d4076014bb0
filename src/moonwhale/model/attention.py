"""Exact softmax attention, a tile of queries at a time, never the whole score matrix; with row maxima for QK-clip."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 128  # queries of a tile; causal tiles compute only the keys up to their own end
TILE = 1 << 20  # scores of a tile, over as many heads as that allows
LOG2 = math.log(2)  # tiles hold powers of 2, not of e: torch's exp2 is three times as fast as its exp on a CPU


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, segment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, Tq, D) to k (B, H, Tk, D) and v (B, H, Tk, Dv); the width of v is its own (MLA).

    With `segment` (B, Tk), a token sees only tokens of the same number. `causal`: the queries are the last Tq tokens.
    There is a gradient only where they are all of them.

    Returns:
        out (B, H, Tq, Dv), and the largest scaled logit of each row (B, H, Tq) in fp32, not differentiable.
    """
    return _Attend.apply(q, k, v, scale, causal, segment)


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, segment: Tensor | None = None, kept: list | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` for N heads, q (N, Tq, D), k (N, Tk, D) and v (N, Tk, Dv) all contiguous; `kept` gets the probabilities.

    Returns:
        out (N, Tq, Dv); the log-sum-exp of each row (N, Tq) in fp32, which is what merging partial attentions needs;
        and the largest scaled logit of each row (N, Tq) in fp32.
    """
    out, top = v.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=_wide(q))
    lse = torch.empty_like(top)
    for tile in _tiles(len(q), q.shape[1], k.shape[1], causal):
        head, rows, keys = tile
        scores = _scores(q, k, scale, causal, segment, tile)
        peak = scores.amax(-1, keepdim=True)
        probs = scores.sub_(peak).exp2_()
        total = probs.sum(-1, keepdim=True)
        probs = probs.div_(total).to(v.dtype)
        out[head, rows] = probs @ v[head, keys]
        if kept is not None:
            kept.append(probs)
        top[head, rows], lse[head, rows] = peak.squeeze(-1) * LOG2, (peak + total.log2_()).squeeze(-1) * LOG2
    return out, lse, top


def attend_backward(
    d_out: Tensor, along: Tensor, probs: Iterable[Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attend_forward`'s q, k and v, the last two in fp32, from the probabilities of each tile.

    `along` (N, Tq, 1) is the product of each row of `d_out` (N, Tq, Dv) with its output. If `k` and `v` are a part of
    what the queries attend to, it is that of the whole, and both come times the part's share in each row's softmax.
    """
    wide = along.dtype
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k, dtype=wide), torch.empty_like(v, dtype=wide)
    for (head, rows, keys), p in zip(_tiles(len(q), q.shape[1], k.shape[1], causal), probs, strict=False):
        dp = (d_out[head, rows] @ v[head, keys].transpose(1, 2)).to(wide)
        dv_tile = p.to(v.dtype).transpose(1, 2) @ d_out[head, rows]
        ds = dp.sub_(along[head, rows]).mul_(scale).mul_(p.to(wide)).to(q.dtype)  # P * (dP - rowsum(dO * O))
        dq[head, rows] = ds @ k[head, keys]
        dk_tile = ds.transpose(1, 2) @ q[head, rows]
        if rows.stop == q.shape[1]:  # the first tile of these heads
            dk[head], dv[head] = dk_tile, dv_tile
        else:
            dk[head, keys] += dk_tile
            dv[head, keys] += dv_tile
    return dq, dk, dv


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(heads: int, n_queries: int, n_keys: int, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts (heads, queries, keys) into tiles, the last queries first: they see all keys."""
    height = max(1, TILE // (min(CHUNK, n_queries) * n_keys))
    for head in range(0, heads, height):
        for start in reversed(range(0, n_queries, CHUNK)):
            stop = min(start + CHUNK, n_queries)
            yield (
                slice(head, min(head + height, heads)),
                slice(start, stop),
                slice(0, n_keys - n_queries + stop if causal else n_keys),
            )


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, segment: Tensor | None, tile) -> Tensor:
    """Scaled and masked logits of a tile of q and k (N, T, D), as powers of 2, in fp32: a CPU is slow in bf16."""
    head, rows, keys = tile
    scores = torch.baddbmm(q.new_empty(()), q[head, rows], k[head, keys].transpose(1, 2), beta=0, alpha=scale / LOG2)
    scores = scores.to(_wide(q))
    if segment is not None:
        batch = torch.arange(head.start, head.stop, device=q.device) // (len(q) // len(segment))
        scores.masked_fill_(segment[batch, -q.shape[1] :][:, rows, None] != segment[batch, None, keys], -torch.inf)
    if causal:
        size = rows.stop - rows.start
        future = scores.new_full((size, size), -torch.inf).triu_(1)
        scores[:, :, -size:] += future  # on a CPU four times as fast as filling by a mask
    return scores


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, causal, segment):
        shape = q.shape[:3]
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        out, lse, top = attend_forward(q, k, v, scale, causal, segment)
        ctx.save_for_backward(q, k, v, out, lse, segment)
        ctx.scale, ctx.causal, ctx.shape = scale, causal, shape
        top = top.view(shape)
        ctx.mark_non_differentiable(top)
        return out.unflatten(0, shape[:2]), top

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, _):
        q, k, v, out, lse, segment = ctx.saved_tensors
        d_out = d_out.to(v.dtype).reshape(out.shape)
        along = (d_out * out).sum(-1, keepdim=True, dtype=lse.dtype)
        tiles = _tiles(len(q), q.shape[1], k.shape[1], ctx.causal)
        scores = ((tile, _scores(q, k, ctx.scale, ctx.causal, segment, tile)) for tile in tiles)
        probs = (s.sub_(lse[head, rows, None] / LOG2).exp2_() for (head, rows, _), s in scores)
        grads = attend_backward(d_out, along, probs, q, k, v, ctx.scale, ctx.causal)
        return *(dx.to(q.dtype).unflatten(0, ctx.shape[:2]) for dx in grads), None, None, None
