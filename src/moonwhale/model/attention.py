"""Exact softmax attention, a chunk of queries at a time: never the whole score matrix; with row maxima, for QK-clip."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 128  # queries a step; a causal chunk computes only the keys up to its own end


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


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, segment: Tensor | None, start: int, stop: int) -> Tensor:
    """Scaled and masked logits (B, H, stop - start, keys) in fp32 of one chunk of queries."""
    last = stop if causal else k.shape[2]
    scores = (q[:, :, start:stop] @ k[:, :, :last].transpose(-1, -2)).float().mul_(scale)
    if segment is not None:
        scores.masked_fill_((segment[:, start:stop, None] != segment[:, None, :last])[:, None], -torch.inf)
    if causal:
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu_(1)
        scores[..., start:].masked_fill_(future, -torch.inf)
    return scores


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, causal, segment):
        length = q.shape[2]
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        top = torch.empty_like(lse)
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            scores = _scores(q, k, scale, causal, segment, start, stop)
            top[:, :, start:stop] = scores.amax(-1)
            scores.sub_(top[:, :, start:stop, None]).exp_()
            total = scores.sum(-1, keepdim=True)
            lse[:, :, start:stop] = top[:, :, start:stop] + total.squeeze(-1).log()
            out[:, :, start:stop] = scores.div_(total).to(v.dtype) @ v[:, :, : scores.shape[-1]]
        ctx.save_for_backward(q, k, v, out, lse, segment)
        ctx.scale, ctx.causal = scale, causal
        ctx.mark_non_differentiable(top)
        ctx.set_materialize_grads(False)
        return out, lse, top

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse, _):
        q, k, v, out, lse, segment = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.to(v.dtype)
        dq, dk, dv = (
            torch.empty_like(q),
            torch.zeros_like(k, dtype=torch.float32),
            torch.zeros_like(v, dtype=torch.float32),
        )
        # dS = P * (dP - rowsum(dO * O) + dLSE): the log-sum-exp's own gradient joins the row term.
        row = (d_out.float() * out.float()).sum(-1, keepdim=True)
        if d_lse is not None:
            row = row - d_lse.unsqueeze(-1)
        for start in range(0, q.shape[2], CHUNK):
            stop = min(start + CHUNK, q.shape[2])
            p = _scores(q, k, ctx.scale, ctx.causal, segment, start, stop).sub_(lse[:, :, start:stop, None]).exp_()
            last = p.shape[-1]
            d_chunk = d_out[:, :, start:stop]
            dv[:, :, :last] += p.to(v.dtype).transpose(-1, -2) @ d_chunk
            dp = (d_chunk @ v[:, :, :last].transpose(-1, -2)).float()
            ds = p.mul_(dp.sub_(row[:, :, start:stop])).mul_(ctx.scale).to(q.dtype)
            dq[:, :, start:stop] = ds @ k[:, :, :last]
            dk[:, :, :last] += ds.transpose(-1, -2) @ q[:, :, start:stop]
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None
