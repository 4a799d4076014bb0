"""Exact softmax attention, a tile of queries at a time, never the whole score matrix; with row maxima for QK-clip."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 128  # queries of a tile; causal tiles compute only the keys up to their own end
TILE = 1 << 20  # scores of a tile, over as many heads as that allows


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, segment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q (B, H, Tq, D) to k (B, H, Tk, D) and v (B, H, Tk, Dv); the width of v is its own (MLA).

    With `segment` (B, T), a token sees only tokens of the same number. Causal attention needs Tq = Tk.

    Returns:
        out (B, H, Tq, Dv); the log-sum-exp of each row (B, H, Tq) in fp32, differentiable, which is what merging
        partial attentions needs; and the largest scaled logit of each row (B, H, Tq) in fp32, not differentiable.
    """
    return _Attend.apply(q, k, v, scale, causal, segment)


def _tiles(heads: int, n_queries: int, n_keys: int, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts (heads, queries, keys) into tiles."""
    height = max(1, TILE // (min(CHUNK, n_queries) * n_keys))
    for head in range(0, heads, height):
        for start in range(0, n_queries, CHUNK):
            stop = min(start + CHUNK, n_queries)
            yield slice(head, min(head + height, heads)), slice(start, stop), slice(0, stop if causal else n_keys)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, segment: Tensor | None, tile) -> Tensor:
    """Scaled and masked logits of a tile of q and k (B*H, T, D)."""
    head, rows, keys = tile
    scores = torch.baddbmm(q.new_empty(()), q[head, rows], k[head, keys].transpose(1, 2), beta=0, alpha=scale)
    if segment is not None:
        batch = torch.arange(head.start, head.stop, device=q.device) // (len(q) // len(segment))
        scores.masked_fill_(segment[batch, rows, None] != segment[batch, None, keys], -torch.inf)
    if causal:
        size = rows.stop - rows.start
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1)
        scores[:, :, rows.start :].masked_fill_(future, -torch.inf)
    return scores


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, causal, segment):
        shape = q.shape[:3]
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        lse = q.new_empty(q.shape[:2], dtype=wide)
        top = torch.empty_like(lse)
        for tile in _tiles(len(q), q.shape[1], k.shape[1], causal):
            head, rows, keys = tile
            scores = _scores(q, k, scale, causal, segment, tile)
            probs = scores.softmax(-1, dtype=wide)
            top[head, rows] = scores.amax(-1).to(wide)
            lse[head, rows] = top[head, rows] - probs.amax(-1).log()  # the largest is at least 1 / keys: no underflow
            out[head, rows] = probs.to(v.dtype) @ v[head, keys]
        ctx.save_for_backward(q, k, v, out, segment)
        ctx.scale, ctx.causal, ctx.shape = scale, causal, shape
        ctx.mark_non_differentiable(top)
        ctx.set_materialize_grads(False)
        return tuple(x.view(*shape, *x.shape[2:]) for x in (out, lse, top))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse, _):
        q, k, v, out, segment = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        d_out = torch.zeros_like(out) if d_out is None else d_out.to(v.dtype).reshape(out.shape)
        # dS = P * (dP - rowsum(dO * O) + dLSE): the log-sum-exp's own gradient joins the row term.
        row = (d_out * out).sum(-1, keepdim=True, dtype=wide)
        if d_lse is not None:
            row = row - d_lse.reshape(row.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for tile in _tiles(len(q), q.shape[1], k.shape[1], ctx.causal):
            head, rows, keys = tile
            probs = _scores(q, k, ctx.scale, ctx.causal, segment, tile).softmax(-1, dtype=wide)
            dp = (d_out[head, rows] @ v[head, keys].transpose(1, 2)).to(wide)
            dv[head, keys] += probs.to(v.dtype).transpose(1, 2) @ d_out[head, rows]
            ds = probs.mul_(dp.sub_(row[head, rows])).to(q.dtype)
            dq[head, rows] = (ds @ k[head, keys]).mul_(ctx.scale)
            dk[head, keys].add_(ds.transpose(1, 2) @ q[head, rows], alpha=ctx.scale)
        grads = ((dq, q), (dk, k), (dv, v))
        return *(dx.to(x.dtype).view(*ctx.shape[:2], *x.shape[1:]) for dx, x in grads), None, None, None
