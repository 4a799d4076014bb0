"""How attention is computed here: by `flex_attention` where a GPU trains, in a compiled graph as one operator, and else
by the work that was chosen alone. All three give the same numbers.
"""

import torch
from torch import Tensor

from . import flex
from .attention import attend
from .layout import Layout
from .moba import moba_attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Layout, block_size: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Attention of q, k (B, H, T, D) and v (B, H, T, Dv) over MoBA's blocks, or full where `topk` is 0.

    Returns:
        out (B, H, T, Dv), and each query's largest scaled logit (B, H, T) in fp32.
    """
    if flex.serves(q, layout):
        return flex.attention(q, k, v, layout.segment, layout.offset, scale, block_size, topk)
    if torch.compiler.is_compiling():
        return _attention(q, k, v, layout.segment, layout.offset, layout.plain, scale, block_size, topk)
    if topk:
        return moba_attention(q, k, v, scale, layout, block_size, topk)
    return attend(q, k, v, scale, causal=True, segment=layout.packing)


# In a graph, the sizes of what was chosen are not known, and neither is the way from the forward to the backward pass
# open to them: so the latter chooses anew.


@torch.library.custom_op("moonwhale::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, segment: Tensor, offset: Tensor, plain: bool, scale: float, size: int, topk: int
) -> tuple[Tensor, Tensor]:
    out, top = attention(q, k, v, scale, Layout(segment, offset, segment >= 0, plain), size, topk)
    return out.contiguous(), top.contiguous()


@_attention.register_fake
def _(q, k, v, *_):
    return v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("moonwhale::attention_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment: Tensor,
    offset: Tensor,
    plain: bool,
    scale: float,
    size: int,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = attention(*inputs, scale, Layout(segment, offset, segment >= 0, plain), size, topk)
        return tuple(dx.contiguous() for dx in torch.autograd.grad(out, inputs, d_out))


@_attention_backward.register_fake
def _(d_out, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _backward(ctx, d_out, _):
    return *_attention_backward(d_out.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 6


_attention.register_autograd(_backward, setup_context=_save)
