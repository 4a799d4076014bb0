"""RMSNorm, computed in fp32 and returned in the input's dtype."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernels import compiled_for


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (…, size). Shape and dtype stay the same."""
        if torch.compiler.is_compiling():  # the compiler fuses this, and torch 2.11 loses _RMSNorm's gradient
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Has a backward pass written out: autograd's own takes twice as many passes over memory, and on a CPU operations
    that mix bf16 and fp32 take twice the time.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        if compiled := compiled_for(x):
            out, inverse = compiled.norm(x, weight, eps)
            ctx.save_for_backward(x, weight, inverse)
            return out
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, inverse = ctx.saved_tensors
        if compiled := compiled_for(x, d_out):
            return *compiled.norm_backward(d_out, x, weight, inverse), None
        normed = x.to(inverse.dtype, copy=True).mul_(inverse)
        d_normed = d_out.to(inverse.dtype, copy=True)
        product = d_normed * normed
        d_weight = product.view(-1, x.shape[-1]).sum(0)
        d_normed.mul_(weight)  # in place, as all that follows: new memory costs more than the arithmetic
        along = torch.mul(d_normed, normed, out=product).mean(-1, keepdim=True)
        return d_normed.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), d_weight, None
