"""The activation of gated feed-forward networks (SwiGLU): silu(gate) * up, for each row or expert."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import compiled_for


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, for two tensors of one shape."""
    return _Gated.apply(gate, up) if compiled_for(gate, up) else F.silu(gate) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return compiled_for(gate, up).gate(gate, up)  # `gated` has asked whether it can

    @staticmethod
    @once_differentiable
    def backward(ctx, d_product):
        gate, up = ctx.saved_tensors
        if compiled := compiled_for(gate, up, d_product):
            return compiled.gate_backward(d_product, gate, up)[0].chunk(2, dim=-1)
        return torch.ops.aten.silu_backward(d_product * up, gate), d_product * F.silu(gate)


def gated_rows(inner: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return silu(gate) * up * weight for inner = [gate, up] (R, 2 * inner) and weight (R,), and what to keep of it."""
    gate, up = inner.chunk(2, dim=-1)
    if compiled := compiled_for(inner):
        return compiled.gate(gate, up, weight), (inner,)
    gate, up = gate.contiguous(), up.contiguous()  # makes all that follows twice as fast
    activated = F.silu(gate)
    return (activated * up).mul_(weight.to(inner.dtype).unsqueeze(1)), (gate, up, activated)


def gated_rows_backward(d_product: Tensor, weight: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of inner (R, 2 * inner) and of weight (R,), and the product (R, inner) again.

    `d_product` (R, inner) is the gradient of the product, and may be overwritten. `kept` is what `gated_rows` returned.
    """
    if len(kept) == 1:
        gate, up = kept[0].chunk(2, dim=-1)
        if compiled := compiled_for(gate, d_product):
            return compiled.gate_backward(d_product, gate, up, weight)
        kept = gate, up, F.silu(gate)
    gate, up, activated = kept
    product, row_weight = activated * up, weight.to(gate.dtype).unsqueeze(1)
    d_weight = (d_product * product).sum(-1, dtype=weight.dtype)
    d_product = d_product.mul_(row_weight)
    d_inner = torch.cat([torch.ops.aten.silu_backward(d_product * up, gate), d_product * activated], dim=-1)
    return d_inner, d_weight, product.mul_(row_weight)
