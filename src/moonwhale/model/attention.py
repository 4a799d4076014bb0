"""Exact softmax attention, computed tile by tile so that the whole score matrix never exists.

It also returns the largest logit of each query, which QK-Clip needs and `F.scaled_dot_product_attention` does not give.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import compiled_for

QUERIES_PER_TILE = 128  # a causal tile computes only the keys up to its last query
SCORES_PER_TILE = 1 << 20  # a tile takes as many heads as this allows
LN2 = math.log(2)  # scores are powers of 2, not of e: on a CPU torch's exp2 is three times as fast as its exp


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention of q (B, H, Tq, D) to k (B, H, Tk, D) and v (B, H, Tk, Dv). In MLA, Dv differs from D.

    With `document_ids` (B, Tk), a token sees only tokens with the same id. With `causal`, the queries are the last Tq
    tokens. Gradients are defined only if Tq = Tk.

    Returns:
        out (B, H, Tq, Dv), and the largest scaled logit of each query (B, H, Tq) in fp32, not differentiable.
    """
    return _Attend.apply(q, k, v, scale, causal, document_ids)


def attend_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    document_ids: Tensor | None = None,
    saved_probs: list | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass of `attend` for N heads: q (N, Tq, D), k (N, Tk, D) and v (N, Tk, Dv), all contiguous.

    The probabilities of each tile are appended to `saved_probs` if it is given.

    Returns:
        out (N, Tq, Dv); the log-sum-exp of each query (N, Tq) in fp32, by which partial attentions can be merged; and
        the largest scaled logit of each query (N, Tq) in fp32.
    """
    out = v.new_empty(*q.shape[:2], v.shape[-1])
    max_logit = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    lse = torch.empty_like(max_logit)
    for tile in _tiles(len(q), q.shape[1], k.shape[1], causal):
        heads, queries, keys = tile
        if compiled := compiled_for(q, k, v):
            probs = _products(q, k, scale, tile)
            peak, total = compiled.softmax_(probs, causal, _ids(document_ids, len(q), q.shape[1], tile))
        else:
            scores = _scores(q, k, scale, causal, document_ids, tile)  # (heads, queries, keys)
            peak = scores.amax(-1, keepdim=True)
            probs = scores.sub_(peak).exp2_()
            total = probs.sum(-1, keepdim=True)
            probs = probs.div_(total).to(v.dtype)
        out[heads, queries] = probs @ v[heads, keys]
        if saved_probs is not None:
            saved_probs.append(probs)
        max_logit[heads, queries] = peak.squeeze(-1) * LN2
        lse[heads, queries] = (peak + total.log2_()).squeeze(-1) * LN2
    return out, lse, max_logit


def attend_backward(
    d_out: Tensor, out_dot: Tensor, probs: Iterable[Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attend_forward`'s q, k and v from each tile's probabilities; those of k and v are fp32.

    d_out (N, Tq, Dv) is the output's gradient, and out_dot (N, Tq, 1) is the sum of d_out * out over Dv.

    If k and v are only a part of what the queries attend to, `out` in `out_dot` is the merged output. Then multiply
    both `d_out` and `out_dot` by the part's share of each query's softmax.
    """
    wide = out_dot.dtype
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k, dtype=wide), torch.empty_like(v, dtype=wide)
    for (heads, queries, keys), p in zip(_tiles(len(q), q.shape[1], k.shape[1], causal), probs, strict=False):
        dp = d_out[heads, queries] @ v[heads, keys].transpose(1, 2)
        dv_tile = p.to(v.dtype).transpose(1, 2) @ d_out[heads, queries]
        if compiled := compiled_for(q, p, dp):
            ds = compiled.score_gradient_(dp, p, out_dot[heads, queries], scale)  # P * (dP - rowsum(dO * O))
        else:
            ds = dp.to(wide).sub_(out_dot[heads, queries]).mul_(scale).mul_(p.to(wide)).to(q.dtype)
        dq[heads, queries] = ds @ k[heads, keys]
        dk_tile = ds.transpose(1, 2) @ q[heads, queries]
        first_tile_of_heads = queries.stop == q.shape[1]
        if first_tile_of_heads:
            dk[heads], dv[heads] = dk_tile, dv_tile
        else:
            dk[heads, keys] += dk_tile
            dv[heads, keys] += dv_tile
    return dq, dk, dv


def _tiles(n_heads: int, n_queries: int, n_keys: int, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield tiles as slices of heads, queries and keys. The last queries of some heads come first: they see all keys,
    so the backward pass can write their gradients of k and v where later tiles must add.
    """
    heads_per_tile = max(1, SCORES_PER_TILE // (min(QUERIES_PER_TILE, n_queries) * n_keys))
    for head in range(0, n_heads, heads_per_tile):
        for start in reversed(range(0, n_queries, QUERIES_PER_TILE)):
            stop = min(start + QUERIES_PER_TILE, n_queries)
            yield (
                slice(head, min(head + heads_per_tile, n_heads)),
                slice(start, stop),
                slice(0, n_keys - n_queries + stop if causal else n_keys),
            )


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, document_ids: Tensor | None, tile) -> Tensor:
    """Return a tile's scaled and masked logits as exponents of 2, in fp32 since a CPU is slow in bf16.

    In bf16 the products are rounded to bf16 first, as in transformers' eager attention.
    """
    _, queries, _ = tile
    scores = _products(q, k, scale, tile).to(torch.promote_types(q.dtype, torch.float32))  # (heads, queries, keys)
    if ids := _ids(document_ids, len(q), q.shape[1], tile):
        of_queries, of_keys = ids
        scores.masked_fill_(of_queries[:, :, None] != of_keys[:, None], -torch.inf)
    if causal:
        size = queries.stop - queries.start
        future = scores.new_full((size, size), -torch.inf).triu_(1)
        scores[:, :, -size:] += future  # on a CPU four times as fast as masked_fill_
    return scores


def _products(q: Tensor, k: Tensor, scale: float, tile) -> Tensor:
    """Return a tile's scaled logits as exponents of 2, in the dtype of q."""
    heads, queries, keys = tile
    none = q.new_zeros(())  # not left empty: on MPS, torch up to 2.13 multiplies what is there by beta
    return torch.baddbmm(none, q[heads, queries], k[heads, keys].transpose(1, 2), beta=0, alpha=scale / LN2)


def _ids(document_ids: Tensor | None, n_heads: int, n_queries: int, tile) -> tuple[Tensor, Tensor] | None:
    """Return the documents of a tile's queries (heads, queries) and keys (heads, keys), for ids (B, Tk)."""
    if document_ids is None:
        return None
    heads, queries, keys = tile
    row = torch.arange(heads.start, heads.stop, device=document_ids.device) // (n_heads // len(document_ids))
    return document_ids[row, -n_queries:][:, queries], document_ids[row, keys]


def _probs(q: Tensor, k: Tensor, scale: float, causal: bool, document_ids: Tensor | None, lse: Tensor, tile) -> Tensor:
    """Return a tile's probabilities again, given the log-sum-exp of each query (N, Tq)."""
    heads, queries, _ = tile
    log_sum = lse[heads, queries] / LN2
    if compiled := compiled_for(q, k):
        probs = _products(q, k, scale, tile)
        compiled.softmax_(probs, causal, _ids(document_ids, len(q), q.shape[1], tile), log_sum)
        return probs
    return _scores(q, k, scale, causal, document_ids, tile).sub_(log_sum.unsqueeze(-1)).exp2_()


class _Attend(torch.autograd.Function):
    """Saves the log-sum-exp of each query. The backward pass recomputes the probabilities tile by tile."""

    @staticmethod
    def forward(ctx, q, k, v, scale, causal, document_ids):
        shape = q.shape[:3]
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))  # (B * H, T, D)
        out, lse, max_logit = attend_forward(q, k, v, scale, causal, document_ids)
        ctx.save_for_backward(q, k, v, out, lse, document_ids)
        ctx.scale, ctx.causal, ctx.shape = scale, causal, shape
        max_logit = max_logit.view(shape)  # (B, H, Tq)
        ctx.mark_non_differentiable(max_logit)
        return out.unflatten(0, shape[:2]), max_logit  # (B, H, Tq, Dv)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, _):
        q, k, v, out, lse, document_ids = ctx.saved_tensors
        d_out = d_out.to(v.dtype).reshape(out.shape)
        out_dot = (d_out * out).sum(-1, keepdim=True, dtype=lse.dtype)
        tiles = _tiles(len(q), q.shape[1], k.shape[1], ctx.causal)
        probs = (_probs(q, k, ctx.scale, ctx.causal, document_ids, lse, tile) for tile in tiles)
        grads = attend_backward(d_out, out_dot, probs, q, k, v, ctx.scale, ctx.causal)
        return *(dx.to(q.dtype).unflatten(0, ctx.shape[:2]) for dx in grads), None, None, None
